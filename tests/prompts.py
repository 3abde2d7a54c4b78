"""Prompts made of documents that are met again elsewhere, and what the tests do with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chunkcache import RedisChunkCache
from chunkcache.report import Report
from chunkcache.stores.base import ChunkStore
from tests.models import PAD, tiny
from tests.models import tokens as random_ids

DOCUMENTS = [random_ids(256 + 31 * n, seed=10 + n) for n in range(4)]


def build(kind: str = "llama", **overrides: Any) -> PreTrainedModel:
    """A tiny model with room for long prompts."""
    return tiny(kind, max_position_embeddings=2048, **overrides)


def joined(*parts: Tensor | int) -> Tensor:
    """`[1, tokens]`: parts as they are, numbers as that many new random tokens."""
    return torch.cat(
        [
            random_ids(part, seed=1000 * at + part) if isinstance(part, int) else part
            for at, part in enumerate(parts)
        ],
        dim=1,
    )


def first_prompt() -> Tensor:
    """All documents, met for the first time."""
    return joined(10, *DOCUMENTS, 20)


def shuffled_prompt() -> Tensor:
    """All documents in another order, behind other text."""
    a, b, c, d = DOCUMENTS
    return joined(23, c, 7, a, d, b, 21)


def padded(*rows: Tensor) -> dict[str, Tensor]:
    """A batch of rows `[1, tokens]` of any length: ids, mask and positions."""
    width = max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - row.shape[1] :] = row
        mask[number, width - row.shape[1] :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@torch.no_grad()
def logits(
    model: PreTrainedModel, prompt: Tensor | dict[str, Tensor], cache: RedisChunkCache | None = None
) -> Tensor:
    """`[rows, vocabulary]` of the next token."""
    given = prompt if isinstance(prompt, dict) else {"input_ids": prompt}
    out = model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)
    last: Tensor = out.logits[:, -1]
    return last


def anywhere(model: PreTrainedModel, store: ChunkStore | str, **settings: Any) -> RedisChunkCache:
    """A cache that moves text."""
    return RedisChunkCache(model, store, reuse="anywhere", **settings)


def meet(model: PreTrainedModel, store: ChunkStore | str, *prompts: Tensor) -> None:
    """Let a store learn prompts, whose own repetitions are not moved."""
    for prompt in prompts or (first_prompt(),):
        logits(model, prompt, anywhere(model, store, repair="full"))


def prefill(
    model: PreTrainedModel,
    store: ChunkStore | str,
    prompt: Tensor | dict[str, Tensor],
    **settings: Any,
) -> tuple[Tensor, Report]:
    """Next-token logits through a new cache, and its report."""
    cache = anywhere(model, store, **settings)
    return logits(model, prompt, cache), cache.report


def close(mine: Tensor, its: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether the largest difference is small beside the largest number."""
    return bool((mine - its).abs().max() <= tolerance * its.abs().max())


def same_answer(mine: Any, its: Any, tolerance: float = 1e-3) -> bool:
    """Whether two outputs of `generate(output_logits=True)` are the same answer.

    Logits may differ by rounding. So may tokens, in half precision, where the likeliest two are
    that close.
    """
    half = any(layer.keys.dtype != torch.float32 for layer in its.past_key_values.layers)
    tolerance = 4e-2 if half else tolerance
    begin = its.sequences.shape[1] - len(its.logits)
    for step, (one, other) in enumerate(zip(mine.logits, its.logits, strict=not half)):
        seen = one.isfinite() & other.isfinite()
        scale = other[seen].abs().max()
        if ((one - other)[seen].abs() > tolerance * scale).any():
            return False
        differ = mine.sequences[:, begin + step] != its.sequences[:, begin + step]
        if differ.any():
            top = other.topk(2).values[differ]
            close_calls = (top[:, 0] - top[:, 1]) <= 2 * tolerance * scale
            return half and bool(close_calls.all())  # behind it the texts are others
    return bool(mine.sequences.shape == its.sequences.shape)
