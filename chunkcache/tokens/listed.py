"""Token ids as metadata list them: JSON, which people can read, and anybody may have written."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from chunkcache.tokens.chunking import Tokens

MOST_TOKENS = 1 << 20  # a chunk has fewer


def as_text(ids: Sequence[int]) -> str:
    """Token ids as they stand in metadata."""
    return json.dumps(list(ids), separators=(",", ":"))


def from_text(text: str) -> Tokens | None:
    """`[tokens]` ids that stand in metadata; `None` where the text is anything else."""
    try:
        listed = json.loads(text)
        ids = np.array(listed)
    except (ValueError, OverflowError, RecursionError):
        return None
    # What is too large for 64 bits, and what is no number, makes an array of another kind.
    if not isinstance(listed, list) or ids.ndim != 1 or ids.dtype.kind != "i":
        return None
    return ids.astype(np.int64) if len(ids) < MOST_TOKENS and ids.min() >= 0 else None
