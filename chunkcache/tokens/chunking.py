"""Tokens to chunks: where a row of tokens is cut, and the chained hash of each cut.

A chunk is known by everything its K/V depend on: the model (the salt), all tokens before it and
its own. The tokens before it enter as a running chain of hashes, one link per stride, so that
hashing a prompt costs one pass over its tokens. Hashes are HMAC-SHA256 (RFC 2104) under the salt:
where that comes of a secret, nobody else can tell which text a hash is of.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
MOST_TOKENS = 1 << 20  # a chunk has fewer


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
        salt: Stands for what the K/V depend on besides the tokens (see `ModelIdentity.salt`).
        tail: Whether the shorter chunk at the end counts.

    Returns:
        The chunks in order. `hash` has 64 hexadecimal digits.
    """
    ids = np.ascontiguousarray(tokens, dtype="<i8")
    chunks = []
    link = keyed_hash(salt, b"chunkcache/chain/2")
    for start, stop in grid.spans(len(ids), tail):
        if start:
            link = keyed_hash(
                salt, b"chunkcache/link/2", link, ids[start - grid.stride : start].tobytes()
            )
        digest = keyed_hash(salt, b"chunkcache/chunk/2", link, ids[start:stop].tobytes())
        chunks.append(Chunk(start, stop, digest.hex()))
    return chunks


def keyed_hash(salt: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 of all parts together; the first names what is hashed."""
    return hmac.digest(salt, b"".join(parts), "sha256")


def as_text(ids: Sequence[int]) -> str:
    """Token ids as metadata list them: JSON, which people can read."""
    return json.dumps(list(ids), separators=(",", ":"))


def from_text(text: str) -> Tokens | None:
    """`[tokens]` ids in metadata, which anybody may have written; `None` for any other text."""
    try:
        listed = json.loads(text)
        ids = np.array(listed)
    except (ValueError, OverflowError, RecursionError):
        return None
    # What is too large for 64 bits, and what is no number, makes an array of another kind.
    if not isinstance(listed, list) or ids.ndim != 1 or ids.dtype.kind != "i":
        return None
    return ids.astype(np.int64) if len(ids) < MOST_TOKENS and ids.min() >= 0 else None
