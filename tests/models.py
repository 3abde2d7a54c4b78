"""Tiny models with random weights, of many architectures: real classes, no download.

Run with OMP_NUM_THREADS=1: on models this small a second thread only costs time.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 199
PAD = 0

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Ten times the usual: outputs of a random model hardly depend on the context otherwise.
    "initializer_range": 0.3,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "tie_word_embeddings": False,
}
_GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
# What an architecture needs besides or instead.
_OWN: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 4, "n_head": 4},
    "deepseek_v3": _LATENT | _EXPERTS,
    "deepseek_v32": _LATENT
    | _EXPERTS
    | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt_oss": _EXPERTS | {"sliding_window": 8},
    "gptj": _GPT2 | {"rotary_dim": 8, "n_inner": 96},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba": {"state_size": 8},
    "minimax": _EXPERTS,
    "mistral": {"sliding_window": None},
    "mixtral": _EXPERTS | {"sliding_window": None},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {"num_key_value_heads": 4},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3_moe": _EXPERTS,
    "starcoder2": {"sliding_window": None},
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Configuration of a tiny model; `overrides` win over everything."""
    values = _COMMON | _OWN.get(model_type, {}) | overrides
    config = CONFIG_MAPPING[model_type](**values)
    if "eos_token_id" not in overrides:
        config.eos_token_id = None  # generation never stops early
    return config


def tiny(
    model_type: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """A causal language model of this architecture: 4 layers of 64, 199 tokens, in eval mode.

    The same arguments give the same weights, in every process. torch's global generator is left
    as it was.
    """
    config = tiny_config(model_type, **overrides)
    chosen = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.random.fork_rng(devices=[]):
        transformers.set_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen).eval()
    if model.can_generate():
        model.generation_config.eos_token_id = overrides.get("eos_token_id")
        model.generation_config.pad_token_id = PAD
    return model


def tokens(count: int, *, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """`[rows, count]` random token ids, none of them special."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, count), generator=source)
