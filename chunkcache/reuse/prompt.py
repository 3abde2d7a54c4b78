"""Prompt: token ids as users hand them to `audit` and `explain`, checked and in one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.errors import SettingError
from chunkcache.reuse.hook import TRAINING, ForwardCall


@dataclass(frozen=True, slots=True)
class Prompt:
    """`ids` and `mask`, `[batch, tokens]` int64 each, on the CPU; the mask is 0 at padding."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, input_ids: Any, attention_mask: Any = None) -> Prompt:
        """Read a prompt.

        Args:
            input_ids: Token ids, `[batch, tokens]` or `[tokens]`: a tensor, an array or lists.
            attention_mask: Of the same shape, 0 at padding; `None` where there is no padding.

        Raises:
            SettingError: They are not that.
        """
        ids = read_ids("input_ids", input_ids)
        if not ids.numel():
            raise SettingError("input_ids has no tokens: pass a prompt of at least one token")
        if attention_mask is None:
            return cls(ids, torch.ones_like(ids))
        mask = read_ids("attention_mask", attention_mask)
        if mask.shape != ids.shape:
            raise SettingError(
                f"attention_mask is {list(mask.shape)} and input_ids {list(ids.shape)}: "
                "both must be [batch, tokens]"
            )
        return cls(ids, (mask != 0).long())

    @property
    def positions(self) -> Tensor:
        """Each token's place among the tokens of its row, `[batch, tokens]`; 0 at padding."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    def as_call(self, model: nn.Module) -> ForwardCall:
        """The forward that `generate()` would make of it."""
        reason = TRAINING if model.training else ""
        return ForwardCall(
            self.ids, self.mask, self.positions, 1, full_reason="", bypass_reason=reason
        )

    def followed_by(self, ids: Tensor) -> Prompt:
        """The prompt with `[batch, new]` more ids behind it."""
        mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        return Prompt(torch.cat([self.ids, ids], dim=1), mask)


def read_ids(name: str, value: Any) -> Tensor:
    """Whole numbers as `[rows, tokens]`, on the CPU; one row of them may come without its list.

    Raises:
        SettingError: `value` is something else. `name` is what the message calls it.
    """
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise SettingError(
            f"{name} must be numbers of shape [batch, tokens], such as "
            f'tokenizer(text, return_tensors="pt").{name}, with shorter rows padded on the left; '
            f"not this {type(value).__name__} ({error})"
        ) from error
    if (ids.is_floating_point() and ids.numel()) or ids.is_complex() or ids.dim() not in (1, 2):
        raise SettingError(
            f"{name} must be whole numbers of shape [batch, tokens] or [tokens], not {ids.dtype} "
            f"of shape {list(ids.shape)}"
        )
    ids = ids.detach().to("cpu", torch.long)
    return ids if ids.dim() == 2 else ids[None]
