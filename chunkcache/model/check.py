"""Which models a cache can be made for: wrappers are looked through, the rest is refused."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch import nn
from transformers import GenerationMixin

from chunkcache.errors import UnsupportedCallError, UnsupportedModelError

OLDEST = (5, 18)  # of the releases of Transformers
if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
    raise ImportError(
        f"chunkcache needs transformers>=5.18,<5.25, and {transformers.__version__} is installed: "
        "older releases give other tokens. pip install -U 'transformers>=5.18,<5.25'"
    )
# What models call the cache among their arguments: another name since Transformers 5.24.
_NEW = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if _NEW else "past_key_values"
# Values of cache_implementation for which generate() takes the cache that it is given: it ignores
# the second, which checkpoints of Gemma 2 and 3 and others name from the time when it was needed.
TAKES_A_CACHE = (None, "hybrid")


def check_model(model: Any) -> nn.Module:
    """The model whose forward `generate()` calls, inside PEFT and `torch.compile` wrappers.

    Raises:
        UnsupportedModelError: Not a decoder that takes a `DynamicCache`.
        UnsupportedCallError: The model's generation settings exclude a cache of the user's.
    """
    inner = getattr(model, "_orig_mod", model)
    if any(
        getattr(adapter, "peft_type", None) == "XLORA"
        for adapter in getattr(inner, "peft_config", {}).values()
    ):
        raise UnsupportedModelError(
            "an X-LoRA model computes with use_cache=False always, whatever generate() is told: "
            "generate without chunkcache"
        )
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    config = getattr(inner, "config", None)
    if not isinstance(inner, nn.Module) or config is None:
        raise UnsupportedModelError(
            f"RedisChunkCache needs a Transformers model as its first argument, not a "
            f"{type(model).__name__}"
        )
    name = type(inner).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: its cache depends on the encoder's input, not on the "
            "prompt's tokens alone. Use a decoder-only model, or generate without chunkcache"
        )
    can_generate = getattr(inner, "can_generate", None)
    if can_generate is None or not can_generate():
        raise UnsupportedModelError(
            f"{name} cannot generate: load it with AutoModelForCausalLM to use RedisChunkCache"
        )
    takes_dynamic_cache: Any = inner._supports_default_dynamic_cache
    if not takes_dynamic_cache():
        raise UnsupportedModelError(
            f"{name} has a cache class of its own and takes no DynamicCache: "
            "generate without chunkcache"
        )
    parameters = inspect.signature(inner.forward).parameters
    is_wrapped = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    if CACHE not in parameters and not is_wrapped:
        state = " (it keeps a recurrent state)" if "cache_params" in parameters else ""
        raise UnsupportedModelError(f"{name} takes no {CACHE}{state}: generate without chunkcache")
    generation_config = getattr(inner, "generation_config", None)
    implementation = getattr(generation_config, "cache_implementation", None)
    if implementation not in TAKES_A_CACHE:
        raise UnsupportedCallError(
            f"model.generation_config.cache_implementation={implementation!r} excludes "
            "past_key_values=RedisChunkCache(...): set it to None"
        )
    return inner
