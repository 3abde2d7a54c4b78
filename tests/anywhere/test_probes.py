"""Probes: what they say must be what the model does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from threading import get_ident

import pytest
import torch
from transformers import AttentionInterface

from chunkcache.anywhere.probes import Probes
from chunkcache.errors import RepairError
from chunkcache.model.self_test import cache_of, growing_layers
from tests.models import tiny, tokens
from tests.prompts import logits

LENGTH, BEHIND = 60, slice(50, 60)


def compiled(model):
    """The model, compiled from outside, from inside, and in part."""
    model.compile(backend="eager")
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    model.model.layers[0].forward = torch.compile(model.model.layers[0].forward, backend="eager")


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *product(["llama", "gemma3_text", "mixtral", "phi", "deepseek_v3"], ["sdpa", "eager"]),
        ("gemma2", "eager"),  # scores bounded by tanh
        ("gpt_oss", "eager"),  # sinks beside the tokens
        ("falcon", "sdpa"),  # calls scaled_dot_product_attention itself
        ("llama", "compiled"),
    ],
)
def test_attention_is_that_of_the_model(name, attention):
    implementation = "sdpa" if attention == "compiled" else attention
    model = tiny(name, attn_implementation=implementation)
    ids = tokens(LENGTH)
    layers = growing_layers(model)
    known = torch.ones(LENGTH, dtype=torch.bool)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache_of(layers), use_cache=True)
        if attention == "compiled":
            compiled(model)
        columns = torch.arange(LENGTH)[BEHIND]
        found = Probes(model, layers, ids, known, 0, []).attention(columns, [0, 1])
        plain = tiny(name, attn_implementation="eager")
        weights = plain(input_ids=ids, output_attentions=True).attentions
    for layer in (0, 1):
        expected = weights[layer][0, :, BEHIND, :LENGTH].sum((0, 1))
        torch.testing.assert_close(found[layer], expected, atol=1e-5, rtol=1e-4)


def test_attention_that_cannot_be_seen_is_an_error_that_says_so():
    def attend(module, query, key, value, attention_mask, **options):
        scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3)).exp() * attention_mask
        out = scores / scores.sum(-1, keepdim=True) @ value.repeat_interleave(2, 1)
        return out.transpose(1, 2), None

    model, ids = tiny("llama"), tokens(LENGTH)
    layers, known = held(model, ids), torch.ones(LENGTH, dtype=torch.bool)
    AttentionInterface.register("test_own", attend)
    model.config._attn_implementation = "test_own"
    probes = Probes(model, layers, ids, known, 0, [(0, LENGTH)])
    with torch.no_grad(), pytest.raises(RepairError, match=r"layer 2 computes .* cannot be looked"):
        probes.query_attention()


@pytest.mark.parametrize("probe", ["query_attention", "deviation"])
def test_what_other_threads_compute_meanwhile_is_what_it_always_is(probe):
    model, ids, other = tiny("llama"), tokens(LENGTH), tokens(LENGTH, seed=1)
    layers, known = held(model, ids), torch.ones(LENGTH, dtype=torch.bool)
    plain = logits(model, other)
    found, here = [], get_ident()

    def meanwhile(*_):
        if get_ident() == here:
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(logits, model, other).result())

    with torch.no_grad():
        model.model.layers[0].register_forward_hook(meanwhile)
        getattr(Probes(model, layers, ids, known, 0, [(0, LENGTH)]), probe)()
    assert found
    assert torch.equal(found[0], plain)


def held(model, ids):
    """Layers that hold the K/V of a prompt."""
    layers = growing_layers(model)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache_of(layers), use_cache=True)
    return layers


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3"])
def test_the_deviation_is_the_error_of_the_second_layers_values(name):
    model, ids = tiny(name), tokens(LENGTH)
    truth, layers = held(model, ids), held(model, ids)
    known = torch.ones(LENGTH, dtype=torch.bool)
    with torch.no_grad():
        assert Probes(model, layers, ids, known, 0, [(0, LENGTH)]).deviation().max() < 1e-4
        layers[1].values[:, :, 20:30] += 1
        probes = Probes(model, layers, ids, known, 10, [(20, 30)])
        found = probes.deviation()
    expected = (layers[1].values - truth[1].values).pow(2).sum((0, 1, 3)).sqrt()
    torch.testing.assert_close(torch.from_numpy(found).float(), expected, atol=1e-4, rtol=1e-4)
    assert probes.deviation() is found
    assert probes.charged == 10 * 2 / 4  # two of four layers for each moved token, once


def test_the_query_looks_at_what_is_known_and_at_itself_only():
    model, ids = tiny("llama"), tokens(LENGTH)
    layers, known = held(model, ids), torch.ones(LENGTH, dtype=torch.bool)
    known[5:20] = False
    known[52:] = False
    with torch.no_grad():
        probes = Probes(model, layers, ids, known, 0, [(20, 52)])
        found = probes.query_attention()
    assert not found[5:20].any()
    assert (found[20:] > 0).all()
    assert 0 < probes.charged <= 8


def test_a_probe_leaves_known_kv_and_the_model_as_they_were():
    model, ids = tiny("gemma3_text"), tokens(LENGTH)
    layers = held(model, ids)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
    known = torch.ones(LENGTH, dtype=torch.bool)
    known[55:] = False
    with torch.no_grad():
        probes = Probes(model, layers, ids, known, 30, [(30, 55)])
        probes.deviation()
        probes.query_attention()
    assert model.config._attn_implementation == "sdpa"
    for layer, (keys, values) in zip(layers, before, strict=True):
        assert layer.columns is layer.intercept is None
        torch.testing.assert_close(layer.keys[:, :, :55], keys[:, :, :55], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.values[:, :, :55], values[:, :, :55], atol=1e-5, rtol=1e-4)
