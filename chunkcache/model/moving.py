"""May this model's K/V be moved? Its rotation is derived, and proven down to the logits.

Three tests, on at most 24 tokens each. *Lone token*: alone in the cache, a token's keys depend on
itself and its position only, which shows the rule. That is not enough (some models scale queries
with the position): a *far shift* of a dozen tokens must turn all keys by the rule and leave the
logits as they are. *Scatter*: some tokens computed last, into the middle, must give what one
pass gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.kv.codec import KVLayout, LayerKV
from chunkcache.kv.layers import GrowingLayer, settle_all
from chunkcache.kv.rope import ROUNDINGS, UNIT, KeyMover, find_rules
from chunkcache.model.check import CACHE
from chunkcache.model.proof import (
    cache_of,
    forward,
    growing_layers,
    probe_ids,
    rounded_layers,
    takes,
)
from chunkcache.model.ranks import Ranks
from chunkcache.model.rounding import MARGIN, judge, spread
from chunkcache.model.scatter import MASKED_ATTENTION, close_layers, open_layers, scatter_mask

_LONE_POSITIONS = (1, 17, 480)
_SHIFTED_TOKENS = 12
_NEAR_SHIFT = 37
_PARTS = ("keys", "values")
_SCATTERED = (2, 3, 7, 11, 12, 18, 21, 23)
_SCATTER_TOKENS = 24


def find_rotation(model: nn.Module) -> KeyMover | None:
    """The rule by which a model's keys turn with their position; `None` if it is not known.

    Good for turning keys and turning them back, which needs no proof. For models that passed
    `proof.prove`.
    """
    try:
        with torch.no_grad():
            found = _lone_token_test(model) if takes(model, "position_ids") else ""
    except Exception:  # a model may fail in any way on positions that are not its own
        return None
    return None if isinstance(found, str) else found


def prove_moving(model: nn.Module, layout: KVLayout, proven: bool = False) -> KeyMover | str:
    """The model's proven mover, or why there is none. For models that passed `proof.prove`.

    Of a model that is `proven` to be movable, only the rule is found.
    """
    if obstacle := _known_obstacle(model):
        return obstacle
    try:
        with torch.no_grad():
            found = _lone_token_test(model)
            if proven or isinstance(found, str):
                return found
            far = _longest(model) - _SHIFTED_TOKENS - 1
            if far <= 0:
                return "the model has too few positions to move anything"
            shifts = (0, min(_NEAR_SHIFT, far), far)
            noise = _Noise(model, found, shifts)
            return (
                _far_shift_test(model, found, noise, shifts)
                or _scatter_test(model, layout, noise)
                or found
            )
    except Exception as error:  # a model may fail in any way on positions that are not its own
        return f"the self-test for moving could not run: {type(error).__name__}: {error}"[:300]


def _known_obstacle(model: nn.Module) -> str:
    config: Any = model.config
    text_config = config.get_text_config(decoder=True)
    if Ranks.of(model).size > 1:
        return "the model is shared by several processes (tensor parallel)"
    if not takes(model, "position_ids"):
        return "the model takes no position_ids, so its positions cannot be set"
    if text_config._attn_implementation not in MASKED_ATTENTION:
        return (
            f"attention {text_config._attn_implementation!r} takes no mask: load the model with "
            "attn_implementation='sdpa'"
        )
    if getattr(text_config, "floor_scale", None) and getattr(
        text_config, "attn_temperature_tuning", False
    ):
        return "the model scales queries by the length of its cache (attn_temperature_tuning)"
    return ""


def _lone_token_test(model: nn.Module) -> KeyMover | str:
    longest = _longest(model)
    ids = probe_ids(model)[0, :3, None]

    def at(position: int, layers: list[Any] | None = None) -> Sequence[LayerKV | None]:
        return _run(model, ids, torch.tensor([[position]]), layers)[0]

    positions = [p for p in _LONE_POSITIONS if p < longest]
    positions += sorted({longest // 8, longest - 1} - {*positions, 0})
    # Each on its own: so all are computed alike, and differ by their positions only.
    at_zero, moved = at(0), {p: at(p) for p in positions}
    found = find_rules(model, at_zero, moved, [(0.0, 0.0)] * len(at_zero))
    if isinstance(found, str):
        # Attention to one token gives its values, whatever its score; but there are sinks.
        rounded = at(0, rounded_layers(model, torch.zeros(1)))
        noises = [
            (_sink_noise(off[0], kv[0]), _sink_noise(off[1], kv[1])) if kv and off else (0.0, 0.0)
            for kv, off in zip(at_zero, rounded, strict=True)
        ]
        found = find_rules(model, at_zero, moved, noises)
    return found


def _sink_noise(rounded: Tensor, plain: Tensor) -> float:
    """What one token makes of rounding, or less: some models give other numbers each time."""
    most = 4 * ROUNDINGS * UNIT[plain.dtype] * float(plain.abs().max())
    return min(MARGIN * spread(rounded, plain)[-1].item(), most)


class _Noise:
    """How far rounding alone takes keys, values and logits. Measured once, if at all.

    Rows are as many positions further on as `shifts` tell; of each, and those before it.
    """

    def __init__(self, model: nn.Module, mover: KeyMover, shifts: Sequence[int]) -> None:
        self._model, self._mover, self._shifts = model, mover, shifts

    @cached_property
    def _rounded(self) -> tuple[Sequence[LayerKV | None], Tensor]:
        ids, positions = _probe(self._model, _SCATTER_TOKENS)
        far = torch.tensor(self._shifts).float()
        layers = rounded_layers(self._model, far, self._mover)
        return _run(self._model, ids, positions.expand(len(far), -1), layers)

    def of_kv(self, layer: int, part: int, plain: Tensor, row: int) -> Tensor:
        """In keys (part 0) or values (part 1), `[1, heads, tokens, dim]` of the first tokens."""
        kv = self._rounded[0][layer]
        assert kv is not None
        return spread(kv[part][:, :, : plain.shape[2]], plain)[row]

    def of_logits(self, plain: Tensor, row: int) -> Tensor:
        """In logits, `[1, tokens, vocabulary]` of the first tokens."""
        return spread(self._rounded[1][:, : plain.shape[1]], plain)[row]


def _far_shift_test(model: nn.Module, mover: KeyMover, noise: _Noise, shifts: Sequence[int]) -> str:
    ids, near = _probe(model, _SHIFTED_TOKENS)
    there, logits = _run(model, ids, near + torch.tensor(shifts)[:, None])
    for row, shift in enumerate(shifts):
        for index, kv in enumerate(there):
            rule = mover.layers[index]
            if kv is None or rule is None:
                continue
            start = kv[0][:1], kv[1][:1]
            old, new = (near[0].to(kv[0].device) + by for by in (0, shift))
            turned = mover.move(start, index, old, new)
            for part, rotation in enumerate((rule.keys, rule.values)):
                if wrong := judge(
                    turned[part],
                    kv[part][row : row + 1],
                    partial(noise.of_kv, index, part, start[part], row),
                    rotation.slack(turned[part], new) if rotation else None,
                ):
                    return (
                        f"layer {index}: {_PARTS[part]} of several tokens do not turn like those "
                        f"of one: {shift} positions further on, they {wrong}"
                    )
        mine, its = logits[:1], logits[row : row + 1]
        if wrong := judge(mine, its, partial(noise.of_logits, mine, row)):
            return (
                "the model's output depends on absolute positions, not on its keys alone: "
                f"{shift} positions further on, logits {wrong}"
            )
    return ""


def _scatter_test(model: nn.Module, layout: KVLayout, noise: _Noise) -> str:
    ids, positions = _probe(model, _SCATTER_TOKENS)
    whole, logits = _run(model, ids, positions)
    columns = torch.tensor(_SCATTERED, device=logits.device)
    layers = growing_layers(model) or []
    settle_all(layers, layout, 1, _SCATTER_TOKENS, logits.device)
    for layer, kv in zip(layers, whole, strict=True):
        if kv is not None:
            layer.place(0, 0, kv[0][0], kv[1][0])
            layer.hold(_SCATTER_TOKENS)
            layer.keys[:, :, _SCATTERED] = layer.values[:, :, _SCATTERED] = 7.0
    open_layers(layers, columns, _SCATTER_TOKENS)
    out: Any = model(
        input_ids=ids[:, _SCATTERED].to(logits.device),
        position_ids=columns[None],
        attention_mask=scatter_mask(model, columns, _SCATTER_TOKENS, 1),
        use_cache=True,
        **{CACHE: cache_of(layers)},
    )
    close_layers(layers)
    for index, (layer, kv) in enumerate(zip(layers, whole, strict=True)):
        if kv is None:
            continue
        for part, mine in enumerate((layer.keys, layer.values)):
            if wrong := judge(mine, kv[part], partial(noise.of_kv, index, part, kv[part], 0)):
                return (
                    f"layer {index}: {_PARTS[part]} computed into the middle of a prompt {wrong}, "
                    "against one pass"
                )
    if wrong := judge(out.logits, logits[:, _SCATTERED], partial(noise.of_logits, logits, 0)):
        return f"logits of tokens computed into the middle of a prompt {wrong}, against one pass"
    return ""


def _probe(model: nn.Module, tokens: int) -> tuple[Tensor, Tensor]:
    """Ids of that many tokens, and positions from 0 on, `[1, tokens]` each."""
    return probe_ids(model)[:, :tokens], torch.arange(tokens)[None]


def _run(
    model: nn.Module, ids: Tensor, positions: Tensor, layers: list[Any] | None = None
) -> tuple[Sequence[LayerKV | None], Tensor]:
    """What every layer caches for `[batch, tokens]` ids at these positions, and the logits.

    One row of ids stands for as many as there are of positions, and the other way round.
    """
    layers = layers or growing_layers(model) or []
    rows = max(len(ids), len(positions))
    ids, positions = ids.expand(rows, -1), positions.expand(rows, -1)
    logits = forward(model, ids, cache_of(layers), position_ids=positions)
    kv = [(la.keys, la.values) if isinstance(la, GrowingLayer) else None for la in layers]
    return kv, logits


def _longest(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config(decoder=True).max_position_embeddings)
