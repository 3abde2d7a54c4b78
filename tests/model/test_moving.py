"""May a model's K/V be moved? Who may, who may not, and that each of the tests is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chunkcache.kv.rope import KeyRotation, LayerRule, Rotation, find_rules
from chunkcache.model import moving
from chunkcache.model.moving import find_rotation, verify_rotation
from chunkcache.model.scatter import scatter_mask
from chunkcache.model.self_test import NoVerdict, measure_layout, run_self_test
from chunkcache.samples import cache_folder, load_folder, smollm2_folder
from tests.models import tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_NAMES = ["fp32", "bf16", "fp16"]
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)

MOVABLE = ["llama", "qwen3", "gemma3_text", "cohere", "phi", "deepseek_v3", "mixtral", "gpt_oss"]


def verdict(model, **options):
    return verify_rotation(model, run_self_test(model).layout, **options)


@pytest.mark.parametrize("kind", MOVABLE)
def test_who_may_be_moved(kind):
    assert isinstance(verdict(tiny(kind, attn_implementation="eager")), KeyRotation)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_in_any_precision(dtype):
    """With the usual initialisation: ten times larger weights make 16 bits useless."""
    assert isinstance(verdict(tiny("llama", dtype=dtype, initializer_range=0.03)), KeyRotation)


@pytest.mark.parametrize(
    ("kind", "overrides", "reason"),
    [
        ("gpt2", {}, "layer 0: no known rotation explains how its keys turn"),
        ("bloom", {}, "takes no position_ids"),
        ("llama", {"max_position_embeddings": 12}, "too few positions"),
    ],
)
def test_who_may_not_be_moved(kind, overrides, reason):
    assert reason in verdict(tiny(kind, **overrides))


def test_attention_that_takes_no_mask_is_refused():
    AttentionInterface.register("unmaskable", sdpa_attention_forward)
    AttentionMaskInterface.register("unmaskable", sdpa_mask)
    model = tiny("llama", attn_implementation="unmaskable")
    assert verdict(model) == (
        "attention 'unmaskable' takes no mask: load the model with attn_implementation='sdpa'"
    )


@pytest.mark.parametrize(("kind", "known"), [("llama", True), ("gpt2", False), ("bloom", False)])
def test_the_rule_alone_is_known_or_not(kind, known):
    assert isinstance(find_rotation(tiny(kind)), KeyRotation) == known


def test_where_the_model_fails_there_is_no_rule_and_no_verdict(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(model, "forward", lambda input_ids, position_ids, **_: 1 / 0)
    assert isinstance(find_rotation(model), NoVerdict)


def spoil(model, forward):
    """Give the last layer's attention another forward, made from its own."""
    layer = model.model.layers[-1].self_attn
    layer.forward = forward(layer.forward)
    return model


def scaled(plain):
    """Scales with the position: keys turn as they should, the output depends on the place."""

    def attend(hidden_states, position_embeddings, **kwargs):
        out, weights = plain(hidden_states, position_embeddings=position_embeddings, **kwargs)
        return out * (1 + position_embeddings[1][..., :1].abs()), weights

    return attend


def unmasked(plain):
    """Ignores a mask that is given as a tensor of several queries."""

    def attend(hidden_states, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.shape[-2] < attention_mask.shape[-1]:
            attention_mask = torch.ones_like(attention_mask)
        return plain(hidden_states, attention_mask=attention_mask, **kwargs)

    return attend


def test_a_query_that_knows_its_position_is_found_out():
    model = tiny("llama")
    layout = run_self_test(model).layout
    assert "absolute positions" in verify_rotation(spoil(model, scaled), layout)


def test_attention_that_ignores_the_mask_is_found_out():
    model = tiny("llama")
    layout = run_self_test(model).layout
    assert "into the middle of a prompt" in verify_rotation(spoil(model, unmasked), layout)


def test_a_model_that_fails_is_refused():
    def failing(plain):
        def attend(*args, **kwargs):
            raise ValueError("not today")

        return attend

    model = tiny("llama")
    layout = run_self_test(model).layout
    found = verify_rotation(spoil(model, failing), layout)
    assert found == "the self-test for moving could not run: ValueError: not today"


def test_the_tests_leave_no_trace():
    model = tiny("llama")
    layout = run_self_test(model).layout
    state = torch.get_rng_state()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = model(ids).logits
        verify_rotation(model, layout)
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model._forward_hooks


def test_of_a_model_that_has_passed_only_the_rule_is_found(monkeypatch):
    model = tiny("llama")
    truth = verdict(model)
    monkeypatch.setattr(moving._Lone, "misfit", lambda *args: pytest.fail("was run"))
    for test in ("_far_shift_test", "_scatter_test"):
        monkeypatch.setattr(moving, test, lambda *args: pytest.fail("was run"))
    found = verdict(model, passed=True)
    x = torch.randn(2, 4, 16)
    old, new = torch.arange(4), torch.arange(70, 74)
    for mine, its in zip(found.layers, truth.layers, strict=True):
        assert torch.equal(mine.keys.move(x, old, new), its.keys.move(x, old, new))
    assert "no known rotation" in verdict(tiny("gpt2"), passed=True)  # whatever a store says


# ------------------------------------------------------------------------ rounding is no wrong rule

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def with_large_key_biases(model):
    source = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.self_attn.k_proj.bias
            bias.copy_(30 * torch.randn(bias.shape, generator=source))
    return model


RIGHT: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 8},
    "qwen2": {},
    "qwen3": {"rope_parameters": LLAMA3},
    "gemma3_text": {},
    "phi3": {"partial_rotary_factor": 0.5},
    "gpt_neox": {},
    "cohere": {},  # interleaved
    "cohere2_moe": {},  # rounding may decide which expert a token asks
    "gpt_oss": {},  # attention sinks, a window, and YaRN
}


@pytest.mark.parametrize("kind", RIGHT)
@in_each_dtype
def test_many_positions_are_no_wrong_rule(kind, dtype):
    for positions in (8_192, 1_048_576):
        model = tiny(kind, dtype=dtype, max_position_embeddings=positions, **RIGHT[kind])
        if kind == "qwen2":
            model = with_large_key_biases(model)
        assert isinstance(verify_rotation(model, measure_layout(model).layout), KeyRotation)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models_may_be_moved(name):
    """With as many positions as they have, and with a million."""
    folder = cache_folder() / "models" / "gemma3-270m-1.0.0-float32"
    if name == "smollm2":
        folder = smollm2_folder()
    elif not folder.is_dir():
        pytest.skip("Gemma 3 270M was not converted here: benchmarks/quality.py does")
    # Not in float16, which takes a minute on a CPU that multiplies it slowly.
    for dtype, positions in ((torch.float32, 1_048_576), (torch.bfloat16, None)):
        model, _ = load_folder(folder, dtype)
        model.config.max_position_embeddings = positions or model.config.max_position_embeddings
        # Gemma's 262,144 logits make bfloat16 slow: one of its tests will do.
        only_moving = name == "gemma3" and dtype == torch.bfloat16
        proof = measure_layout(model) if only_moving else run_self_test(model)
        assert proof.bypass_reason == ""
        assert isinstance(verify_rotation(model, proof.layout), KeyRotation)


# ------------------------------------------------------------------------ wrong rules are wrong

Change = Callable[[torch.Tensor], torch.Tensor]


def theta(factor: float) -> Change:
    """Frequencies as of a base that is so many times as large."""
    return lambda freq: freq * factor ** (-torch.arange(len(freq)).to(freq) / len(freq))


def frequencies(change: Change) -> Callable[[Any], None]:
    """Turns with other frequencies than its table tells."""

    def spoil(model):
        rotary = model.model.rotary_emb
        plain, own = rotary.forward, rotary.inv_freq

        def forward(x, position_ids):
            rotary.inv_freq = change(own)
            try:
                return plain(x, position_ids)
            finally:
                rotary.inv_freq = own

        rotary.forward = forward

    return spoil


def positions(change: Change) -> Callable[[Any], None]:
    def spoil(model):
        plain = model.model.rotary_emb.forward
        model.model.rotary_emb.forward = lambda x, position_ids: plain(x, change(position_ids))

    return spoil


def factor(change: Change) -> Callable[[Any], None]:
    """Cosine and sine are multiplied by what depends on the position."""

    def spoil(model):
        plain = model.model.rotary_emb.forward

        def forward(x, position_ids):
            cos, sin = plain(x, position_ids)
            by = change(position_ids)[..., None].to(cos.dtype)
            return cos * by, sin * by

        model.model.rotary_emb.forward = forward

    return spoil


def queries(change: Change) -> Callable[[Any], None]:
    """Queries of the layer before the last are multiplied by what depends on the position."""

    def spoil(model):
        attention = model.model.layers[-2].self_attn
        attend, project = attention.forward, attention.q_proj.forward

        def forward(hidden_states, position_ids=None, **kwargs):
            by = change(position_ids)[..., None].to(hidden_states.dtype)
            attention.q_proj.forward = lambda x: project(x) * by
            return attend(hidden_states, position_ids=position_ids, **kwargs)

        attention.forward = forward

    return spoil


WRONG_MODELS = {
    "next pair": frequencies(lambda freq: freq.roll(1)),
    "theta 1 %": frequencies(theta(1.01)),
    "theta 10 %": frequencies(theta(1.1)),
    "scaling": frequencies(lambda freq: freq * 4 / 4.1),
    "position": positions(lambda p: p + (p >= 1_024)),
    "attention factor": factor(lambda p: 1 + 0.1386 * (p >= 512)),
    "query by steps": queries(lambda p: 1 + 0.1386 * (p >= 512)),
    "query by logarithm": queries(lambda p: 1 + 0.1 * torch.log1p(torch.floor(p / 512))),
}


@pytest.mark.parametrize("wrong", WRONG_MODELS)
@in_each_dtype
def test_a_model_that_turns_otherwise_than_its_table_tells_is_refused(wrong, dtype):
    for kind, count, scale in (("llama", 2_048, 0.02), ("qwen2", 1_048_576, 0.3)):
        model = tiny(kind, dtype=dtype, max_position_embeddings=count, initializer_range=scale)
        if kind == "qwen2":
            with_large_key_biases(model)
        layout = measure_layout(model).layout
        WRONG_MODELS[wrong](model)
        reason = verify_rotation(model, layout)
        assert isinstance(reason, str)
        assert "bound" in reason


@dataclass(frozen=True, eq=False)
class NextPosition(Rotation):
    def angles(self, old, new):
        return super().angles(old, torch.where(new == old, new, new + 1))


@dataclass(frozen=True, eq=False)
class WithoutFactor(Rotation):
    def angles(self, old, new):
        angles = super().angles(old, new)
        return angles * torch.where(new == old, 1.0, 1 / 1.1386)[:, None].to(angles.device)


WRONG_RULES: dict[str, Callable[[Rotation], Rotation]] = {
    "next pair": lambda r: replace(r, inv_freq=r.inv_freq.roll(1)),
    "interleaved": lambda r: replace(r, interleaved=not r.interleaved),
    "sign": lambda r: replace(r, sign=-r.sign),
    "theta 1 %": lambda r: replace(r, inv_freq=theta(1.01)(r.inv_freq)),
    "scaling": lambda r: replace(r, inv_freq=r.inv_freq * 4 / 4.1),
    "half of the pairs": lambda r: replace(r, inv_freq=r.inv_freq[: len(r.inv_freq) // 2]),
    "position": lambda r: NextPosition(**vars(r)),
    "attention factor": lambda r: WithoutFactor(**vars(r)),
}


@pytest.mark.parametrize("wrong", WRONG_RULES)
@in_each_dtype
def test_several_tokens_show_a_wrong_rule_by_themselves(wrong, dtype, monkeypatch):
    """Even if lone tokens had led to it."""

    def found(*args):
        rules = find_rules(*args).layers
        return KeyRotation(tuple(LayerRule(WRONG_RULES[wrong](rule.keys), None) for rule in rules))

    monkeypatch.setattr(moving, "find_rules", found)
    monkeypatch.setattr(moving._Lone, "misfit", lambda *args: "")
    for kind in ("llama", "cohere"):
        model = tiny(kind, dtype=dtype, max_position_embeddings=32_768, rope_parameters=YARN)
        reason = verify_rotation(model, measure_layout(model).layout)
        assert "keys of several tokens do not turn like those of one" in reason
        assert "bound" in reason


@pytest.mark.parametrize("off", [-1, 1])
@in_each_dtype
def test_a_window_that_is_off_by_one_is_refused(off, dtype, monkeypatch):
    def shifted(model, *args):
        window = model.config.sliding_window
        model.config.sliding_window += off
        try:
            return scatter_mask(model, *args)
        finally:
            model.config.sliding_window = window

    model = tiny("gemma3_text", dtype=dtype)
    layout = measure_layout(model).layout
    monkeypatch.setattr(moving, "scatter_mask", shifted)
    reason = verify_rotation(model, layout)
    assert "into the middle of a prompt" in reason
    assert "bound" in reason
