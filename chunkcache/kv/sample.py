"""A few of the numbers that layers hold, to see writes to them that PyTorch does not count.

Writing through `tensor.data`, NumPy or a pointer leaves the version counters as they are (see
`WriteCount`). So some numbers are kept, and compared before anything is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chunkcache.kv.layers import GrowingLayer
from chunkcache.kv.transfer import is_host

COLUMNS = 48  # at least, where so many are held
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Sample:
    """One channel of every n-th column that `layers` hold, the last one among them."""

    def __init__(self, layers: Sequence[Any]) -> None:
        held = min((layer.get_seq_length() for layer in _growing(layers)), default=0)
        step = max(held // COLUMNS, 1)
        self._columns = range((held - 1) % step, held, step)
        self._numbers = self._taken(layers)

    def differences(self, layers: Sequence[Any]) -> list[Tensor | bool]:
        """Whether numbers have changed since: if any of these is true. Waits for no device."""
        found: list[Tensor | bool] = []
        for now, before in zip(self._taken(layers), self._numbers, strict=False):
            kinds = {(x.shape, x.dtype, x.device) for x in (now, before)}
            if len(kinds) > 1 or (is_host(now.device) and not torch.equal(now, before)):
                return [True]
            if not is_host(now.device):
                found.append((now != before).any())
        return found

    def crop(self, columns: int) -> None:
        """Leave out what lies behind the first `columns`, where others may be put."""
        kept = sum(1 for column in self._columns if column < columns)
        self._columns = self._columns[:kept]
        self._numbers = [numbers[..., :kept] for numbers in self._numbers]

    def _taken(self, layers: Sequence[Any]) -> list[Tensor]:
        """Integers `[batch, heads, columns]` of keys and of values, layer by layer.

        Another channel each time, and as integers, since NaN is not equal to itself.
        """
        columns = slice(self._columns.start, self._columns.stop, self._columns.step)
        tensors = [tensor for layer in _growing(layers) for tensor in (layer.keys, layer.values)]
        return [
            tensor[:, :, columns, turn * 7 % tensor.shape[3]]
            .clone()
            .view(_INTEGERS[tensor.itemsize])
            for turn, tensor in enumerate(tensors)
        ]


def _growing(layers: Sequence[Any]) -> list[GrowingLayer]:
    return [layer for layer in layers if isinstance(layer, GrowingLayer) and layer.is_initialized]
