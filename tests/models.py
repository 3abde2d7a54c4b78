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
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
_INDEXED = _LATENT | _EXPERTS | {"index_n_heads": 8, "index_head_dim": 16, "index_topk": 8}
_MAMBA: dict[str, Any] = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 64,
}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_WINDOWS: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
_SHARED = {"shared_expert_intermediate_size": 48}
# What an architecture needs besides or instead.
_OWN: dict[str, dict[str, Any]] = {
    "afmoe": _EXPERTS | _WINDOWS,
    "axk1": _LATENT | _EXPERTS,
    "axk2": _LATENT | _EXPERTS,
    "bailing_hybrid": _LATENT
    | _EXPERTS
    | {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_heads": 4,
        "linear_head_dim": 16,
    },
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "beam": _EXPERTS,
    "bloom": {"n_layer": 4, "n_head": 4},
    "codegen": _GPT2 | {"rotary_dim": 8, "n_inner": 96},
    "cohere_compass_text": _WINDOWS,
    "cpmant": {"dim_head": 16, "dim_ff": 96, "prompt_types": 4, "segment_types": 4},
    "deepseek_v2": _LATENT | _EXPERTS,
    "deepseek_v3": _LATENT | _EXPERTS,
    "deepseek_v32": _INDEXED,
    "dots1": _EXPERTS | {"num_key_value_heads": 4},
    "dots3_note_text": _EXPERTS | {"num_key_value_heads": 4},
    "ernie4_5_moe": _EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone_moe": _EXPERTS,
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "flint": _EXPERTS,
    "gemma2": {"sliding_window": 8},
    "gemma3_text": _WINDOWS,
    "gemma3n_text": _WINDOWS
    | _PER_LAYER
    | {"num_kv_shared_layers": 2, "activation_sparsity_pattern": None},
    "gemma4_text": _WINDOWS | _PER_LAYER,
    "glm4_moe": _EXPERTS,
    "glm4_moe_lite": _LATENT | _EXPERTS,
    "glm_moe_dsa": _INDEXED,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt_oss": _EXPERTS | {"sliding_window": 8},
    "gptj": _GPT2 | {"rotary_dim": 8, "n_inner": 96},
    "granitemoehybrid": _MAMBA | _EXPERTS | {"layer_types": ["mamba", "attention"] * 2},
    "hy_v3": _EXPERTS,
    "hy_v4": _INDEXED,
    "inkling2_text": _EXPERTS,
    "inkling_text": _EXPERTS,
    "jamba": _EXPERTS | _MAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LATENT | _EXPERTS | _LINEAR | {"linear_num_heads": 4, "linear_head_dim": 16},
    "kolibri1": _EXPERTS,
    "laguna": _EXPERTS,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": _EXPERTS | {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": _EXPERTS | {"intermediate_size_mlp": 96},
    "longcat_flash": _LATENT
    | _EXPERTS
    | {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 48, "num_layers": 2, "moe_topk": 2},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "mellum": _EXPERTS,
    "mimo_v2_flash": _EXPERTS | {"v_head_dim": 16},
    "minicpm3": _LATENT,
    "minimax": _EXPERTS,
    "minimax_m2": _EXPERTS,
    "minimax_m3_vl_text": _EXPERTS,
    "mistral": {"sliding_window": None},
    "mixtral": _EXPERTS | {"sliding_window": None},
    "moshi": {"ffn_dim": 96, "audio_vocab_size": 64},
    "nemotron_h": _EXPERTS
    | {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "chunk_size": 64},
    "olmo_hybrid": _LINEAR,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {"num_key_value_heads": 4},
    "qwen2_moe": _EXPERTS | _SHARED,
    "qwen3_5_moe_text": _EXPERTS | _LINEAR | _SHARED,
    "qwen3_5_text": _LINEAR,
    "qwen3_moe": _EXPERTS,
    "qwen3_next": _EXPERTS | _LINEAR | _SHARED,
    "recurrent_gemma": {"lru_width": 64, "block_types": ["recurrent", "attention"]},
    "solar_open": _EXPERTS,
    "starcoder2": {"sliding_window": None},
    "youtu": _LATENT,
    "zamba": _MAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": _MAMBA
    | {
        "layer_types": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "attention_head_dim": 32,
    },
    "zaya": _EXPERTS | {"num_experts_per_tok": 1},
}
# What an architecture's configuration does not take.
_WITHOUT = {"falcon": ["head_dim"]}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Configuration of a tiny model; `overrides` win over everything."""
    values = _COMMON | _OWN.get(model_type, {}) | overrides
    for name in _WITHOUT.get(model_type, ()):
        del values[name]
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
