"""What shapes K/V besides weights and configuration: each change is a model of its own."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama import modeling_llama

from chunkcache import RedisChunkCache
from chunkcache.model.state import ModelState
from chunkcache.reuse.check_token import CheckToken
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens

IDS = tokens(300, seed=5)
KINDS = [
    "llama", "qwen3_moe", "gemma2", "gemma3_text", "gpt2", "bloom", "opt", "mpt", "gpt_neox",
    "phi", "cohere2", "deepseek_v3", "llama4_text", "gpt_oss", "falcon", "granitemoe", "mixtral",
    "smollm3",
]  # fmt: skip


def generate(model, cache=None):
    return model.generate(IDS, past_key_values=cache, max_new_tokens=8, do_sample=False)


def layers(model):
    return model.model.layers


def scaling(model, patch):
    for layer in layers(model):
        patch.setattr(layer.self_attn, "scaling", 0.05)


def activation(model, patch):
    for layer in layers(model):
        patch.setitem(layer.mlp._modules, "act_fn", nn.ReLU())


def epsilon(model, patch):
    for layer in layers(model):
        patch.setattr(layer.input_layernorm, "variance_epsilon", 10.0)


def rope_scale(model, patch):
    patch.setattr(model.model.rotary_emb, "attention_scaling", 0.5)


def one_row(model, patch):
    weight = layers(model)[0].mlp.down_proj.weight
    before = weight.data[7].clone()
    weight.data[7] = 0.9
    patch.undone.append(lambda: weight.data[7].copy_(before))


def class_method(model, patch):
    whole = modeling_llama.LlamaMLP.forward
    patch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 0.3 * whole(self, x))


def module_function(model, patch):
    rotate = modeling_llama.apply_rotary_pos_emb
    patch.setattr(
        modeling_llama,
        "apply_rotary_pos_emb",
        lambda q, k, cos, sin, *more: rotate(q * 1.5, k, cos, sin, *more),
    )


def torch_function(model, patch):
    silu = nn.functional.silu
    patch.setattr(nn.functional, "silu", lambda x, inplace=False: silu(x) * 0.5)


def attention(model, patch):
    def twice(module, query, *rest, **options):
        return sdpa_attention_forward(module, query * 2.0, *rest, **options)

    AttentionInterface.register("of_a_test", twice)
    patch.undone.append(lambda: AttentionInterface.register("of_a_test", sdpa_attention_forward))


class Halved(modeling_llama.LlamaMLP):
    def forward(self, x):
        return super().forward(x) * 0.5


def replaced_class(model, patch):
    for layer in layers(model):
        patch.setattr(layer.mlp, "__class__", Halved)


class Steered(modeling_llama.LlamaMLP):
    """Adds a vector that no parameter or buffer holds."""

    def forward(self, x):
        return super().forward(x) + self.vectors[0].to(x.dtype)


def control_vector(model, patch):
    for layer in layers(model):
        patch.setattr(layer.mlp, "__class__", Steered)
        layer.mlp.vectors = [torch.full((64,), 2.0, device=model.device)]


CHANGES = [
    scaling, activation, epsilon, rope_scale, one_row, class_method, module_function,
    torch_function, attention, replaced_class, control_vector,
]  # fmt: skip


@pytest.fixture
def patch(monkeypatch):
    monkeypatch.undone = []
    yield monkeypatch
    for undo in monkeypatch.undone:
        undo()


def build(dtype=torch.float32):
    AttentionInterface.register("of_a_test", sdpa_attention_forward)
    AttentionMaskInterface.register("of_a_test", sdpa_mask)
    model = tiny(dtype=dtype)
    model.set_attn_implementation("of_a_test")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_another(change, dtype, patch, monkeypatch):
    """Known text, then the change, twice, then without it again: each as without a cache."""
    monkeypatch.setattr(CheckToken, "difference", lambda self: 0.0)  # the identity alone
    model, store = build(dtype), MemoryStore()
    plain, identity = generate(model), ModelState.of(model).identity()
    generate(model, RedisChunkCache(model, store))
    change(model, patch)
    changed = generate(model)
    for _ in range(2):
        assert torch.equal(generate(model, RedisChunkCache(model, store)), changed)
    assert ModelState.of(model).identity() != identity
    for undo in patch.undone:
        undo()
    patch.undo()
    monkeypatch.setattr(CheckToken, "difference", lambda self: 0.0)
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, cache), plain)
    assert change in (one_row, control_vector) or cache.report.reused == 299


def test_one_row_of_the_embedding_is_seen_though_the_check_token_cannot():
    model, store = tiny(), MemoryStore()
    generate(model, RedisChunkCache(model, store))
    model.get_input_embeddings().weight.data[IDS[0, 3]] = 0.5
    assert torch.equal(generate(model, RedisChunkCache(model, store)), generate(model))


def test_dropout_of_a_part_in_training_mode_is_neither_read_nor_stored():
    model, store = tiny(attention_dropout=0.5), MemoryStore()
    generate(model, RedisChunkCache(model, store))
    layers(model)[1].self_attn.train()
    cache = RedisChunkCache(model, store)
    torch.manual_seed(0)
    answer = generate(model, cache)
    torch.manual_seed(0)
    assert torch.equal(answer, generate(model))
    assert "training mode" in cache.report.skipped
    assert cache.report.bytes_written == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_again_has_the_same_identity(kind):
    """Also after it has generated: what models note down meanwhile does not count."""
    first, second = tiny(kind), tiny(kind)
    identity = ModelState.of(first).identity()
    assert ModelState.of(second).identity() == identity
    first.generate(tokens(20), max_new_tokens=2)
    assert ModelState.of(first).identity() == identity


def test_methods_that_only_wrap_are_described_by_what_they_wrap():
    model = tiny()
    before = ModelState.of(model).identity()
    mlp = layers(model)[0].mlp
    mlp.forward = types.MethodType(type(mlp).forward, mlp)
    assert ModelState.of(model).identity() == before
    mlp.forward = types.MethodType(lambda self, x: x, mlp)
    assert ModelState.of(model).identity() != before


def test_an_edited_model_poisons_nobody(redis_server):
    """What it stores is not found by the whole one in another process."""
    model = tiny()
    for layer in layers(model):
        layer.self_attn.scaling = 0.05
    with RedisChunkCache(model, redis_server.unix_url) as cache:
        generate(model, cache)
    script = (
        "import sys, torch\n"
        "from chunkcache import RedisChunkCache\n"
        "from tests.model.test_makeup import generate, tiny\n"
        "model = tiny()\n"
        "cache = RedisChunkCache(model, sys.argv[1])\n"
        "assert torch.equal(generate(model, cache), generate(model))\n"
        "print(cache.report.reused)\n"
    )
    command = [sys.executable, "-c", script, redis_server.unix_url]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stdout == "0\n", ended.stderr
