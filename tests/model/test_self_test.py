from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from chunkcache.kv.layers import GrowingLayer
from chunkcache.kv.layout import KVLayout, LayerShape
from chunkcache.model.self_test import growing_layers, measure_layout, run_self_test
from tests.models import VOCABULARY, tiny, tokens

ACCEPTED = [
    "bloom",
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gpt_neox_japanese",  # scores without a product of two tensors of four dimensions
    "gpt_oss",
    "gptj",
    "llama",
    "mistral",
    "mixtral",
    "opt",
    "phi",
    "qwen2",
    "qwen3_moe",
]


@pytest.mark.parametrize("model_type", ACCEPTED)
def test_accepted(model_type: str) -> None:
    model = tiny(model_type)
    proof = run_self_test(model)
    assert proof.bypass_reason == ""
    assert proof.layout is not None
    assert proof.layout.dtype == torch.float32
    assert len(proof.layout.layers) == 4
    # The layout is what the model caches in truth.
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens(3), past_key_values=cache)
    for shape, layer in zip(proof.layout.layers, cache.layers, strict=True):
        assert shape is not None
        assert (shape.key_heads, shape.key_dim) == (layer.keys.shape[1], layer.keys.shape[3])
        assert (shape.value_heads, shape.value_dim) == (
            layer.values.shape[1],
            layer.values.shape[3],
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_accepted_in_other_types(dtype: torch.dtype) -> None:
    proof = run_self_test(tiny("llama", dtype=dtype))
    assert proof.bypass_reason == ""
    assert proof.layout is not None
    assert proof.layout.dtype == dtype


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {
        "rope_type": rope_type,
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 128,
        "factor": 4.0,
        **parameters,
    }


def test_rope_of_a_fixed_kind_is_accepted() -> None:
    for parameters in (rope("linear"), rope("yarn")):
        assert run_self_test(tiny("llama", rope_parameters=parameters)).bypass_reason == ""


@pytest.mark.parametrize(
    "parameters",
    [
        rope("dynamic"),
        rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8)
        | {"original_max_position_embeddings": 32},
    ],
    ids=["dynamic", "longrope"],
)
def test_rope_that_depends_on_the_length_is_an_obstacle(parameters: dict[str, Any]) -> None:
    """Where it changes too early for the self-test to be on one side of that."""
    model = tiny("llama", rope_parameters=parameters, max_position_embeddings=40)
    proof = run_self_test(model)
    assert f"RoPE type {parameters['rope_type']!r}" in proof.bypass_reason


def test_rope_of_one_kind_of_layer_is_looked_at_too() -> None:
    parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": rope("dynamic"),
    }
    assert (
        "'dynamic'" in run_self_test(tiny("gemma3_text", rope_parameters=parameters)).bypass_reason
    )


def test_layers_without_any_kv_are_an_obstacle() -> None:
    model = tiny("mamba")
    proof = run_self_test(model)
    assert "kind that is not supported" in proof.bypass_reason
    assert "LinearAttention" in proof.bypass_reason
    assert growing_layers(model) is None


def test_sliding_layers_become_whole_ones() -> None:
    layers = growing_layers(tiny("gemma3_text"))
    assert layers is not None
    assert [type(layer) for layer in layers] == [GrowingLayer] * 4


def test_layers_that_look_ahead_are_an_obstacle() -> None:
    # K/V of a token would depend on those behind it, and its chunk is named by those before it.
    assert run_self_test(tiny("gemma3_text", use_bidirectional_attention=True)).bypass_reason


# ------------------------------------------------------------------------ models that do wrong


def counts_its_calls(model: PreTrainedModel) -> None:
    layer = model.model.layers[0]
    forward = layer.forward
    calls = []

    def counting(x: torch.Tensor, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(x * len(calls), **kwargs)

    layer.forward = counting


def gives_no_numbers(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))


def fails(model: PreTrainedModel) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise KeyError("no such expert")

    model.model.layers[3].forward = forward


def skips_a_layer(model: PreTrainedModel) -> None:
    model.model.layers[3].forward = lambda x, **_: x


def caches_two_types(model: PreTrainedModel) -> None:
    projection = model.model.layers[2].self_attn.v_proj
    forward = projection.forward
    projection.forward = lambda x: forward(x).double()


BROKEN: list[tuple[Callable[[PreTrainedModel], None], str]] = [
    (counts_its_calls, "changes this model's logits"),
    (gives_no_numbers, "not all numbers"),
    (fails, "could not run: KeyError"),
    (skips_a_layer, "got none"),
    (caches_two_types, "self-test"),
]


@pytest.mark.parametrize(("spoil", "why"), BROKEN, ids=[f.__name__ for f, _ in BROKEN])
def test_a_broken_model_is_refused(spoil: Callable[[PreTrainedModel], None], why: str) -> None:
    model = tiny("llama")
    spoil(model)
    proof = run_self_test(model)
    assert why in proof.bypass_reason
    assert proof.layout is None


# ------------------------------------------------------------------------ in each type


def layer(index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    """What a layer computes from is changed."""

    def spoil(model: Any) -> None:
        forward = model.model.layers[index].forward
        model.model.layers[index].forward = lambda x, **kwargs: forward(change(x), **kwargs)

    return spoil


def attention(change: Callable[[Any, int, int, dict[str, Any]], None]) -> Callable[[Any], None]:
    """Attention's arguments are changed: told of it, how many tokens were before and are in all."""

    def spoil(model: Any) -> None:
        for block in model.model.layers:
            module = block.self_attn

            def attend(module: Any = module, plain: Any = module.forward, **kwargs: Any) -> Any:
                past = kwargs["past_key_values"].get_seq_length(module.layer_idx)
                scaling = module.scaling
                change(module, past, past + kwargs["hidden_states"].shape[1], kwargs)
                try:
                    return plain(**kwargs)
                finally:
                    module.scaling = scaling

            module.forward = attend

    return spoil


def scale_by_length(module: Any, past: int, total: int, kwargs: dict[str, Any]) -> None:
    module.scaling *= math.log(max(total, 2)) / math.log(16)


def factor_of_many(module: Any, past: int, total: int, kwargs: dict[str, Any]) -> None:
    cos, sin = kwargs["position_embeddings"]
    if total - past >= 16:
        kwargs["position_embeddings"] = cos * 1.1386, sin * 1.1386


def window(off: int) -> Callable[[Any, int, int, dict[str, Any]], None]:
    def narrow(module: Any, past: int, total: int, kwargs: dict[str, Any]) -> None:
        device = next(module.parameters()).device
        queries = torch.arange(past, total, device=device)[:, None]
        keys = torch.arange(total, device=device)
        seen = (keys <= queries) & (keys > queries - 8 - (off if past else 0))
        kwargs["attention_mask"] = seen[None, None]

    return narrow


def positions(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def spoil(model: Any) -> None:
        plain = model.model.rotary_emb.forward
        model.model.rotary_emb.forward = lambda x, position_ids: plain(x, change(position_ids))

    return spoil


def following(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x[:, 1:], x[:, -1:]), 1)


WRONG: dict[str, Callable[[Any], None]] = {
    "next token": layer(1, lambda x: x + following(x)),
    "a little of the next token": layer(2, lambda x: x + 0.1 * following(x)),
    "next token in the last layer": layer(3, lambda x: x + 0.1 * following(x)),
    "last token": layer(2, lambda x: x + 0.1 * x[:, -1:]),
    "mean over tokens": layer(2, lambda x: x - x.mean(1, keepdim=True)),
    "length": layer(1, lambda x: x * (1 + x.shape[1] / 32)),
    "length in attention": attention(scale_by_length),
    "attention factor": attention(factor_of_many),
    "window + 1": attention(window(1)),
    "window - 1": attention(window(-1)),
    "position + 1": positions(lambda p: p + (p[:, :1] > 0)),
    "positions from 0 again": positions(lambda p: p - p[:, :1]),
}
in_each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


@pytest.mark.parametrize("wrong", WRONG)
@in_each_dtype
def test_what_depends_on_later_tokens_or_on_the_length_is_refused(
    wrong: str, dtype: torch.dtype
) -> None:
    for scale in (0.1, 0.3):
        model = tiny("llama", dtype=dtype, initializer_range=scale)
        WRONG[wrong](model)
        proof = run_self_test(model)
        assert "bound" in proof.bypass_reason
        assert proof.layout is None


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt_oss", "gemma3_text", "deepseek_v3"])
@in_each_dtype
def test_rounding_is_no_obstacle(kind: str, dtype: torch.dtype) -> None:
    for scale in (0.02, 0.3):
        assert run_self_test(tiny(kind, dtype=dtype, initializer_range=scale)).bypass_reason == ""


def test_a_window_of_its_own_is_no_obstacle() -> None:
    model = tiny("llama")
    attention(window(0))(model)
    assert run_self_test(model).bypass_reason == ""


def test_a_type_of_kv_that_no_blob_holds_is_an_obstacle() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            # Complex numbers stand for whatever type comes next.
            forward = projection.forward
            projection.forward = lambda x, forward=forward: forward(x).to(torch.complex64)
    assert run_self_test(model).bypass_reason


# ------------------------------------------------------------------------ without a trace


def test_the_random_numbers_of_the_caller_are_left_alone() -> None:
    model = tiny("mixtral")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    run_self_test(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    ids = tokens(10)
    with torch.no_grad():
        logits = model(ids).logits
    run_self_test(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_in_every_mode(mode: Callable[[], Any]) -> None:
    with mode():
        assert run_self_test(tiny("llama")).bypass_reason == ""


def test_special_tokens_are_not_used() -> None:
    seen = set()
    model = tiny("llama")
    model.config.image_token_id = 20
    model.config.eos_token_id = [30, 31]
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.update(kwargs["input_ids"].flatten().tolist()),
        with_kwargs=True,
    )
    run_self_test(model)
    assert seen
    assert not seen & {0, 1, 20, 30, 31}
    assert max(seen) < VOCABULARY


@pytest.mark.parametrize("size", [8, 40, 5000])
def test_vocabularies_of_any_size(size: int) -> None:
    assert run_self_test(tiny("llama", vocab_size=size)).bypass_reason == ""


# ------------------------------------------------------------------------ what is cached


def test_the_layout_is_measured() -> None:
    assert measure_layout(tiny("llama")).layout == KVLayout(
        torch.float32, (LayerShape(2, 16, 2, 16),) * 4
    )
    assert measure_layout(tiny("mamba")).layout is None
    for kind in ("gemma3_text", "deepseek_v3", "gpt2"):
        model = tiny(kind)
        assert measure_layout(model).layout == run_self_test(model).layout


def test_a_model_that_makes_much_of_rounding_is_an_obstacle() -> None:
    """Many turns through the same layers: a prompt of another length already rounds otherwise."""
    assert "changes this model's logits" in run_self_test(tiny("hrm_text")).bypass_reason
    assert run_self_test(tiny("hrm_text", dtype=torch.float64)).bypass_reason == ""
