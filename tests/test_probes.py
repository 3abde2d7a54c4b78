"""Probes: what they say must be what the model does."""

from __future__ import annotations

import pytest
import torch

from chunkcache.probes import Probes
from chunkcache.proof import cache_of, growing_layers
from tests.models import tiny, tokens

LENGTH, BEHIND = 60, slice(50, 60)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral", "phi", "deepseek_v3"])
def test_attention_is_that_of_the_model(name):
    model = tiny(name)
    ids = tokens(LENGTH)
    layers = growing_layers(model)
    known = torch.ones(LENGTH, dtype=torch.bool)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache_of(layers), use_cache=True)
        columns = torch.arange(LENGTH)[BEHIND]
        found = Probes(model, layers, ids, known, 0, []).attention(columns, [0, 1])
        model.set_attn_implementation("eager")
        weights = model(input_ids=ids, output_attentions=True).attentions
    for layer in (0, 1):
        expected = weights[layer][0, :, BEHIND].sum((0, 1))
        torch.testing.assert_close(found[layer], expected, atol=1e-5, rtol=1e-4)
