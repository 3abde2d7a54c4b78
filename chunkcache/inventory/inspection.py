"""Inspection: what one blob holds, as far as it can be read without its model.

For people who look. Nothing here decides whether a blob is used: that is checked against what the
chunk must be, byte by byte (see `codec.py`).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from chunkcache.errors import SettingError
from chunkcache.keys import ChunkKey
from chunkcache.stores.base import ChunkStore, Listed, read_blobs
from chunkcache.tokens.listed import from_text

# The types that keys and values have as they are, and what reads them.
_NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_LAYER = re.compile(r"layers\.(\d{1,6})\.(keys|values)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Norms:
    """Of one layer: the length of a token's key and value in a head, on average; L2."""

    layer: int
    keys: float
    values: float


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a blob holds.

    Attributes:
        header: The safetensors header: its `__metadata__`, and each tensor's type, shape and place.
        norms: Layer by layer; empty where the numbers are not keys and values as they are.
        unread: Why something is missing above, or `""`.
        text: What its tokens say, where a tokenizer was there to tell.
    """

    header: dict[str, Any]
    norms: tuple[Norms, ...]
    unread: str = ""
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON; `None` for what is no finite number."""
        told = asdict(self)
        for norms in told["norms"]:
            for part in ("keys", "values"):
                norms[part] = norms[part] if math.isfinite(norms[part]) else None
        return told


def inspect(store: ChunkStore, key: str) -> Inspection:
    """Look into the blob of a key.

    Raises:
        StoreError: The store failed.
    """
    try:
        form = ChunkKey.parse(key).format
    except SettingError:
        return Inspection({}, (), "this is not the key of a chunk")
    if "+" in form:
        return Inspection({}, (), f"a blob of the format {form} is read by caches only")
    (blob,) = (None if view is None else bytes(view) for view in read_blobs(store, [key]))
    if blob is None:
        return Inspection({}, (), "the blob is not there")
    try:
        tensors = dict(deserialize(blob))  # type: ignore[no-untyped-call]
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    except (SafetensorError, ValueError, OverflowError) as error:
        return Inspection({}, (), f"the blob is damaged: {error}")
    if not all(tensor["dtype"] in _NUMBERS for tensor in tensors.values()):
        return Inspection(header, (), "its numbers are not keys and values as they are")
    return Inspection(header, _norms(tensors))


def read_text(inside: Inspection, entry: Listed, tokenizer: Any) -> Inspection:
    """What was found with the text of the chunk's tokens, as its metadata name them.

    Args:
        inside: What was found of the chunk.
        entry: The chunk.
        tokenizer: A Transformers tokenizer.
    """
    said = (entry.metadata or {}).get("token_ids", "")
    if said and not said.startswith("["):
        why = "the text: its token ids are sealed"
    elif (ids := from_text(said)) is None or ids.max() >= len(tokenizer):
        why = "the text: the metadata have no token ids that this tokenizer knows"
    else:
        return replace(inside, text=str(tokenizer.decode(ids.tolist())))
    return replace(inside, unread="; ".join(filter(None, (inside.unread, why))))


def _norms(tensors: dict[str, dict[str, Any]]) -> tuple[Norms, ...]:
    """Of tensors `[kv_heads, tokens, head_dim]` by name, as the library reads them."""
    layers: dict[int, dict[str, float]] = {}
    for name, tensor in tensors.items():
        found = _LAYER.fullmatch(name)
        # With a size of 0, the others may be as large as a header can write.
        if found and len(tensor["shape"]) == 3 and tensor["data"]:
            numbers = np.frombuffer(tensor["data"], _NUMBERS[tensor["dtype"]])
            if tensor["dtype"] == "BF16":  # the upper half of a float32
                numbers = (numbers.astype("<u4") << 16).view("<f4")
            with np.errstate(all="ignore"):
                heads = numbers.reshape(tensor["shape"]).astype(np.float64)
                length = np.linalg.norm(heads, axis=-1).mean()
            layers.setdefault(int(found[1]), {})[found[2]] = float(length)
    return tuple(
        Norms(layer, parts["keys"], parts["values"])
        for layer, parts in sorted(layers.items())
        if len(parts) == 2
    )
