"""Inspection: what one blob holds, as far as it can be read without its model.

For people who look. Nothing here decides whether a blob is used: that is checked against what the
chunk must be, byte by byte (see `codec.py`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from chunkcache.errors import SettingError
from chunkcache.model.identity import ChunkKey
from chunkcache.stores.base import ChunkStore

_LAYER = re.compile(r"layers\.(\d+)\.(keys|values)")


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
    """

    header: dict[str, Any]
    norms: tuple[Norms, ...]
    unread: str = ""


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
    (blob,) = (None if view is None else bytes(view) for view in store.read([key]))
    if blob is None:
        return Inspection({}, (), "the blob is not there")
    try:
        tensors = safetensors.torch.load(blob)
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    except (SafetensorError, ValueError, RecursionError) as error:
        return Inspection({}, (), f"the blob is damaged: {error}")
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        return Inspection(header, (), "its numbers are not keys and values as they are")
    return Inspection(header, _norms(tensors))


def _norms(tensors: dict[str, Tensor]) -> tuple[Norms, ...]:
    """Of tensors `[kv_heads, tokens, head_dim]` by name."""
    layers: dict[int, dict[str, float]] = {}
    for name, tensor in tensors.items():
        if found := _LAYER.fullmatch(name):
            length = tensor.float().norm(dim=-1).mean()
            layers.setdefault(int(found[1]), {})[found[2]] = float(length)
    return tuple(
        Norms(layer, parts["keys"], parts["values"])
        for layer, parts in sorted(layers.items())
        if len(parts) == 2
    )
