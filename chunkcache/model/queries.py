"""Queries as attention gets them, seen from outside of the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from chunkcache.kv.layers import GrowingLayer

_ATTENTION = (F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__)


class Queries(TorchFunctionMode):
    """Notes what each layer's queries are, in this thread, and changes nothing.

    Attention follows the update of the layer's cache: what is multiplied first between that of one
    layer and that of the next are its queries. What is compiled passes unseen.

    Attributes:
        seen: By layer `[batch, heads, tokens, head_dim]`, times the scale that
            `scaled_dot_product_attention` is given, in float64.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}
        self._layer: int | None = None
        self._tokens = self._total = 0
        for index, layer in enumerate(layers):
            if isinstance(layer, GrowingLayer):
                layer.intercept = partial(self._enter, index, layer)

    def _enter(self, index: int, layer: GrowingLayer, keys: Tensor, values: Tensor) -> None:
        self._layer, self._tokens = index, keys.shape[-2]
        self._total = layer.get_seq_length() + self._tokens

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._layer is None or func not in _ATTENTION:
            return out
        query = args[0] if args else kwargs.get("query", kwargs.get("input"))
        is_score = func is F.scaled_dot_product_attention or out.shape[-1:] == (self._total,)
        if is_score and query.dim() == 4 and query.shape[-2] == self._tokens:
            self.seen[self._layer] = query.double() * (kwargs.get("scale") or 1.0)
            self._layer = None
        return out
