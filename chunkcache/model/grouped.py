"""Grouped-query attention behind many tokens that are held, without copies of their K/V.

With a mask, as a few tokens behind others have one, Transformers' sdpa attention copies all K/V to
every query head, in each layer. PyTorch's CPU kernel need not have that, and gives the same bits
without: SmolLM2 behind 1,900 tokens, one thread, takes 0.69 to 0.85 of the time for 2 to 64 tokens.
On other devices a mask with grouped heads may mean a slower kernel: there Transformers decides.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps

import torch
from torch import Tensor
from transformers.integrations import sdpa_attention

_TRIMMED = ContextVar("chunkcache_trimmed", default=False)


def share_heads(trimmed: bool) -> None:
    """Say whether the forward that this thread runs next is of tokens behind others."""
    _TRIMMED.set(trimmed)


def _deciding(
    theirs: Callable[[Tensor | None, Tensor, Tensor], bool],
) -> Callable[[Tensor | None, Tensor, Tensor], bool]:
    @wraps(theirs)
    def use_gqa_in_sdpa(attention_mask: Tensor | None, key: Tensor, value: Tensor) -> bool:
        ours = not torch.compiler.is_compiling() and _TRIMMED.get()
        if ours and key.device.type == "cpu" and attention_mask is not None:
            return attention_mask.shape[2] > 1  # one token is computed without copies anyway
        return theirs(attention_mask, key, value)

    return use_gqa_in_sdpa


# Of this thread's trimmed forwards alone, it decides otherwise than before.
sdpa_attention.use_gqa_in_sdpa = _deciding(  # type: ignore[assignment]
    sdpa_attention.use_gqa_in_sdpa
)
