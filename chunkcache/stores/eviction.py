"""Who leaves a store that is full: one order for all stores.

The entry that was used longest ago leaves first. All chunks of a prompt that are read or written
together count as used at the same time; among them, the deepest in the prompt leaves first, for a
chunk is of no use without those before it. A new chunk that would be the first to leave is not
kept, so a prompt larger than the store keeps its beginning.

Stores put entries in that order, each with what it has to tell their ages by; here is what they do
with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def leaving(ranked: Iterable[tuple[T, int]], nbytes: int) -> tuple[list[T], bool]:
    """Those that leave for a new entry, and whether that is enough; if not, none has to.

    Args:
        ranked: What leaves before the new entry, each with its bytes, in that order.
        nbytes: How much is lacking.
    """
    found: list[T] = []
    for each, freed in ranked if nbytes > 0 else ():
        found.append(each)
        nbytes -= freed
        if nbytes <= 0:
            break
    return found, nbytes <= 0


def roughly(age: int) -> int:
    """An age, for stores whose clocks count seconds, while a prompt may take some to be read.

    Ages that differ by less than about a tenth are the same.
    """
    dropped = max(age.bit_length() - 4, 0)
    return age >> dropped << dropped
