"""Anchors: the few windows of a text by which it is found again at any offset.

A window of 16 tokens is an anchor when a hash of its own tokens says so, one in four on average:
the same in every text, wherever it stands (Schleimer et al., Winnowing, 2003). So a text that
begins off every chunk border still shares anchors with its earlier copy. An anchor's entry in the
store names the chunks that hold it; the matches are then grown token by token.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

import numpy as np

from chunkcache.tokens.chunking import Tokens

WINDOW = 16
ONE_IN = 4
REACH = 2 * WINDOW - 1  # tokens beside a chunk that lead to it
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, bits well mixed: 2^64 over the golden ratio


@dataclass(frozen=True, slots=True)
class Anchor:
    """A window that begins at `start`; `hash` is HMAC-SHA256 of its tokens, 64 hex digits."""

    start: int
    hash: str


def anchors(tokens: Tokens, salt: bytes) -> list[Anchor]:
    """The anchors of a text, in order. `salt`, the key of the hashes, keeps models apart."""
    ids = np.ascontiguousarray(tokens, dtype="<i8")
    count = len(ids) - WINDOW + 1
    if count <= 0:
        return []
    mixed = np.zeros(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(WINDOW):
            mixed = mixed * _FACTOR + ids[offset : offset + count].astype(np.uint64)
        # A sum of products alone would choose by a pattern where ids follow one.
        mixed = (mixed ^ (mixed >> np.uint64(32))) * _FACTOR
        chosen = np.flatnonzero((mixed >> np.uint64(40)) % np.uint64(ONE_IN) == 0)
    prefix = hmac.new(salt, b"chunkcache/anchor/2", "sha256")
    found = []
    for start in chosen.tolist():
        digest = prefix.copy()
        digest.update(ids[start : start + WINDOW].tobytes())
        found.append(Anchor(start, digest.hexdigest()))
    return found
