"""Tokens to chunks: where a row of tokens is cut, and the chained hash of each cut.

A chunk is known by everything its K/V depend on: the model (the salt), all tokens before it and
its own. The tokens before it enter as a running SHA-256 chain, one link per stride, so that hashing
a prompt costs one pass over its tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Grid:
    """Where rows are cut: chunks of `size` tokens that begin every `size - overlap` tokens."""

    size: int = 128
    overlap: int = 0

    @property
    def stride(self) -> int:
        """Tokens from the start of a chunk to the start of the next."""
        return self.size - self.overlap

    def complete(self, tokens: int) -> int:
        """How many whole chunks a row of `tokens` tokens has."""
        return 0 if tokens < self.size else (tokens - self.size) // self.stride + 1

    def spans(self, tokens: int, tail: bool = False) -> list[tuple[int, int]]:
        """Start and stop of each chunk of a row; with `tail`, also of the shorter one at the end.

        A tail of one token is left out: the last token of a prompt is computed in any case.
        """
        spans = [
            (i * self.stride, i * self.stride + self.size) for i in range(self.complete(tokens))
        ]
        covered = spans[-1][1] if spans else 0
        if tail and covered + 1 < tokens:
            spans.append((len(spans) * self.stride, tokens))
        return spans


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of tokens of one row, and the hash that names its K/V.

    `start` and `stop` are positions among the row's own tokens (padding not counted).
    """

    start: int
    stop: int
    hash: str


def cut(tokens: Sequence[int] | Tokens, grid: Grid, salt: bytes, tail: bool = False) -> list[Chunk]:
    """Cut a row into chunks and hash each with all that stands before it.

    Args:
        tokens: `[tokens]`, the row's token ids without padding.
        grid: Where to cut.
        salt: Digest of what the K/V depend on besides the tokens (model, namespace, layout).
        tail: Whether the shorter chunk at the end counts.

    Returns:
        The chunks in order. `hash` is SHA-256 in 64 hexadecimal digits.
    """
    ids = np.ascontiguousarray(tokens, dtype="<i8")
    chunks = []
    link = hashlib.sha256(b"chunkcache/chain/1" + salt).digest()
    for start, stop in grid.spans(len(ids), tail):
        if start:
            link = hashlib.sha256(link + ids[start - grid.stride : start].tobytes()).digest()
        digest = hashlib.sha256(b"chunk" + link + ids[start:stop].tobytes())
        chunks.append(Chunk(start, stop, digest.hexdigest()))
    return chunks
