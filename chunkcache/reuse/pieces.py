"""Pieces: one forward that is done in several, each behind the K/V of those before it.

That bounds the memory of a long prefill. With `reproducible=True` the cuts are at fixed columns,
multiples of `piece_tokens`, whatever the store has: every token is then computed in products of the
same shape, and only whole pieces are stored and read, so that the bits are the same too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

# Tensors with one entry per new token along their last dimension: cut together.
TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
PER_TOKEN = ("input_ids", "position_ids", "cache_position", *TYPES)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Where the columns of a prompt are cut.

    Attributes:
        tokens: Columns of a piece: cuts are at its multiples; 0 for one forward without cuts.
        reproducible: Whether K/V are stored and read in whole pieces alone.
    """

    tokens: int = 0
    reproducible: bool = False

    def floor(self, column: int) -> int:
        """The last cut that is not behind a column."""
        return column // self.tokens * self.tokens

    def cuts(self, begin: int, limit: int) -> tuple[int, ...]:
        """Columns at which a forward from `begin` on is cut.

        Outputs from `limit` on are wanted, and come of the last piece.
        """
        if not self.tokens:
            return ()
        return tuple(range(self.floor(begin) + self.tokens, limit + 1, self.tokens))

    def usable(self, column: int) -> int:
        """How far K/V may be read, or kept, of those that are known up to a column."""
        return self.floor(column) if self.reproducible else column

    def whole(self, limit: int, total: int) -> int:
        """Up to which column a forward with these cuts, that ends at `total`, has whole pieces."""
        last = self.floor(limit)
        return total if total - last == self.tokens else last


def run_pieces(
    module: nn.Module,
    kwargs: dict[str, Any],
    skip: int,
    cuts: Sequence[int],
    after: Callable[[int], None],
) -> dict[str, Any]:
    """Compute all pieces of a forward but the last. Returns the arguments for that one.

    Args:
        module: The model. Hooks on it, unlike those on its parts, see the last piece alone.
        kwargs: The arguments of the forward, by name, with a cache in which the first columns are.
        skip: Columns of the ids given that are in the cache already.
        cuts: Columns of the ids given at which it is cut.
        after: Called after each piece with its end.
    """
    for start, stop in zip((skip, *cuts), cuts, strict=False):
        module.forward(**piece(kwargs, start, stop))
        after(stop)
    return piece(kwargs, cuts[-1] if cuts else skip)


def piece(kwargs: dict[str, Any], start: int, stop: int | None = None) -> dict[str, Any]:
    """The arguments for columns `start` to `stop` of the ids given, or for all from `start` on."""
    part = chosen(kwargs, slice(start, stop))
    if stop is not None:
        if part.get("logits_to_keep") is not None:
            part["logits_to_keep"] = 1  # nobody looks at them
        if isinstance(mask := part.get("attention_mask"), Tensor):
            behind = kwargs["input_ids"].shape[1] - stop
            part["attention_mask"] = mask[:, : mask.shape[1] - behind]
    return part


def chosen(kwargs: dict[str, Any], columns: slice | Tensor) -> dict[str, Any]:
    """The arguments for some columns of the ids given, the last among them; with the whole mask."""
    new, keep = kwargs["input_ids"].shape[1], kwargs.get("logits_to_keep")
    part: dict[str, Any] = {
        name: kwargs[name][..., columns]
        for name in PER_TOKEN
        if isinstance(kwargs.get(name), Tensor) and kwargs[name].shape[-1] == new
    }
    if isinstance(keep, Tensor):  # counted from the end, which stays where it is
        part["logits_to_keep"] = torch.where(keep < 0, keep, keep - new)
    return {**kwargs, **part}


def environment(model: nn.Module) -> str:
    """What bits depend on besides model, tokens and pieces, as text."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        where = f"{torch.backends.cpu.get_cpu_capability()} threads={torch.get_num_threads()}"
        where += f" mkldnn={torch.backends.mkldnn.enabled}"
    elif device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)} tf32={torch.backends.cuda.matmul.allow_tf32}"
    else:
        where = device.type
    return f"torch={torch.__version__} transformers={transformers.__version__} {where}"
