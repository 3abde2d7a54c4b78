"""The rotation: exact by zero, composable, right at far positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.moving import prove_moving
from chunkcache.proof import prove
from chunkcache.rope import KeyMover, Rotation
from tests.models import tiny

positions = st.integers(0, 120_000)


def rotation(interleaved=False, sign=1, dims=16):
    frequencies = 1e4 ** (-torch.arange(0, dims, 2).float() / dims)
    return Rotation(frequencies, 0, interleaved, sign)


def slow(x, old, new, rule):
    """One pair and one token at a time, with angles rounded as the models round them."""
    out = x.double().clone()
    pairs = len(rule.inv_freq)
    for token, (a, b) in enumerate(zip(old.tolist(), new.tolist(), strict=True)):
        for pair in range(pairs):
            i, j = (2 * pair, 2 * pair + 1) if rule.interleaved else (pair, pair + pairs)
            freq = rule.inv_freq[pair]
            angle = (torch.tensor(float(b)) * freq).double() - (torch.tensor(float(a)) * freq)
            angle = angle * rule.sign
            u, v = x[..., token, i].double(), x[..., token, j].double()
            out[..., token, i] = u * angle.cos() - v * angle.sin()
            out[..., token, j] = v * angle.cos() + u * angle.sin()
    return out


@given(positions, positions, st.booleans(), st.sampled_from([1, -1]))
def test_as_one_would_do_it_by_hand(old, new, interleaved, sign):
    rule = rotation(interleaved, sign)
    x = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1))
    a, b = torch.arange(old, old + 3), torch.arange(new, new + 3)
    assert torch.allclose(rule.move(x, a, b).double(), slow(x, a, b, rule), atol=2e-6)


@given(positions)
def test_a_move_by_nothing_changes_no_bit(position):
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(2))
    where = torch.arange(position, position + 4)
    assert torch.equal(rotation().move(x, where, where), x)


@pytest.mark.parametrize("kind", ["llama", "cohere", "gpt_neox", "gemma3_text", "deepseek_v3"])
def test_all_layers_at_once_are_each_on_its_own(kind):
    model = tiny(kind)
    layout = prove(model).layout
    mover = prove_moving(model, layout)
    assert isinstance(mover, KeyMover)
    generator = torch.Generator().manual_seed(3)
    layers = [
        (
            torch.randn(s.key_heads, 5, s.key_dim, generator=generator),
            torch.randn(s.value_heads, 5, s.value_dim, generator=generator),
        )
        for s in layout.layers
    ]
    old, new = torch.arange(5), torch.arange(50, 55)
    for index, (k, v) in enumerate(mover.move_all(layers, old, new)):
        alone = mover.move(layers[index], index, old, new)
        assert torch.equal(k, alone[0])
        assert torch.equal(v, alone[1])


@pytest.mark.parametrize(
    ("kind", "overrides", "reason"),
    [
        ("gpt2", {}, "no known rotation"),
        ("bloom", {}, "position_ids"),
        ("llama", {"attn_implementation": "eager"}, None),
        ("llama", {"max_position_embeddings": 12}, "too few positions"),
    ],
)
def test_who_may_be_moved(kind, overrides, reason):
    model = tiny(kind, **overrides)
    found = prove_moving(model, prove(model).layout)
    assert (reason in found) if reason else isinstance(found, KeyMover)


def test_a_query_that_knows_its_position_is_found_out():
    """The keys turn as they should, and yet the output depends on where the prompt stands."""
    model = tiny("llama")
    layer = model.model.layers[2].self_attn
    plain = layer.forward

    def scaled(hidden_states, position_embeddings, **kwargs):
        out, weights = plain(hidden_states, position_embeddings=position_embeddings, **kwargs)
        return out * (1 + position_embeddings[1][..., :1].abs()), weights

    proof = prove(model)
    layer.forward = scaled
    assert isinstance(prove_moving(model, proof.layout), str)
