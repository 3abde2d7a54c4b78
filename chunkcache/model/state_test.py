"""The self-test of models with recurrent and convolution states: may they be taken up again?

Each such model says for itself how it goes on from a state: some begin with none whatever the cache
holds, some compute a token by itself otherwise than in a prompt. So a prompt is compared with the
same one continued from K/V and states that went through blobs, after another prompt has been
computed with another cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from chunkcache.kv.layers import growing
from chunkcache.kv.layout import KVLayout, TensorFile, state_slots
from chunkcache.kv.rope import UNIT
from chunkcache.kv.states import (
    RECURRENT,
    keep_windows,
    put_states,
    state_layers,
    take_states,
    take_windows,
)
from chunkcache.model.check import CACHE
from chunkcache.model.rounding import MARGIN, SUMS
from chunkcache.model.self_test import (
    BOUNDS,
    SelfTest,
    cache_of,
    forward,
    growing_layers,
    layers_with,
    layout_of,
    probe_ids,
    takes,
    test_layers,
    try_test,
)

# Where a prompt is cut: a multiple of the pieces in which scans are computed; and one that is not.
CUT, UNEVEN, _TOKENS = 64, 77, 100
_STEPS = 8
_SPREAD = "the states of this model lie on several devices, which is not supported"
_STEPS_MARGIN = 3.0
_NOISY_RUNS = 2


def has_states(model: nn.Module) -> bool:
    """Whether layers of the model have states that could be kept."""
    return bool(state_layers(growing_layers(model) or []))


def run_state_test(model: nn.Module) -> SelfTest:
    """Test a model in evaluation mode. Draws no random numbers and leaves no trace in the model."""
    return try_test(model, lambda m: _compare(m) or _observe(m))


def measure_states(model: nn.Module) -> SelfTest:
    """For a model that has passed: what its layers cache, and how it computes single tokens."""
    return try_test(model, _observe)


def _compare(model: nn.Module) -> SelfTest | None:
    """A verdict if a prompt in parts is not what it is as a whole."""
    ids = probe_ids(model, _TOKENS)
    config: Any = model.config
    whole = forward(model, ids, DynamicCache(config=config))
    largest = float(whole.abs().max())
    if not math.isfinite(largest):
        return SelfTest("this model's logits are not all numbers")
    stored, prefix = test_layers(model), test_layers(model)
    mine = _run(model, ids, stored)
    _run(model, ids[:, :CUT], prefix)
    layout = layout_of(prefix)
    if not layout.states:
        return SelfTest("this model keeps its states in its modules and not in the cache")
    if _are_spread(take_states(prefix)):
        return SelfTest(_SPREAD)
    states = _through_a_blob(layout, prefix)
    if _ignores(model, ids, layout, prefix, states):
        return SelfTest(
            "this model's scan begins with no state wherever several tokens are computed"
        )
    _run(model, ids.flip(1), test_layers(model))  # nothing of it may be left behind
    behind = layers_with(model, layout, prefix, ids[:, :CUT])
    put_states(behind, layout.states, [states], growing(prefix)[0].device)
    logits = [
        _run(model, ids[:, start:stop], behind)
        for start, stop in ((CUT, UNEVEN), (UNEVEN, _TOKENS))
    ]
    rest = torch.cat(logits, 1)
    least, ceiling = BOUNDS[layout.dtype]
    bound = min(max(least, MARGIN * _noise(model, ids, whole) / largest), ceiling)
    for what, these, those in (
        ("other layers change this model's logits", mine, whole),
        ("continuing from stored states changes this model's logits", rest, whole[:, CUT:]),
        *(
            ("continuing from stored states gives other K/V:", these, those)
            for a, b in zip(growing(behind), growing(stored), strict=True)
            for these, those in ((a.keys, b.keys), (a.values, b.values))
        ),
    ):
        size = max(float(those.abs().max()), torch.finfo(torch.float32).tiny)
        error = float((these.float() - those.float()).abs().max()) / size
        if not error <= bound:
            return SelfTest(f"{what} by {error:.1e} of the largest, bound {bound:.1e}")
    return None


def _ignores(
    model: nn.Module, ids: Tensor, layout: KVLayout, prefix: Any, states: list[Tensor]
) -> bool:
    """Whether tokens behind a prefix are the same whatever its recurrent states are.

    What a state does to logits may be less than rounding; that it does nothing, rounding cannot
    hide.
    """
    if not any(f".{RECURRENT}." in shape.name for shape in layout.states):
        return False
    runs = []
    for more in (0, 1):
        changed = [
            state + more if f".{RECURRENT}." in shape.name else state
            for shape, state in zip(layout.states, states, strict=True)
        ]
        behind = layers_with(model, layout, prefix, ids[:, :CUT])
        put_states(behind, layout.states, [changed], growing(prefix)[0].device)
        runs.append(_run(model, ids[:, CUT : CUT + 2], behind))
    error = float((runs[1] - runs[0]).abs().max() / runs[0].abs().max())
    return error <= UNIT[layout.dtype]


def _run(model: nn.Module, ids: Tensor, layers: list[Any]) -> Tensor:
    """Logits of `[1, tokens]` ids behind what the layers hold, their positions given."""
    cache, more = cache_of(layers), {}
    if takes(model, "position_ids"):  # Bamba's own begin at 0 in each forward
        held = cache.get_seq_length()
        more["position_ids"] = torch.arange(held, held + ids.shape[1])[None]
    return forward(model, ids, cache, **more)


def _through_a_blob(layout: KVLayout, layers: Any) -> list[Tensor]:
    form = TensorFile.of(layout, [], 0, "", state_slots)
    return form.tensors(form.data(form.build(take_states(layers))))


def _noise(model: nn.Module, ids: Tensor, whole: Tensor) -> float:
    """How far logits are off where embeddings are by their last bits."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    config: Any = model.config
    embeds = embedding(ids.to(next(embedding.parameters()).device))
    source = torch.Generator().manual_seed(0)
    largest = 0.0
    for _ in range(_NOISY_RUNS):
        noise = (torch.rand(embeds.shape, generator=source) * 2 - 1).to(embeds.device)
        noisy = embeds * (1 + 2 * UNIT[embeds.dtype] * noise).to(embeds.dtype)
        try:
            out = model(inputs_embeds=noisy, **{CACHE: DynamicCache(config=config)})
        except Exception:  # not all take embeddings; then the least bound holds
            return 0.0
        largest = max(largest, float((out.logits - whole).abs().max()))
    return largest


def _observe(model: nn.Module) -> SelfTest:
    """The layout, and how the model treats single tokens and windows, seen on few tokens."""
    ids = probe_ids(model, CUT)
    half = CUT // 2
    whole, prefix = test_layers(model), test_layers(model)
    keep_windows(whole, [half])
    together = _run(model, ids, whole)
    _run(model, ids[:, :half], prefix)
    layout, states = layout_of(prefix), take_states(prefix)
    if _are_spread(states):
        return SelfTest(_SPREAD)
    windows = take_windows(whole, half)
    again = test_layers(model)
    _run(model, ids[:, :half], again)
    end = half + _STEPS
    alone = torch.cat([_run(model, ids[:, at : at + 1], prefix) for at in range(half, end)], 1)
    size = together.float().square().mean().sqrt()
    errors = [
        float((logits - together[:, half:end]).float().square().mean().sqrt() / size)
        for logits in (alone, _run(model, ids[:, half:end], again))
    ]
    least = max(SUMS[layout.dtype] / 10, UNIT[layout.dtype])
    return SelfTest(
        layout=layout,
        steps_differ=not errors[0] <= max(_STEPS_MARGIN * errors[1], least),
        cuts_windows=windows is not None and all(map(_is_close, windows, states)),
    )


def _are_spread(states: list[Tensor]) -> bool:
    return len({state.device for state in states}) > 1


def _is_close(window: Tensor, state: Tensor) -> bool:
    bound = BOUNDS.get(state.dtype, BOUNDS[torch.bfloat16])[0] * float(state.abs().max())
    return window.shape == state.shape and float((window - state).abs().max()) <= bound
