"""A second user, for what one user must not do to another: root can become anybody."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import pytest

NOBODY = 65534
ROOT = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user"
)


def as_nobody(work: Callable[[], object], group: int = NOBODY, umask: int = 0o022) -> None:
    """Do something in a child that is another user; fails if it raises."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(group)
            os.setuid(NOBODY)
            os.umask(umask)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
