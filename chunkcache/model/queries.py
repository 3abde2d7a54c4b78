"""Attention seen from outside of the model; its queries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from chunkcache.kv.layers import GrowingLayer
from chunkcache.kv.rope import wide

_ATTENTION = (F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__)


class AttentionWatch(TorchFunctionMode):
    """Looks at what attention computes, in this thread alone, and changes nothing.

    Attention follows the update of the layer's cache: what is computed first between that of one
    layer and that of the next is the attention of the former. What is compiled passes unseen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._layer: int | None = None  # whose attention is looked for

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._layer is not None and self._note(self._layer, out, func, args, kwargs or {}):
            self._layer = None
        return out

    def _note(
        self, layer: int, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Look at one call. True if it was the layer's attention."""
        raise NotImplementedError


class Queries(AttentionWatch):
    """Notes what each layer's queries are.

    Attributes:
        seen: By layer `[batch, heads, tokens, head_dim]`, times the scale that
            `scaled_dot_product_attention` is given; as `wide`.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}
        self._tokens = self._total = 0
        for index, layer in enumerate(layers):
            if isinstance(layer, GrowingLayer):
                layer.intercept = partial(self._enter, index, layer)

    def _enter(self, index: int, layer: GrowingLayer, keys: Tensor, values: Tensor) -> None:
        self._layer, self._tokens = index, keys.shape[-2]
        self._total = layer.get_seq_length() + self._tokens

    def _note(
        self, layer: int, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        if func not in _ATTENTION:
            return False
        query: Any = args[0] if args else kwargs.get("query", kwargs.get("input"))
        is_score = func is F.scaled_dot_product_attention or out.shape[-1:] == (self._total,)
        if not (is_score and query.dim() == 4 and query.shape[-2] == self._tokens):
            return False
        self.seen[layer] = wide(query) * (kwargs.get("scale") or 1.0)
        return True
