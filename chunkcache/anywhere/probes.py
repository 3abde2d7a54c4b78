"""Probes: passes through a few layers that tell a repair strategy where the errors are.

Other threads may compute with the same model meanwhile, so a probe changes nothing of it: what it
sees it sees in its own cache layers, and in the calls of its own thread (an `AttentionWatch`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunkcache.errors import RepairError
from chunkcache.kv.layers import GrowingLayer
from chunkcache.kv.rope import wide
from chunkcache.model.check import CACHE
from chunkcache.model.compiled import uncompiled
from chunkcache.model.queries import AttentionWatch
from chunkcache.model.scatter import close_layers, open_layers, scatter_mask
from chunkcache.model.self_test import cache_of
from chunkcache.repair import Scores

# Whose attention is looked at, and where: the last tokens of the prompt, in the layers between
# these shares of the depth. Chosen on documents that no reported figure comes from.
QUERY_TOKENS = 12
QUERY_LAYERS = (0.5, 0.8)


class _EnoughError(Exception):
    """Ends a forward once a probe has seen what it came for."""


@dataclass
class Probes:
    """Looks at one prompt whose moved runs are in place. See `repair.Situation`.

    Attributes:
        model: The model.
        layers: Cache layers with everything that is known in place.
        ids: `[1, tokens]` token ids.
        known: `[tokens]`, True where K/V are in place.
        start: Where the exact beginning ends.
        runs: Start and stop of each moved run.
        charged: What the probes have cost, in tokens through all layers.
    """

    model: nn.Module
    layers: Sequence[Any]
    ids: Tensor
    known: Tensor
    start: int
    runs: list[tuple[int, int]]
    charged: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self.ids.shape[1]

    def deviation(self) -> Scores:
        """For each token, how far its values at the second layer are from fresh ones.

        Fresh are those computed with the whole prompt in view: layer 0 of every token is run anew
        (its K/V depend on the token alone, so they do not change), and layer 1 up to its values.
        """
        return self._deviation

    @cached_property
    def _deviation(self) -> Scores:
        second = self._growing()[1]
        layer: GrowingLayer = self.layers[second]
        columns = torch.arange(self.start, self.tokens, device=self._device)
        scores = np.zeros(self.tokens)

        def compare(keys: Tensor, values: Tensor) -> None:
            stored = layer.values[:, :, self.start :].float()
            distance = (values.float() - stored).pow(2).sum(dim=(0, 1, 3)).sqrt()
            scores[self.start :] = wide(distance).numpy()
            raise _EnoughError

        mask = scatter_mask(self.model, columns, self.tokens, 1)
        self._run(columns, mask, {second: compare}, nullcontext())
        self.charged += self._moved * 2 / len(self._growing())
        return scores

    def query_attention(self) -> Scores:
        """For each token, the attention it gets from the prompt's last tokens.

        In layers past the middle, and where some of those see the whole prompt, in these alone.
        """
        return self._query_attention

    @cached_property
    def _query_attention(self) -> Scores:
        growing = self._growing()
        first, last = (round(share * len(growing)) for share in QUERY_LAYERS)
        looked_at = growing[first : max(last, first + 1)]
        looked_at = [index for index in looked_at if self._sees_all(index)] or looked_at
        tail = int((~self.known).flip(0).long().cumprod(0).sum()) or 1
        first = self.tokens - min(tail, QUERY_TOKENS)
        columns = torch.arange(first, self.tokens, device=self._device)
        self.charged += len(columns) * (growing.index(looked_at[-1]) + 1) / len(growing)
        return self.attention(columns, looked_at).sum(0).double().numpy()

    def attention(self, columns: Tensor, layers: Sequence[int]) -> Tensor:
        """What tokens get from those at `columns`, `[layers, tokens]`, summed over heads.

        The model runs up to the last of the layers asked for, over these columns alone.

        Raises:
            RepairError: A layer's attention is computed in a way that cannot be seen.
        """
        columns = columns.to(self._device)
        seen = self.known.to(self._device, copy=True)
        seen[columns] = True
        mask = _hide(scatter_mask(self.model, columns, self.tokens, 1), ~seen)
        recorder = _AttentionRecorder(layers, len(columns), self.tokens)
        looks = {index: partial(recorder.enter_layer, index) for index in self._growing()}
        behind = [index for index in self._growing() if index > max(layers)]
        self._run(columns, mask, looks | dict.fromkeys(behind[:1], _stop), recorder)
        if unseen := [index for index in layers if index not in recorder.sums]:
            raise RepairError(
                f"layer {unseen[0]} computes its attention neither by scaled_dot_product_attention "
                "nor by a softmax of scores, so it cannot be looked at: load the model with "
                "attn_implementation='sdpa' or 'eager', or set a repair without 'query'"
            )
        return torch.stack([recorder.sums[index] for index in layers]).cpu()

    @property
    def _moved(self) -> int:
        return sum(stop - start for start, stop in self.runs)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.layers[self._growing()[0]].device
        return device

    def _sees_all(self, index: int) -> bool:
        """Whether a layer's attention has no window."""
        config: Any = self.model.config
        kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
        return not kinds or kinds[index] == "full_attention"

    def _growing(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if isinstance(layer, GrowingLayer)]

    def _run(
        self,
        columns: Tensor,
        mask: Any,
        intercepts: Mapping[int, Callable[[Tensor, Tensor], None]],
        within: AbstractContextManager[Any],
    ) -> None:
        """A forward over some columns, with a look at what some layers are about to cache."""
        open_layers(self.layers, columns, self.tokens)
        for index, look in intercepts.items():
            self.layers[index].intercept = look
        try:
            with within:
                uncompiled(self.model)(
                    input_ids=self.ids.to(columns.device)[:, columns],
                    position_ids=columns[None],
                    attention_mask=mask,
                    use_cache=True,
                    **{CACHE: cache_of(list(self.layers))},
                )
        except _EnoughError:
            pass
        finally:
            close_layers(self.layers)


class _AttentionRecorder(AttentionWatch):
    """Notes what attention is paid in some layers.

    Attributes:
        sums: What the queries pay to every token, `[tokens]`, summed over heads, by layer.
    """

    def __init__(self, layers: Collection[int], queries: int, tokens: int) -> None:
        super().__init__()
        self.sums: dict[int, Tensor] = {}
        self._layers, self._queries, self._tokens = layers, queries, tokens

    def enter_layer(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Note that a layer's cache is being updated."""
        self._layer = index if index in self._layers else None

    def _note(
        self, layer: int, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        if func is not F.scaled_dot_product_attention and func not in _SOFTMAX:
            return False
        weights = out if func in _SOFTMAX else _weights(*args, **kwargs)
        # Behind the tokens there may be a column of attention sinks.
        beside = weights.shape[-1] - self._tokens
        if weights.dim() <= 2 or beside not in (0, 1) or weights.shape[-2] % self._queries:
            return False
        every = weights.flatten(0, -2)[:, : self._tokens]
        self.sums[layer] = every.float().sum(0)
        return True


_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` with these arguments multiplies `value` by.

    `[batch, heads, queries, tokens]`, float32.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.transpose(-2, -1)).float()
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(dim=-1)


def _stop(keys: Tensor, values: Tensor) -> None:
    raise _EnoughError


def _hide(mask: Any, hidden: Tensor) -> Any:
    """The mask without what is not in place yet."""
    if isinstance(mask, dict):
        return {kind: _hide(part, hidden) for kind, part in mask.items()}
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
