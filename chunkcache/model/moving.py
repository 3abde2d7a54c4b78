"""May this model's K/V be moved? Its rotation is derived, and verified down to the logits.

Three tests, on at most 18 tokens each. *Lone token*: alone in the cache, a token's keys depend on
itself and its position only, which shows the rule, to the last bits. Its queries must turn by the
same rule (some models scale them with the position) and its logits must stay as they are. *Far
shift*: so it must be of a dozen tokens together. *Scatter*: some tokens computed last, into the
middle, must give what one pass gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.kv.layers import GrowingLayer, IndexedLayer, allocate_all
from chunkcache.kv.layout import KVLayout, LayerKV
from chunkcache.kv.rope import ROUNDINGS, UNIT, KeyRotation, find_misfit, find_rules
from chunkcache.kv.states import state_layers
from chunkcache.model.check import CACHE
from chunkcache.model.compiled import uncompiled
from chunkcache.model.queries import Queries
from chunkcache.model.ranks import Ranks
from chunkcache.model.rounding import MARGIN, PARTS, SUMS, judge, spread
from chunkcache.model.scatter import MASKED_ATTENTION, close_layers, open_layers, scatter_mask
from chunkcache.model.self_test import (
    NoVerdict,
    cache_of,
    forward,
    growing_layers,
    probe_ids,
    rope_type,
    rounded_layers,
    switches_at,
    takes,
)

_TEST = "the self-test for moving"
_NO_POSITIONS = "the model takes no position_ids, so its positions cannot be set"
_LONE_POSITION = 480
_SHIFTED_TOKENS = 12
_NEAR_SHIFT = 37
_ROUNDED_COPIES = 4
_LoneRun = tuple[Sequence[LayerKV | None], dict[int, Tensor], Tensor]  # K/V, queries, logits
_SCATTERED = (2, 3, 7, 11, 12, 16, 17)
_SCATTER_TOKENS = 18


def find_rotation(model: nn.Module) -> KeyRotation | str:
    """The rule by which a model's keys turn with their position, or why it is not known.

    Good for turning keys and turning them back, which needs no test. For models that passed
    `self_test.run_self_test`.
    """
    if not takes(model, "position_ids"):
        return _NO_POSITIONS
    try:
        with torch.no_grad():
            found = _Lone(model).rules()
        if isinstance(found, str):
            return found
        index_keys = sum(isinstance(layer, IndexedLayer) for layer in growing_layers(model) or [])
        return replace(found, layers=(*found.layers, *[None] * index_keys))
    except Exception as error:  # a model may fail in any way on positions that are not its own
        return NoVerdict(error, _TEST)


def verify_rotation(model: nn.Module, layout: KVLayout, passed: bool = False) -> KeyRotation | str:
    """The model's verified rotation, or why there is none. For models that passed the self-test.

    Of a model that has `passed` the test before, only the rule is found.
    """
    if bypass_reason := _known_reason(model):
        return bypass_reason
    try:
        with torch.no_grad():
            lone = _Lone(model)
            found = lone.rules()
            if passed or isinstance(found, str):
                return found
            far = _longest(model) - _SHIFTED_TOKENS - 1
            if far <= 0:
                return "the model has too few positions to move anything"
            shifts = (0, min(_NEAR_SHIFT, far), far)
            noise = _Noise(model, found, far)
            return (
                lone.misfit(found)
                or _far_shift_test(model, found, noise, shifts)
                or _scatter_test(model, layout, noise)
                or found
            )
    except Exception as error:  # a model may fail in any way on positions that are not its own
        return NoVerdict(error, _TEST)


def _known_reason(model: nn.Module) -> str:
    config: Any = model.config
    text_config = config.get_text_config(decoder=True)
    if Ranks.of(model).size > 1:
        return "the model is shared by several processes (tensor parallel)"
    if not takes(model, "position_ids"):
        return _NO_POSITIONS
    if switches_at(model):
        return f"RoPE type {rope_type(model)!r} depends on the prompt's length"
    layers = growing_layers(model) or []
    if state_layers(layers):
        return "a recurrent state is of all tokens before it, wherever they are moved to"
    if any(isinstance(layer, IndexedLayer) for layer in layers):
        return "the keys of indexed attention choose by position, which moving them would change"
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


class _Lone:
    """A few tokens, each alone in its cache, computed at some positions.

    Attention to one token gives its values, whatever its score. So all of them are computed alike
    and differ by their positions only, to the last bit, but for what turns with them.
    """

    def __init__(self, model: nn.Module) -> None:
        longest = _longest(model)
        positions = {min(_LONE_POSITION, longest - 1), longest // 8, longest - 1}
        self._model = uncompiled(model)  # to see its queries
        self._ids = probe_ids(model)[0, :2, None]
        self._runs = {p: self._run(p) for p in (0, *sorted(positions - {0}))}

    def _run(self, position: int, layers: list[Any] | None = None, copies: int = 1) -> _LoneRun:
        layers, ids = layers or growing_layers(self._model) or [], self._ids.repeat(copies, 1)
        with (queries := Queries(layers)):
            kv, logits = _run(self._model, ids, torch.tensor([[position]]), layers)
        return kv, queries.seen, logits

    @cached_property
    def _copies(self) -> tuple[_LoneRun, _LoneRun]:
        """Several copies at position 0, with keys that are off by their last bits, and without.

        Which changes nothing unless there are sinks: keys decide how much a token attends to these.
        """
        layers = rounded_layers(self._model, torch.zeros(1), keys_only=True)
        return self._run(0, layers, _ROUNDED_COPIES), self._run(0, None, _ROUNDED_COPIES)

    def _noise_of(self, layer: int, part: int) -> float:
        """What sinks make of rounding in a layer's keys, values or queries (part 2).

        Or less: some models draw random numbers.
        """
        (kv, queries, _), (plain_kv, plain_queries, _) = self._copies
        there, here = kv[layer], plain_kv[layer]
        assert there is not None
        assert here is not None
        dtype = here[0].dtype
        rounded = there[part] if part < 2 else queries[layer]
        plain = here[part] if part < 2 else plain_queries[layer]
        first = next(index for index, kv in enumerate(self._runs[0][0]) if kv)
        if layer == first or torch.equal(*(run[2] for run in self._copies)):
            return 0.0
        unit, largest = ROUNDINGS * UNIT[dtype], float(plain.abs().max())
        noise = max(MARGIN * float(spread(rounded, plain)[-1]), unit * largest)
        return min(noise, max(8 * unit, SUMS[dtype]) * largest)

    def rules(self) -> KeyRotation | str:
        """How keys and values turn, or why that is not known."""
        at_zero, moved = self._runs[0][0], {p: run[0] for p, run in self._runs.items() if p}
        found = find_rules(self._model, at_zero, moved, [(0.0, 0.0)] * len(at_zero))
        if isinstance(found, str):  # there are sinks, maybe
            noises = [
                (self._noise_of(index, 0), self._noise_of(index, 1)) if kv else (0.0, 0.0)
                for index, kv in enumerate(at_zero)
            ]
            found = find_rules(self._model, at_zero, moved, noises)
        return found

    def misfit(self, rotation: KeyRotation) -> str:
        """What besides keys and values knows its position, or `""`."""
        kv, queries, logits = self._runs[0]
        for index, query in queries.items():
            rule, part = rotation.layers[index], kv[index]
            if rule is None or part is None:
                continue
            samples = {p: run[1][index] for p, run in self._runs.items() if p}
            fit = partial(find_misfit, rule, query, samples, part[0].dtype)
            if fit(0.0) and (wrong := fit(self._noise_of(index, 2))):
                return f"layer {index}: its queries do not turn as its keys do ({wrong})"
        for position, run in self._runs.items():
            if wrong := judge(run[2], logits, self._noise_of_logits):
                return (
                    "the model's output depends on absolute positions, not on its keys alone: "
                    f"{position} positions further on, logits of single tokens {wrong}"
                )
        return ""

    def _noise_of_logits(self) -> Tensor:
        return spread(*(run[2] for run in self._copies))[-1]


class _Noise:
    """How far rounding alone takes keys, values and logits. Measured once, if at all.

    Of tokens where they are, and `far` positions further on, or not so far.
    """

    def __init__(self, model: nn.Module, rotation: KeyRotation, far: int) -> None:
        self._model, self._rotation, self._far = model, rotation, far

    @cached_property
    def _rounded(self) -> tuple[Sequence[LayerKV | None], Tensor]:
        ids, positions = _probe(self._model, _SCATTER_TOKENS)
        layers = rounded_layers(self._model, torch.tensor([0.0, self._far]), self._rotation)
        return _run(self._model, ids, positions.expand(2, -1), layers)

    def of_kv(self, layer: int, part: int, plain: Tensor, shift: int) -> Tensor:
        """In keys (part 0) or values (part 1), `[1, heads, tokens, dim]` of the first tokens."""
        kv = self._rounded[0][layer]
        assert kv is not None
        return self._at(spread(kv[part][:, :, : plain.shape[2]], plain), shift)

    def of_logits(self, plain: Tensor, shift: int) -> Tensor:
        """In logits, `[1, tokens, vocabulary]` of the first tokens."""
        return self._at(spread(self._rounded[1][:, : plain.shape[1]], plain), shift)

    def _at(self, spreads: Tensor, shift: int) -> Tensor:
        return spreads[int(shift > _NEAR_SHIFT)]


def _far_shift_test(
    model: nn.Module, rotation: KeyRotation, noise: _Noise, shifts: Sequence[int]
) -> str:
    ids, near = _probe(model, _SHIFTED_TOKENS)
    there, logits = _run(model, ids, near + torch.tensor(shifts)[:, None])
    for row, shift in enumerate(shifts):
        for index, kv in enumerate(there):
            rule = rotation.layers[index]
            if kv is None or rule is None:
                continue
            start = kv[0][:1], kv[1][:1]
            old, new = (near[0].to(kv[0].device) + by for by in (0, shift))
            turned = rotation.move(start, index, old, new)
            for part, turn in enumerate((rule.keys, rule.values)):
                if wrong := judge(
                    turned[part],
                    kv[part][row : row + 1],
                    partial(noise.of_kv, index, part, start[part], shift),
                    turn.slack(turned[part], new, turned[part].dtype) if turn else None,
                    few_may_differ=True,
                ):
                    return (
                        f"layer {index}: {PARTS[part]} of several tokens do not turn like those "
                        f"of one: {shift} positions further on, they {wrong}"
                    )
        mine, its = logits[:1], logits[row : row + 1]
        if wrong := judge(mine, its, partial(noise.of_logits, mine, shift), few_may_differ=True):
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
    allocate_all(layers, layout, 1, _SCATTER_TOKENS, logits.device)
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
                    f"layer {index}: {PARTS[part]} computed into the middle of a prompt {wrong}, "
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
