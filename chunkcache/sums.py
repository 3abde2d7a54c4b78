"""Sums over all that this process does: added to where things happen, read by `metrics`."""

from __future__ import annotations

import os
import threading
from collections import Counter

Number = tuple[str, str]  # the name of a number, and of its part if it has parts


class Sums:
    """Numbers that only grow. May be added to from several threads."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Start from nothing: at first, and in a forked child, whose parent tells its own part."""
        self._lock = threading.Lock()
        self._sums: Counter[Number] = Counter()

    def add(self, more: Counter[Number]) -> None:
        """Add what has happened since."""
        with self._lock:
            self._sums.update(more)

    def copy(self) -> Counter[Number]:
        """All of them as they are now."""
        with self._lock:
            return self._sums.copy()


SUMS = Sums()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=SUMS.begin)
