"""The rotation: exact by zero, composable, right at far positions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.kv.layers import allocate_all, peek_all
from chunkcache.kv.layout import TensorFile
from chunkcache.kv.rope import KeyRotation, Rotation
from chunkcache.model.moving import verify_rotation
from chunkcache.model.self_test import growing_layers, run_self_test
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
    layout = run_self_test(model).layout
    rotation = verify_rotation(model, layout)
    assert isinstance(rotation, KeyRotation)
    generator = torch.Generator().manual_seed(3)
    layers = [
        (
            torch.randn(s.key_heads, 5, s.key_dim, generator=generator),
            torch.randn(s.value_heads, 5, s.value_dim, generator=generator),
        )
        for s in layout.layers
    ]
    old, new = torch.arange(5), torch.arange(50, 55)
    targets = [(torch.empty_like(k), torch.empty_like(v)) for k, v in layers]
    rotation.move_into(targets, layers, old, new)
    for index, (k, v) in enumerate(targets):
        alone = rotation.move(layers[index], index, old, new)
        assert torch.equal(k, alone[0])
        assert torch.equal(v, alone[1])


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "deepseek_v3"])
def test_layers_in_one_memory_are_turned_at_once_and_nothing_else(kind, monkeypatch):
    model = tiny(kind)
    layout = run_self_test(model).layout
    rotation = verify_rotation(model, layout)
    form = TensorFile.of(layout, [1, 2, 3, 4, 5], 0, "hash")
    blob = torch.randint(0, 60, (form.size,), dtype=torch.uint8).numpy().data
    sources = [(k[:, 1:4], v[:, 1:4]) for k, v in form.views(form.data(blob))]
    layers = growing_layers(model)
    allocate_all(layers, layout, 2, 20, torch.device("cpu"))
    for layer in layers:
        layer.hold(20)
        layer.keys[:] = layer.values[:] = 7
    old, new = torch.arange(11, 14), torch.arange(6, 9)
    turns = []
    turn = Rotation.turn
    monkeypatch.setattr(Rotation, "turn", lambda *args: turns.append(1) or turn(*args))
    rotation.move_into(peek_all(layers, 1, 6, 3), sources, old, new)
    alike = [rule.keys for rule in rotation.layers]
    assert len(turns) == 1 + sum(a is not b for a, b in itertools.pairwise(alike))
    for index, (layer, source) in enumerate(zip(layers, sources, strict=True)):
        for held, moved in zip(
            (layer.keys, layer.values), rotation.move(source, index, old, new), strict=True
        ):
            assert torch.equal(held[1, :, 6:9], moved)
            held[1, :, 6:9] = 7
            assert (held == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(positions, positions, st.booleans())
def test_sixteen_bits_are_rounded_once(dtype, old, new, interleaved):
    rule = rotation(interleaved)
    x = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(6)).to(dtype)
    a, b = torch.arange(old, old + 3), torch.arange(new, new + 3)
    assert torch.equal(rule.move(x, a, b), rule.move(x.float(), a, b).to(dtype))


@given(positions, st.integers(-100, 100), st.booleans(), st.sampled_from([1, -1]))
def test_there_and_back_again(position, shift, interleaved, sign):
    rule = rotation(interleaved, sign)
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    here = torch.arange(position + 100, position + 104)
    back = rule.move(rule.move(x, here, here + shift), here + shift, here)
    assert torch.allclose(back, x, atol=2e-6)


def test_only_the_rotated_dimensions_change():
    frequencies = 1e2 ** (-torch.arange(0, 8, 2).float() / 8)
    rule = Rotation(frequencies, 4, False, 1)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(5))
    kept = x.clone()
    moved = rule.move(x, torch.arange(3), torch.arange(9, 12))
    assert torch.equal(x, kept)
    assert torch.equal(moved[..., :4], x[..., :4])
    assert torch.equal(moved[..., 12:], x[..., 12:])
    assert not torch.isclose(moved[..., 4:12], x[..., 4:12]).all(-1).any()


RULES = {
    "llama": (16, False, "keys"),
    "cohere": (16, True, "keys"),
    "gpt_neox": (4, False, "keys"),
    "deepseek_v3": (8, False, "values"),
}


@pytest.mark.parametrize("kind", RULES)
def test_the_rule_is_found(kind):
    """How many dimensions turn, how they pair, and where: MLA caches what turns as values."""
    dims, interleaved, where = RULES[kind]
    model = tiny(kind)
    rotation = verify_rotation(model, run_self_test(model).layout)
    assert isinstance(rotation, KeyRotation)
    for rule in rotation.layers:
        turning, still = (rule.keys, rule.values)[:: 1 if where == "keys" else -1]
        assert still is None
        assert (2 * len(turning.inv_freq), turning.interleaved) == (dims, interleaved)


def test_layers_of_two_kinds_have_two_rules():
    model = tiny("gemma3_text", num_hidden_layers=4)
    rotation = verify_rotation(model, run_self_test(model).layout)
    sliding, full = (rotation.layers[n].keys.inv_freq for n in (0, 1))
    assert not torch.equal(sliding, full)
    assert torch.equal(rotation.layers[2].keys.inv_freq, sliding)


def test_keys_that_no_known_rotation_explains_are_refused():
    model = tiny("llama")
    layer = model.model.layers[2].self_attn.k_proj
    layer.register_forward_hook(lambda module, args, out: out + torch.randn_like(out))
    assert "layer 2: no known rotation explains how its keys turn" in verify_rotation(
        model, run_self_test(tiny("llama")).layout
    )
