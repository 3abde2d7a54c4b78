"""Sums over all that this process does: added to where things happen, read by `metrics`."""

from __future__ import annotations

import os
from collections import Counter
from threading import get_ident

Number = tuple[str, str]  # the name of a number, and of its part if it has parts


class Sums:
    """Numbers that only grow. May be added to from several threads, each of which has its own."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Start from nothing: at first, and in a forked child, whose parent tells its own part."""
        self._of_threads: dict[int, Counter[Number]] = {}

    def add(self, more: Counter[Number]) -> None:
        """Add what has happened since."""
        self._of_threads.setdefault(get_ident(), Counter()).update(more)

    def copy(self) -> Counter[Number]:
        """All of them as they are now."""
        total: Counter[Number] = Counter()
        for sums in self._of_threads.copy().values():
            total.update(sums.copy())
        return total


SUMS = Sums()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=SUMS.begin)
