"""Probes: passes through a few layers that tell a repair strategy where the errors are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from chunkcache.layers import GrowingLayer
from chunkcache.proof import cache_of
from chunkcache.repair import Scores
from chunkcache.scatter import close_layers, open_layers, scatter_mask

QUERY_TOKENS = 32  # of the prompt's end, whose attention is looked at
_ATTENTION = "chunkcache_query_probe"


class _EnoughError(Exception):
    """Ends a forward once a probe has seen what it came for."""


@dataclass
class Probes:
    """Looks at one prompt whose moved runs are in place. See `repair.Situation`.

    Attributes:
        model: The model.
        layers: Cache layers with everything that is known in place.
        ids: `[rows, tokens]` token ids; all rows alike.
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
    _sums: list[Tensor] = field(default_factory=list)

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
        columns = torch.arange(self.start, self.tokens)
        scores = np.zeros(self.tokens)

        def compare(keys: Tensor, values: Tensor) -> None:
            stored = layer.values[:1, :, self.start :].float()
            distance = (values[:1].float() - stored).pow(2).sum(dim=(0, 1, 3)).sqrt()
            scores[self.start :] = distance.cpu().double().numpy()
            raise _EnoughError

        self._run(
            columns, scatter_mask(self.model, columns, self.tokens, self._rows), {second: compare}
        )
        self.charged += self._moved * 2 / len(self._growing())
        return scores

    def query_attention(self) -> Scores:
        """For each token, the attention it gets from the prompt's last tokens, in middle layers."""
        return self._query_attention

    @cached_property
    def _query_attention(self) -> Scores:
        growing = self._growing()
        first, last = len(growing) // 3, max(2 * len(growing) // 3, len(growing) // 3 + 1)
        middle = set(growing[first:last])
        tail = int((~self.known).flip(0).long().cumprod(0).sum()) or 1
        columns = torch.arange(self.tokens - min(tail, QUERY_TOKENS), self.tokens)
        seen = self.known.clone()
        seen[columns] = True
        mask = _hide(scatter_mask(self.model, columns, self.tokens, self._rows), ~seen)
        intercepts = dict.fromkeys(growing[last : last + 1], _stop)
        self._sums.clear()
        with self._recorded_attention(middle):
            self._run(columns, mask, intercepts)
        self.charged += len(columns) * last / len(growing)
        return torch.stack(self._sums).sum(0).cpu().double().numpy()

    @property
    def _rows(self) -> int:
        return self.ids.shape[0]

    @property
    def _moved(self) -> int:
        return sum(stop - start for start, stop in self.runs)

    def _growing(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if isinstance(layer, GrowingLayer)]

    def _run(
        self, columns: Tensor, mask: Any, intercepts: Mapping[int, Callable[[Tensor, Tensor], None]]
    ) -> None:
        """A forward over some columns, with a look at what some layers are about to cache."""
        device = self.layers[self._growing()[0]].device
        columns = columns.to(device)
        open_layers(self.layers, columns, self.tokens)
        for index, look in intercepts.items():
            self.layers[index].intercept = look
        try:
            self.model(
                input_ids=self.ids[:, columns.cpu()].to(device),
                position_ids=columns.expand(self._rows, -1),
                attention_mask=mask,
                past_key_values=cache_of(list(self.layers)),
                use_cache=True,
            )
        except _EnoughError:
            pass
        finally:
            close_layers(self.layers)

    @contextmanager
    def _recorded_attention(self, layers: set[int]) -> Iterator[None]:
        config: Any = self.model.config
        text_config = config.get_text_config(decoder=True)
        usual = text_config._attn_implementation

        def attend(
            module: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any,
            **options: Any,
        ) -> tuple[Tensor, None]:
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
            scaling = options.get("scaling") or query.shape[-1] ** -0.5
            scores = (query @ key.transpose(2, 3)).float() * scaling
            if attention_mask is not None:
                if attention_mask.dtype == torch.bool:
                    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
                else:
                    scores = scores + attention_mask
            weights = scores.softmax(dim=-1)
            if getattr(module, "layer_idx", None) in layers:
                self._sums.append(weights[0].sum(dim=(0, 1)))
            return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None

        AttentionInterface.register(_ATTENTION, attend)
        text_config._attn_implementation = _ATTENTION
        try:
            yield
        finally:
            text_config._attn_implementation = usual


def _stop(keys: Tensor, values: Tensor) -> None:
    raise _EnoughError


def _hide(mask: Any, hidden: Tensor) -> Any:
    """The mask without what is not in place yet."""
    if isinstance(mask, dict):
        return {kind: _hide(part, hidden) for kind, part in mask.items()}
    hidden = hidden.to(mask.device)
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
