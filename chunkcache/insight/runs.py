"""Runs: a prompt and what follows it, with a plain cache and with another one, to be compared."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from chunkcache.errors import SettingError, UnsupportedCallError
from chunkcache.kv.layout import LayerKV
from chunkcache.model.check import CACHE
from chunkcache.model.self_test import forward, takes
from chunkcache.reuse.prompt import Prompt, read_ids


@dataclass(frozen=True, slots=True)
class Run:
    """One run.

    Attributes:
        logits: One `[batch, vocabulary]` per position compared.
        continuation: `[batch, positions - 1]`, the ids fed behind the prompt.
        kv: The prompt's keys and values, `[batch, kv_heads, tokens, head_dim]` each; sliding
            layers of a plain cache hold the last tokens only. `None` for layers without any.
        prompt_ms: Duration of the prompt's forward.
    """

    logits: list[Tensor]
    continuation: Tensor
    kv: list[LayerKV | None]
    prompt_ms: float


def run_both(
    model: nn.Module, cache: DynamicCache, prompt: Prompt, continuation: Any, new_tokens: int
) -> tuple[Run, Run]:
    """Run a prompt and a continuation with a plain cache and with `cache`, which is empty.

    Args:
        model: The model, in evaluation mode.
        cache: The cache that is audited.
        prompt: Padded on the left.
        continuation: `[batch, new]` ids to feed; `None` for those that the model finds likeliest.
        new_tokens: How many of those.

    Raises:
        SettingError: An argument that cannot work.
        UnsupportedCallError: The model is in training mode, or takes no cache.
    """
    if model.training:
        raise UnsupportedCallError(
            "audit needs a model whose outputs repeat: call model.eval() first"
        )
    if not takes(model, CACHE):
        raise UnsupportedCallError(
            f"audit runs a model with a cache, which {type(model).__name__} does not take"
        )
    if not bool(prompt.mask[:, -1].all()):
        raise SettingError("attention_mask is 0 at the end of a row: pad prompts on the left")
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 0:
        raise SettingError(f"new_tokens={new_tokens!r} must be a whole number of at least 0")
    given = None if continuation is None else read_ids("continuation", continuation)
    if given is not None and len(given) != len(prompt.ids):
        raise SettingError(
            f"continuation has {len(given)} rows and input_ids {len(prompt.ids)}: "
            "pass one row of ids for each prompt"
        )
    config: Any = model.config
    full = _run(model, DynamicCache(config=config), prompt, given, new_tokens)
    return full, _run(model, cache, prompt, full.continuation, 0)


def _run(
    model: nn.Module, cache: DynamicCache, prompt: Prompt, given: Tensor | None, new_tokens: int
) -> Run:
    """The prompt, then the continuation token by token, as `generate()` does."""
    with torch.no_grad():
        started = perf_counter()
        logits = [last_logits(model, cache, prompt, prompt.ids.shape[1])]
        prompt_ms = 1e3 * (perf_counter() - started)
        kv = [_held(layer) for layer in cache.layers]
        fed = [prompt.ids[:, :0]]
        for step in range(new_tokens if given is None else given.shape[1]):
            fed.append(logits[-1].argmax(-1, keepdim=True) if given is None else given[:, [step]])
            prompt = prompt.followed_by(fed[-1])
            logits.append(last_logits(model, cache, prompt, 1))
    return Run(logits, torch.cat(fed, dim=1), kv, prompt_ms)


def last_logits(model: nn.Module, cache: DynamicCache, text: Prompt, new: int) -> Tensor:
    """`[batch, vocabulary]` behind a text of which all but the last `new` columns are cached."""
    arguments: dict[str, Any] = {"attention_mask": text.mask}
    if takes(model, "position_ids"):
        arguments["position_ids"] = text.positions[:, -new:]
    if takes(model, "logits_to_keep"):
        arguments["logits_to_keep"] = 1
    return forward(model, text.ids[:, -new:], cache, **arguments)[:, -1].cpu()


def _held(layer: Any) -> LayerKV | None:
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        return keys, values
    return None
