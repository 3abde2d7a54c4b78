"""SelfTest: may this model's K/V be taken out, put back, and continued from? It is tried.

A name or a class says little: models differ in what they cache, and some give other results when
a prompt is computed in two parts, with any cache. So each model is tested once: 32 tokens in one
pass against the same tokens continued from K/V that went through a blob, and K/V of a beginning
against those in prompts that go on otherwise, or not. The verdict is kept in the store under the
model's identity, so that the next process does not repeat the test.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from chunkcache.errors import ChunkCacheError
from chunkcache.kv.layers import (
    GrowingLayer,
    IndexedLayer,
    allocate_all,
    growing,
    row_slice,
    with_indices,
)
from chunkcache.kv.layout import KVLayout, LayerShape, TensorFile, encode
from chunkcache.kv.rope import KeyRotation
from chunkcache.kv.states import GrowingStateLayer, StateLayer, state_shapes
from chunkcache.model.check import CACHE
from chunkcache.model.compiled import is_compiled
from chunkcache.model.queries import Queries
from chunkcache.model.ranks import Ranks
from chunkcache.model.rounding import MARGIN, RoundedLayer, Steps, compare_steps, spread
from chunkcache.model.weights import DYNAMIC, LONGROPE

# Logits may be off by so much of the largest, however little a model makes of rounding, and never
# by more, however much it makes: wrong K/V are off by 10 % and more.
BOUNDS = {
    torch.float64: (1e-5, 1e-5),  # parts of many models compute in float32 all the same
    torch.float32: (1e-3, 1e-3),
    torch.float16: (4e-3, 3e-1),
    torch.bfloat16: (3e-2, 3e-1),
}
_TOKENS, _LONG = 32, 44
_BOTH = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
# A layer that uses another layer's K/V. Transformers before 5.23 leaves such layers out.
_SHARING_LAYER = getattr(cache_utils, "DummyLayer", None)
# Frequencies that change with the length of the prompt: stored keys would depend on more than
# the tokens before them.
_LENGTH_DEPENDENT_ROPE = (DYNAMIC, LONGROPE)


class NoVerdict(str):
    """Why a self-test could not run: what a later one finds is not known from that."""

    def __new__(cls, error: Exception, test: str = "the self-test") -> NoVerdict:
        """Of what a test raised."""
        return super().__new__(cls, f"{test} could not run: {type(error).__name__}: {error}"[:300])


@dataclass(frozen=True, slots=True)
class SelfTest:
    """The verdict on one model.

    `bypass_reason` is empty when the model passed; otherwise it says why the cache falls
    back to normal prefill.
    `layout` is what its layers cache, when they could be tapped. `steps_differ` tells that tokens
    computed one by one have other K/V than those of a prompt. `cuts_windows` tells that all states
    are windows of convolutions, which can be cut at any token of a forward.
    """

    bypass_reason: str = ""
    layout: KVLayout | None = None
    steps_differ: bool = False
    cuts_windows: bool = False


def growing_layers(model: nn.Module) -> list[Any] | None:
    """A layer of ours for each layer of the model that caches K/V or states, a dummy for others.

    `None` when some layer is of a kind that is not understood (compressed states).
    Sliding layers become full-length ones: their masks still apply, and a whole prompt's K/V can
    be taken out.
    """
    layers: list[Any] = []
    config: Any = model.config
    kinds: list[Any] = DynamicCache(config=config).layers
    for layer in kinds:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layers.append(GrowingLayer())
        elif type(layer) is DynamicIndexedLayer:
            layers.append(IndexedLayer())
        elif type(layer) is LinearAttentionLayer:
            layers.append(StateLayer(layer.number_of_states))
        elif type(layer) in _BOTH:
            layers.append(GrowingStateLayer(layer.number_of_states))
        elif type(layer) is _SHARING_LAYER:
            layers.append(layer)
        else:
            return None
    return layers if growing(layers) else None


def rounded_layers(
    model: nn.Module, far: Tensor, rotation: KeyRotation | None = None, keys_only: bool = False
) -> list[Any]:
    """As `growing_layers`, of a model that has some: rows of K/V that are off by their last bits.

    See `RoundedLayer` for `far`, `[batch]`. Without a rotation, all angles are exact.
    """
    layers = growing_layers(model) or []
    return [
        RoundedLayer(far, rotation.layers[index] if rotation else None, index, keys_only)
        if isinstance(layer, GrowingLayer)
        else layer
        for index, layer in enumerate(layers)
    ]


def run_self_test(model: nn.Module) -> SelfTest:
    """Test a model in evaluation mode. Draws no random numbers and leaves no trace in the model."""
    return try_test(model, _split_test)


def measure_layout(model: nn.Module) -> SelfTest:
    """For a model that has passed: what its layers cache, seen on one token."""
    return try_test(model, lambda m: SelfTest("", layout_of(_prefill(m, probe_ids(m)[:, :1])[0])))


def try_test(model: nn.Module, test: Callable[[nn.Module], SelfTest]) -> SelfTest:
    if bypass_reason := known_obstacle(model):
        return SelfTest(bypass_reason)
    try:
        with torch.no_grad():
            found = test(model)
    except ChunkCacheError as error:
        return SelfTest(f"the self-test failed: {error}")
    except Exception as error:  # a model may fail in any way on a prompt that is not its own
        return SelfTest(NoVerdict(error))
    return found


def known_obstacle(model: nn.Module) -> str:
    """Why a model cannot pass the test, as far as its configuration tells, or `""`."""
    config: Any = model.config
    text_config = config.get_text_config(decoder=True)
    if bypass_reason := Ranks.of(model).bypass_reason:
        return bypass_reason
    if growing_layers(model) is None:
        kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
        return f"cache layers of a kind that is not supported: {', '.join(sorted(kinds)) or 'none'}"
    for part in _rope_parts(getattr(text_config, "rope_parameters", None)):
        kind = part.get("rope_type", "default")
        if kind in _LENGTH_DEPENDENT_ROPE and not switches_at(model):
            return f"RoPE type {part['rope_type']!r} depends on the prompt's length"
    # LLM.int8() (https://arxiv.org/abs/2208.07339): a column of activations that has an outlier in
    # any token is computed in 16 bits for all, so K/V depend on tokens that come later.
    quantisation: Any = getattr(config, "quantization_config", None)
    if getattr(quantisation, "load_in_8bit", False) and quantisation.llm_int8_threshold > 0:
        return "8-bit weights with outliers depend on later tokens: set llm_int8_threshold=0"
    return ""


def switches_at(model: nn.Module) -> int:
    """Most tokens of a prompt before it has other RoPE frequencies, 0 where that is never so.

    So it is with longrope (https://arxiv.org/abs/2402.13753) in Transformers: all tokens of a
    forward take the longer ones if one of its positions is behind the first training's length.
    With dynamic NTK they take those of the longest forward so far, until a shorter one than the
    training's length comes; one of just that length leaves them as they are.
    """
    first = 0
    if rope_type(model) == LONGROPE:
        first = _rope_parameters(model).get("original_max_position_embeddings") or 0
    elif rope_type(model) == DYNAMIC:
        config: Any = model.config
        first = config.get_text_config(decoder=True).max_position_embeddings - 1
    return first if first >= _LONG else 0  # or the self-test has seen no shorter prompt


def rope_type(model: nn.Module) -> str:
    """Of all layers; "" where there are several, or none."""
    return str(_rope_parameters(model).get("rope_type", ""))


def _rope_parameters(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    return getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}


def _rope_parts(parameters: Any) -> list[dict[str, Any]]:
    """RoPE settings are one mapping, or one per layer type."""
    if not isinstance(parameters, dict):
        return []
    nested = [part for part in parameters.values() if isinstance(part, dict)]
    return nested or [parameters]


def _split_test(model: nn.Module) -> SelfTest:
    ids = probe_ids(model)
    config: Any = model.config
    whole = forward(model, ids, DynamicCache(config=config))
    largest = float(whole.abs().max())
    if not math.isfinite(largest):
        return SelfTest("this model's logits are not all numbers")
    half, most = ids.shape[1] // 2 - 1, ids.shape[1] - 1
    # What is stored must not depend on what comes behind it. Of two prompts of one length, all that
    # is computed for their common beginning is computed alike.
    long = torch.cat((ids[:, :most], ids[:, :half]), 1)[:, :_LONG]
    other = torch.cat((ids[:, :half], ids.flip(1)), 1)[:, :_LONG]
    stored = test_layers(model)
    reference = _run(model, long, stored)
    layout = layout_of(stored)
    rounded = cache(lambda: _run(model, long, rounded_layers(model, torch.zeros(1))))

    def compare(mine: Steps, start: int, stop: int, is_alike: bool = False) -> str:
        return compare_steps(
            mine,
            _part(reference, start, stop),
            layout.dtype,
            lambda: _part(rounded(), start, stop),
            is_alike,
        )

    @cache
    def noise() -> float:
        return MARGIN * float(spread(rounded()[-1][0], reference[-1][0])[-1]) / largest

    layers, logits = _prefill(model, other)
    if wrong := compare(_part(_steps(layers, logits), 0, half), 0, half, is_alike=True):
        return SelfTest(f"K/V of this model depend on tokens that come later: {wrong}")
    # Nor on how long the prompt was, nor on where it was taken up again.
    short = test_layers(model)
    if wrong := compare(_run(model, ids[:, :half], short), 0, half):
        return SelfTest(f"K/V of this model depend on how long the prompt is: {wrong}")
    for cut, source in ((most, stored), (half, short)):
        steps = _run(model, ids[:, cut:], layers_with(model, layout, source, ids[:, :cut]))
        rest = steps[-1][0]
        error = float((rest - whole[:, cut:]).abs().max()) / largest
        least, ceiling = BOUNDS[layout.dtype]
        if not error <= least and not error <= (bound := min(max(least, noise()), ceiling)):
            return SelfTest(
                "continuing from stored K/V changes this model's logits by "
                f"{error:.1e} of the largest, bound {bound:.1e}"
            )
        if cut < most and (wrong := compare(_part(steps, 0, most - cut), cut, most)):
            return SelfTest(f"continuing from stored K/V gives other K/V: {wrong}")
    return SelfTest("", layout)


def layers_with(
    model: nn.Module, layout: KVLayout, source: Sequence[Any], ids: Tensor
) -> list[Any]:
    """Fresh layers with what others hold of their first ids: through a blob, as a hit would."""
    cut = ids.shape[1]
    form = TensorFile.of(layout, ids[0].tolist(), 0, "")
    parts = form.views(form.data(encode(form, row_slice(source, 0, 0, cut))))
    layers = test_layers(model)
    device = next(layer.keys.device for layer in source if isinstance(layer, GrowingLayer))
    allocate_all(layers, layout, 1, cut, device)
    for layer, kv in zip(with_indices(layers), parts, strict=True):
        if kv is not None:
            layer.place(0, 0, *kv)
            layer.hold(cut)
    return layers


def _run(model: nn.Module, ids: Tensor, layers: list[Any] | None = None) -> Steps:
    """What a forward computes for `[1, tokens]` ids, behind what the layers hold."""
    layers = layers or test_layers(model)
    # What is compiled is tested as it is, and its queries are not seen.
    looking: Any = nullcontext() if is_compiled(model) else Queries(layers)
    with looking as queries:
        logits = forward(model, ids, cache_of(layers))
    return _steps(layers, logits, queries.seen if queries else {})


def _steps(layers: Sequence[Any], logits: Tensor, queries: Mapping[int, Tensor] = {}) -> Steps:
    """What a forward computed last, with queries by layer."""
    tokens = logits.shape[1]
    steps: list[tuple[Tensor, ...]] = []
    for index, layer in enumerate(layers):
        if not isinstance(layer, GrowingLayer):
            continue
        if not layer.is_initialized:
            raise ChunkCacheError("a layer that should cache K/V got none")
        new = layer.keys[:, :, -tokens:], layer.values[:, :, -tokens:]
        steps.append((*new, queries[index]) if index in queries else new)
    indices = with_indices(layers)[len(layers) :]
    steps += [(layer.keys[:, :, -tokens:],) for layer in indices if layer.is_initialized]
    return [*steps, (logits,)]


def _part(steps: Steps, start: int, stop: int) -> Steps:
    """Of some of its tokens only."""
    return [tuple(x[..., start:stop, :] for x in step) for step in steps]


def zeros_matter(model: nn.Module, name: str) -> bool | None:
    """Whether token type ids that are all zero, given by that name, may change K/V.

    `None` if that could not be tried, for whatever reason. Compared with giving none, in two parts.
    Some models add an embedding for type 0, which K/V of the first layer show to the bit; others
    mask by type, which those of later layers show.
    """
    ids = probe_ids(model)
    runs = []
    try:
        for more in ({}, {name: torch.zeros_like(ids[:, : _TOKENS // 2])}):
            layers = test_layers(model)
            with torch.no_grad():
                logits = [
                    forward(model, part, cache_of(layers), **more) for part in ids.chunk(2, 1)
                ]
            first = next(layer for layer in layers if isinstance(layer, GrowingLayer))
            runs.append((first.keys, first.values, torch.cat(logits, 1)))
    except Exception:  # a model may refuse them in any way
        return None
    (keys, values, logits_without), (keys_with, values_with, logits_with) = runs
    error = float((logits_with - logits_without).abs().max() / logits_without.abs().max())
    is_first_the_same = torch.equal(keys, keys_with) and torch.equal(values, values_with)
    return not (is_first_the_same and error <= BOUNDS.get(keys.dtype, (0.0, 0.0))[0])


def _prefill(model: nn.Module, ids: Tensor) -> tuple[list[Any], Tensor]:
    """Layers filled with the K/V of a prompt, and its logits."""
    layers = test_layers(model)
    return layers, forward(model, ids, cache_of(layers))


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has a parameter of that name."""
    return name in inspect.signature(model.forward).parameters


def forward(model: nn.Module, ids: Tensor, cache: DynamicCache, **more: Any) -> Tensor:
    """Logits of `[batch, tokens]` ids, computed where the model's embeddings are."""
    logits: Tensor = outputs(model, ids, cache, **more).logits
    return logits


def outputs(model: nn.Module, ids: Tensor, cache: DynamicCache, **more: Any) -> Any:
    """The same with all that the forward returns."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = next(embedding.parameters()).device
    if device.type == "meta":  # offloaded: accelerate brings inputs to where weights will be
        device = ids.device
    placed = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in more.items()
    }
    placed[CACHE] = cache
    return model(input_ids=ids.to(device), use_cache=True, **placed)


def cache_of(layers: list[Any]) -> DynamicCache:
    """A plain cache, which our hook ignores, around layers of ours."""
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = layers, None
    return cache


def test_layers(model: nn.Module) -> list[Any]:
    layers = growing_layers(model)
    assert layers is not None
    return layers


def layout_of(layers: Sequence[Any]) -> KVLayout:
    shapes: list[LayerShape | None] = []
    dtypes = set()
    for number, layer in enumerate(with_indices(layers)):
        is_unused = number >= len(layers) and not layer.is_initialized  # another's index keys
        if not isinstance(layer, GrowingLayer) or is_unused:
            shapes.append(None)
            continue
        if not layer.is_initialized:
            raise ChunkCacheError("a layer that should cache K/V got none")
        k, v = layer.keys, layer.values
        shapes.append(LayerShape(k.shape[1], k.shape[3], v.shape[1], v.shape[3]))
        dtypes |= {k.dtype, v.dtype}
    if len(dtypes) != 1:
        raise ChunkCacheError(f"layers cache K/V of several types: {sorted(map(str, dtypes))}")
    if not dtypes <= set(BOUNDS):
        raise ChunkCacheError(f"K/V of type {dtypes.pop()} are not supported")
    return KVLayout(dtypes.pop(), tuple(shapes), state_shapes(layers))


def probe_ids(model: nn.Module, count: int = _TOKENS) -> Tensor:
    """`[1, count]` ids spread over the vocabulary, without those that mean something special."""
    config: Any = model.config
    text_config = config.get_text_config(decoder=True)
    special: set[int] = set()
    for part in (config, text_config):
        for name, value in part.to_dict().items():
            if name.endswith(("token_id", "token_index")):
                special |= {
                    v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)
                }
    vocabulary = int(text_config.vocab_size)
    ids = [i for i in range(vocabulary) if i not in special] if vocabulary < 4096 else []
    if not ids:
        ids = [i for i in range(10, vocabulary, vocabulary // 2048) if i not in special]
    # A fixed pattern with a step prime to most lengths: no generator, so no effect on sampling.
    return torch.tensor([[ids[(7 + 613 * i) % len(ids)] for i in range(count)]])
