"""Probes: passes through a few layers that tell a repair strategy where the errors are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from chunkcache.kv.layers import GrowingLayer
from chunkcache.model.check import CACHE
from chunkcache.model.proof import cache_of
from chunkcache.model.scatter import close_layers, open_layers, scatter_mask
from chunkcache.repair import Scores

# Whose attention is looked at, and where: the last tokens of the prompt, in the layers between
# these shares of the depth. Chosen on documents that no reported figure comes from.
QUERY_TOKENS = 12
QUERY_LAYERS = (0.5, 0.8)
_ATTENTION = "chunkcache_query_probe"


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
        columns = torch.arange(self.start, self.tokens)
        scores = np.zeros(self.tokens)

        def compare(keys: Tensor, values: Tensor) -> None:
            stored = layer.values[:, :, self.start :].float()
            distance = (values.float() - stored).pow(2).sum(dim=(0, 1, 3)).sqrt()
            scores[self.start :] = distance.cpu().double().numpy()
            raise _EnoughError

        self._run(columns, scatter_mask(self.model, columns, self.tokens, 1), {second: compare})
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
        columns = torch.arange(self.tokens - min(tail, QUERY_TOKENS), self.tokens)
        self.charged += len(columns) * (growing.index(looked_at[-1]) + 1) / len(growing)
        return self.attention(columns, looked_at).sum(0).double().numpy()

    def attention(self, columns: Tensor, layers: Sequence[int]) -> Tensor:
        """What tokens get from those at `columns`, `[layers, tokens]`, summed over heads.

        The model runs up to the last of the layers asked for, over these columns alone.
        """
        seen = self.known.clone()
        seen[columns] = True
        mask = _hide(scatter_mask(self.model, columns, self.tokens, 1), ~seen)
        behind = [index for index in self._growing() if index > max(layers)]
        with self._recorded_attention(set(layers)) as sums:
            self._run(columns, mask, dict.fromkeys(behind[:1], _stop))
        return torch.stack(sums).cpu()

    @property
    def _moved(self) -> int:
        return sum(stop - start for start, stop in self.runs)

    def _sees_all(self, index: int) -> bool:
        """Whether a layer's attention has no window."""
        config: Any = self.model.config
        kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
        return not kinds or kinds[index] == "full_attention"

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
                position_ids=columns[None],
                attention_mask=mask,
                use_cache=True,
                **{CACHE: cache_of(list(self.layers))},
            )
        except _EnoughError:
            pass
        finally:
            close_layers(self.layers)

    @contextmanager
    def _recorded_attention(self, layers: set[int]) -> Iterator[list[Tensor]]:
        """Attention, and a list that takes what each of these layers pays to every token."""
        # The registry keeps what it was given: nothing that holds a prompt's K/V.
        sums: list[Tensor] = []
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
            # Query heads that share a key head go together: [batch, kv_heads, group, queries, dim]
            batch, heads, queries, dim = query.shape
            grouped = query.reshape(batch, key.shape[1], -1, queries, dim)
            scaling = options.get("scaling") or query.shape[-1] ** -0.5
            folded = grouped.flatten(2, 3) @ key.transpose(2, 3)
            scores = folded.view(*grouped.shape[:4], -1).float() * scaling
            if attention_mask is not None:
                seen = attention_mask[:, :, None]
                if seen.dtype == torch.bool:
                    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
                else:
                    scores = scores + seen
            weights = scores.softmax(dim=-1)
            if getattr(module, "layer_idx", None) in layers:
                sums.append(weights[0].sum(dim=(0, 1, 2)))
            out = weights.to(value.dtype).flatten(2, 3) @ value
            return out.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous(), None

        AttentionInterface.register(_ATTENTION, attend)
        text_config._attn_implementation = _ATTENTION
        try:
            yield sums
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
