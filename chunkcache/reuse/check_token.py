"""CheckToken, the check token: one reused token of a prompt is computed again, and compared.

A model's identity cannot show everything that shapes its K/V: a plain attribute, a patched
function. But K/V of the upper layers depend on all that is below and before. So the forward that
computes the rest of a prompt begins with a token whose K/V are known, and they are compared layer
by layer. If they differ by more than rounding, the model or what is stored was changed: nothing of
the store may be used (`Prefill.finish`).

What cannot be seen: a change that touches other tokens only (one row of the embedding). Their
stored K/V are what the check token is computed from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.keys import BF16, INT8
from chunkcache.kv.codec import Codec
from chunkcache.kv.layers import growing, note_all_written
from chunkcache.kv.layout import KVLayout

# How far the K/V of one token at one layer may be from what is stored, relative to their size (the
# norm over heads and channels), and be the same but for rounding. `benchmarks.check_token` measures
# what rounding does, and what edits do.
ROUNDING = {
    torch.float64: 1e-4,  # parts of many models compute in float32 all the same
    torch.float32: 3e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 8e-2,
}
_INT8 = 0.2


def rounding(model: nn.Module, layout: KVLayout, codec: Codec) -> float:
    """The largest relative difference that rounding explains, for what this model caches."""
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), layout.dtype)
    kinds = [layout.dtype, weights]
    if codec.numbers == BF16:
        kinds.append(torch.bfloat16)
    bound = max(ROUNDING.get(kind, ROUNDING[torch.bfloat16]) for kind in kinds)
    return max(bound, _INT8) if codec.numbers == INT8 else bound


class CheckToken:
    """The first column of a forward, whose K/V are in the layers already.

    Made before the forward: the layers then keep what it overwrites.

    Args:
        layers: The layers that the cache object works on.
        column: The column, the first that is computed.
        rows: Rows in which it is no padding.
        bound: The largest relative difference that rounding explains.

    Attributes:
        bound: As given.
    """

    def __init__(
        self, layers: Sequence[Any], column: int, rows: Sequence[int], bound: float
    ) -> None:
        self.bound = bound
        self._layers = growing(layers)
        self._column, self._rows = column, list(rows)
        for layer in self._layers:
            layer.keeps_first = True

    def difference(self) -> float:
        """How far the K/V computed are from those stored, at the layer where it is most.

        The norm of the difference over that of the larger, for keys and values by themselves; NaN
        if there are any. Waits for the device once.
        """
        alike: defaultdict[tuple[object, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for layer in self._layers:
            for old, held in zip(layer.first or (), (layer.keys, layer.values), strict=False):
                new = held[:, :, self._column : self._column + 1]
                if new.shape == old.shape:  # others replaced what is held otherwise
                    alike[old.shape, old.device, old.dtype, new.dtype].append((old, new))
        worst = [_difference(pairs, self._rows) for pairs in alike.values()]
        return float(torch.stack([w.to(worst[0].device) for w in worst]).max()) if worst else 0.0

    def undo(self) -> None:
        """Put back what the first column held before: it was computed to be compared alone."""
        for layer in self._layers:
            for old, held in zip(layer.first or (), (layer.keys, layer.values), strict=False):
                for row in self._rows:
                    held[row, :, self._column].copy_(old[row, :, 0])
        note_all_written(self._layers)


def _difference(pairs: Sequence[tuple[Tensor, Tensor]], rows: list[int]) -> Tensor:
    """The largest of pairs of `[batch, kv_heads, 1, head_dim]`, in these rows."""
    old, new = (torch.stack(side) for side in zip(*pairs, strict=True))
    if len(rows) < old.shape[1]:
        old, new = (torch.stack([side[:, row] for row in rows], 1) for side in (old, new))
    old, new = old.float().flatten(2), new.float().flatten(2)
    size = torch.maximum(old.norm(dim=-1), new.norm(dim=-1))
    largest: Tensor = (new - old).norm(dim=-1) / size.clamp(min=torch.finfo(size.dtype).tiny)
    return largest.max()
