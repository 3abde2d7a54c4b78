"""Memory that is used again: pages that are there need not be made once more.

Writing into memory that the system has just given costs as much as several copies, since it must be
mapped and zeroed page by page.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import numpy.typing as npt

Buffer = npt.NDArray[np.uint8]


class BufferPool:
    """Hands out memory, and keeps it for the next one when nothing refers to it any more.

    At most `pieces` pieces are kept, each of at most `most_bytes`.
    """

    def __init__(self, pieces: int = 1, most_bytes: int = 1 << 29) -> None:
        self.most_bytes = most_bytes
        self._spare: deque[Buffer] = deque(maxlen=pieces)  # its methods are atomic

    def take(self, nbytes: int) -> Buffer:
        """Uninitialised memory; what it held before is still in it."""
        # numpy asks the kernel for huge pages, which makes first writes several times faster.
        if not 0 < nbytes <= self.most_bytes:
            return np.empty(nbytes, dtype=np.uint8)
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = np.empty(0, dtype=np.uint8)
        if not nbytes <= len(buffer) <= 2 * nbytes:
            buffer = np.empty(nbytes, dtype=np.uint8)
        # What is made of an array keeps that very array alive, so its end is that of the last user.
        array = buffer[:nbytes]
        weakref.finalize(array, self._spare.append, buffer).atexit = False
        return array
