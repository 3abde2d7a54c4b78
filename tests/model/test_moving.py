"""May a model's K/V be moved? Who may, who may not, and that each of the tests is needed."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chunkcache.kv.rope import KeyMover
from chunkcache.model import moving
from chunkcache.model.moving import find_rotation, prove_moving
from chunkcache.model.proof import prove
from tests.models import tiny

MOVABLE = ["llama", "qwen3", "gemma3_text", "cohere", "phi", "deepseek_v3", "mixtral", "gpt_oss"]


def verdict(model, **options):
    return prove_moving(model, prove(model).layout, **options)


@pytest.mark.parametrize("kind", MOVABLE)
def test_who_may_be_moved(kind):
    assert isinstance(verdict(tiny(kind, attn_implementation="eager")), KeyMover)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_in_any_precision(dtype):
    """With the usual initialisation: ten times larger weights make 16 bits useless."""
    assert isinstance(verdict(tiny("llama", dtype=dtype, initializer_range=0.03)), KeyMover)


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
    assert isinstance(find_rotation(tiny(kind)), KeyMover) == known


def test_a_rule_is_none_where_the_model_fails(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(model, "forward", lambda input_ids, position_ids, **_: 1 / 0)
    assert find_rotation(model) is None


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
    layout = prove(model).layout
    assert "absolute positions" in prove_moving(spoil(model, scaled), layout)


def test_attention_that_ignores_the_mask_is_found_out():
    model = tiny("llama")
    layout = prove(model).layout
    assert "into the middle of a prompt" in prove_moving(spoil(model, unmasked), layout)


def test_a_model_that_fails_is_refused():
    def failing(plain):
        def attend(*args, **kwargs):
            raise ValueError("not today")

        return attend

    model = tiny("llama")
    layout = prove(model).layout
    found = prove_moving(spoil(model, failing), layout)
    assert found == "the self-test for moving could not run: ValueError: not today"


def test_the_tests_leave_no_trace():
    model = tiny("llama")
    layout = prove(model).layout
    state = torch.get_rng_state()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = model(ids).logits
        prove_moving(model, layout)
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model._forward_hooks


def test_of_a_proven_model_only_the_rule_is_found(monkeypatch):
    model = tiny("llama")
    truth = verdict(model)
    for test in ("_far_shift_test", "_scatter_test"):
        monkeypatch.setattr(moving, test, lambda *args: pytest.fail("was run"))
    found = verdict(model, proven=True)
    x = torch.randn(2, 4, 16)
    old, new = torch.arange(4), torch.arange(70, 74)
    for mine, its in zip(found.layers, truth.layers, strict=True):
        assert torch.equal(mine.keys.move(x, old, new), its.keys.move(x, old, new))
    assert "no known rotation" in verdict(tiny("gpt2"), proven=True)  # whatever a store says
