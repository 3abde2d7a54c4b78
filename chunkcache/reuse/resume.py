"""Resume: how `generate()` goes on from K/V that tokens alone do not name, or not at all.

A `DynamicCache` cuts the ids that it is told it holds off a prompt, unseen. Here they are compared
first; but where an image, embeddings or a user's own K/V are held, equal ids do not say enough.
Positions are a matter of their own: `generate()` prepares them for the length held before it says
that a prompt comes, and models of several position axes then prepare other ones than for a prompt
without a past. What can be told apart goes on as with a `DynamicCache`, the rest is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from chunkcache.errors import UnsupportedCallError
from chunkcache.reuse.hook import ForwardCall, first_row
from chunkcache.tokens.transcript import Transcript

_REMEDY = (
    ": call cache.reset() before a new prompt; to continue, pass input_ids of the new tokens alone "
    "and an attention_mask over all"
)
_FORMS = ("id", "index")
_PREPARE = "_prepare_position_ids_for_generation"


def plain_columns(
    module: nn.Module, call: ForwardCall, transcript: Transcript, held: int, follows_at: int
) -> int:
    """Columns to keep of those held, when a whole prompt is given that they may belong to.

    Asked where not both, what is held and what is given, are known by their tokens. 0 means that
    the prompt is computed anew.

    Args:
        module: The model.
        call: The prompt.
        transcript: Ids of what is held.
        held: Columns held.
        follows_at: Position of the token behind what is held, in the first row.

    Raises:
        UnsupportedCallError: It cannot be told, or the positions are for something else.
    """
    if call.ids is None:
        return 0
    if not transcript.is_named:
        raise UnsupportedCallError(
            "this cache holds K/V of embeddings, so it cannot be told whether input_ids continue "
            "them" + _REMEDY
        )
    common = transcript.common_columns(call.ids, call.pads())
    if not call.beyond:
        check_not_a_part(common, call, held)
    in_all, in_new = (_placeholders(module, ids) for ids in (call.ids, call.ids[:, held:]))
    # Models differ in what they want of the types of new tokens: of these alone, or of all.
    typed = any(bool((types[..., held:] != 0).any()) for types in call.types.values())
    if held == common < call.new and not typed:
        if not call.beyond:
            goes_on = bool(in_all) or not call.types  # else types may differ where ids do not
        elif call.features is None:
            goes_on = 0 < in_new == in_all
        else:
            goes_on = call.features == in_new
        if goes_on:
            if not _continues(module, call, held, follows_at):
                raise UnsupportedCallError(
                    "the position_ids are not those of a prompt that continues what this cache "
                    "holds" + _REMEDY
                )
            return held
    if in_all and not (call.beyond and call.features in (None, in_all)):
        raise UnsupportedCallError(
            "input_ids name an image (or the like) that is not given, and do not simply continue "
            "what this cache holds" + _REMEDY
        )
    return 0


def check_not_a_part(common: int, call: ForwardCall, held: int) -> None:
    """Raise if a prompt is but the beginning of what is held: there may be more to come.

    With `prefill_chunk_size` a prompt comes in pieces, and only what is held whole can be continued
    where ids do not name it.

    Raises:
        UnsupportedCallError: It is.
    """
    if common == call.new < held:
        raise UnsupportedCallError(
            "this prompt (or its first piece, with prefill_chunk_size) is the beginning of what "
            "this cache holds besides, which its ids do not name (an image, K/V changed by others)"
            + _REMEDY
        )


def check_anew(module: nn.Module, call: ForwardCall) -> None:
    """Raise if positions were prepared for what is held, and the prompt is to be computed anew.

    Raises:
        UnsupportedCallError: They were, or may have been.
    """
    if call.positions is None or not _prepares_its_own(module):
        return
    # Those of an image are in several axes and skip some numbers. None would mean that the model
    # has only counted on from what was held.
    sound = not _counts(call, 0) if call.beyond else _is_text(call)
    if not sound:
        raise UnsupportedCallError(
            "this cache was given a new prompt, but generate() has prepared the position_ids for "
            "one that continues what it holds" + _REMEDY
        )


def _continues(module: nn.Module, call: ForwardCall, held: int, follows_at: int) -> bool:
    if call.positions is None or call.positions.shape[-1] != call.new:
        return call.positions is None
    if call.beyond and _prepares_its_own(module):
        return not _counts(call, held)
    return int(first_row(call.positions)[held]) == follows_at


def _prepares_its_own(module: nn.Module) -> bool:
    own = getattr(type(module), _PREPARE, None)
    return own is not getattr(GenerationMixin, _PREPARE, None)


def _is_text(call: ForwardCall) -> bool:
    """Whether positions count the tokens that are not masked, from 0."""
    assert call.positions is not None
    expected, seen = _text_positions(call)
    if call.positions.shape[-1] != expected.shape[-1]:
        return False
    return bool(((call.positions == expected) | ~seen).all())


def _counts(call: ForwardCall, start: int) -> bool:
    """Whether positions from a column on go up by one with each token, on all axes."""
    assert call.positions is not None
    expected, seen = _text_positions(call)
    if call.positions.shape[-1] != expected.shape[-1]:
        return False
    ahead = (call.positions - expected)[..., start:]
    return bool(((ahead == ahead[..., -1:]) | ~seen[..., start:]).all())


def _text_positions(call: ForwardCall) -> tuple[Tensor, Tensor]:
    """What positions of text are, `[rows, columns]`, and which columns are not masked."""
    assert call.positions is not None
    rows, columns = call.shape
    seen = torch.ones((rows, columns), dtype=torch.bool, device=call.positions.device)
    if call.mask is not None and tuple(call.mask.shape) == (rows, columns):
        seen = call.mask.to(seen.device) != 0
    return seen.long().cumsum(dim=-1) - 1, seen


def _placeholders(module: nn.Module, ids: Tensor) -> int:
    """How many of these tokens stand for a part of an image, a video or a sound."""
    config: Any = module.config
    names = (f"{kind}_token_{form}" for kind in ("image", "video", "audio") for form in _FORMS)
    marks = {mark for name in names if isinstance(mark := getattr(config, name, None), int)}
    return sum(int((ids == mark).sum()) for mark in marks)
