"""The hook on a model's forward: sees the prompt, asks the cache what is known, trims the call.

All that depends on how Transformers calls a model is here. The hook sits on the top-level model
(which sees `input_ids` and `logits_to_keep` as keywords), is inert for calls with any other cache,
is installed once per model and can be removed.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.errors import UnsupportedCallError

TRAINING = "the model is in training mode: call model.eval()"
# Tensors with one entry per new token along their last dimension: trimmed together.
_PER_TOKEN = ("input_ids", "position_ids", "cache_position")
_UNDERSTOOD = frozenset(
    (
        *_PER_TOKEN,
        "attention_mask",
        "cache",
        "labels",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "return_dict",
        "use_cache",
    )
)


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """What one forward was asked to do.

    Attributes:
        ids: `[batch, new]` token ids, or `None` when the prompt came as embeddings.
        mask: `[batch, past + new]` attention mask, or `None` when nothing is masked.
        positions: `[..., batch, new]` positions, or `None` for the model's default.
        keep: How many tokens at the end have outputs that the caller wants; 0 means all.
        whole: Why outputs of all tokens are wanted, or `""`.
        opaque: Why the K/V of this call cannot be named by its tokens, or `""`.
    """

    ids: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    keep: int
    whole: str
    opaque: str

    @property
    def new(self) -> int:
        """Columns of ids given."""
        return 0 if self.ids is None else self.ids.shape[1]

    def pads(self) -> list[int]:
        """Columns of left padding in each row: the leading zeros of the mask."""
        assert self.ids is not None
        if self.mask is None:
            return [0] * self.ids.shape[0]
        unseen = self.mask == 0
        pads: list[int] = unseen.long().cumprod(dim=1).sum(dim=1).tolist()
        return pads

    def follows(self, past: int, pads: list[int]) -> Tensor | bool:
        """Whether mask and positions are those of rows of text with that much left padding.

        No holes, nothing masked on the right, and each row's positions count its tokens from 0. The
        answer stays on the device, so that asking does not wait for a GPU.

        Args:
            past: Columns that come before the ids of this call.
            pads: Columns of left padding of each row.
        """
        assert self.ids is not None
        batch, total = len(pads), past + self.new
        if self.mask is None and self.positions is None:
            return not any(pads)
        begin = torch.tensor(pads, device=self.ids.device)[:, None]
        column = torch.arange(total, device=self.ids.device)
        sound: Tensor | bool = True
        if self.mask is None:
            if any(pads):
                return False
        elif tuple(self.mask.shape) != (batch, total):
            return False
        else:
            sound = ((self.mask != 0) == (column >= begin)).all()
        if self.positions is None:
            # The default counts columns, padding included.
            return sound if not any(pads) else False
        if self.positions.shape[-1] != self.new:
            return False
        column = column[past:]
        return sound & ((self.positions == column - begin) | (column < begin)).all()

    def first_position(self) -> int | None:
        """The first position given, `None` when there are none."""
        return None if self.positions is None else int(self.positions.reshape(-1)[0])


@dataclass(frozen=True, slots=True)
class Rest:
    """What is left to compute of the ids given.

    Attributes:
        skip: Leave out this many columns of ids on the left.
        columns: Or compute these columns of the ids only, `[queries]`, with what follows.
        positions: Position of each of them in each row, `[batch, queries]`.
        mask: What to pass as attention mask.
    """

    skip: int = 0
    columns: Tensor | None = None
    positions: Tensor | None = None
    mask: Any = None


class PrefillAware(ABC):
    """A cache that the hook talks to."""

    untrimmed: dict[str, Any] | None = None
    """The arguments of a forward that may have to be done again."""

    @abstractmethod
    def begin_forward(self, module: nn.Module, call: ForwardCall) -> Rest:
        """Prepare for a forward. Returns what the model has to compute."""

    @abstractmethod
    def end_forward(self, module: nn.Module) -> bool:
        """Take note that the forward has come back. True if it must be done again, untrimmed."""

    @abstractmethod
    def fail_forward(self) -> None:
        """Take note that the forward raised an exception."""


def is_installed(model: nn.Module) -> bool:
    """Whether a model has the hook."""
    return _before in model._forward_pre_hooks.values()


def install(model: nn.Module) -> None:
    """Put the hook on a model that has none yet."""
    if not is_installed(model):
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, with_kwargs=True, always_call=True)


def uninstall(model: nn.Module) -> None:
    """Take the hook off again; the model is as it was before its first cache."""
    for hooks, ours, flags in (
        (model._forward_pre_hooks, _before, model._forward_pre_hooks_with_kwargs),
        (model._forward_hooks, _after, model._forward_hooks_with_kwargs),
    ):
        for number in [number for number, hook in hooks.items() if hook is ours]:
            del hooks[number]
            flags.pop(number, None)
            model._forward_hooks_always_called.pop(number, None)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # what asks a store is no graph
def _before(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if args:
        kwargs = _by_name(module, args, kwargs)
    cache = cache_in(kwargs)
    if not isinstance(cache, PrefillAware):
        return None
    if kwargs.get("use_cache") is False:
        raise UnsupportedCallError(
            "use_cache=False, of this call or of the model's generation settings, contradicts "
            "past_key_values=RedisChunkCache(...): pass use_cache=True, or no cache"
        )
    rest = cache.begin_forward(module, read_call(module, kwargs))
    cache.untrimmed = kwargs
    return (), trim(kwargs, rest)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    cache = cache_in(kwargs)
    if not isinstance(cache, PrefillAware):
        return None
    if output is None:
        cache.fail_forward()
        return None
    arguments, cache.untrimmed = cache.untrimmed, None
    if cache.end_forward(module):
        return _done_again(module, cache, arguments or {})
    return None


def _done_again(module: nn.Module, cache: PrefillAware, kwargs: dict[str, Any]) -> Any:
    """The output of a forward with the arguments that ours was given.

    Other hooks on the model are applied once: those on its input have been, those on its output
    that come before ours have seen one that is thrown away.
    """
    changed = _before(module, (), kwargs)
    kwargs = changed[1] if changed else kwargs
    try:
        output = module.forward(**kwargs)
    except Exception:
        cache.fail_forward()
        raise
    for number, hook in list(module._forward_hooks.items()):
        if hook is _after:
            break
        seen = (kwargs,) if number in module._forward_hooks_with_kwargs else ()
        result = hook(module, (), *seen, output)
        output = output if result is None else result
    cache.untrimmed = None
    cache.end_forward(module)
    return output


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call: `cache=` since Transformers 5.24, both for now."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by keyword, as `generate` passes them."""
    signature = inspect.signature(module.forward)
    named = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def read_call(module: nn.Module, kwargs: dict[str, Any]) -> ForwardCall:
    """Read a forward's keyword arguments. Never waits for a GPU: it runs at each decoding step."""
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    keep = kwargs.get("logits_to_keep")
    return ForwardCall(
        ids=ids if isinstance(ids, Tensor) and ids.dim() == 2 else None,
        mask=mask if isinstance(mask, Tensor) else None,
        positions=kwargs.get("position_ids"),
        keep=keep if isinstance(keep, int) and keep > 0 else 0,
        whole=_why_whole(module, kwargs, keep),
        opaque=_why_opaque(module, kwargs, ids, mask),
    )


def _why_whole(module: nn.Module, kwargs: dict[str, Any], keep: Any) -> str:
    if kwargs.get("labels") is not None:
        return "labels were given: the loss needs the outputs of every token"
    config: Any = module.config
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        wanted = kwargs.get(name)
        if wanted or (wanted is None and getattr(config, name, False)):
            return f"{name} was asked for: it covers every token"
    if not isinstance(keep, int) or keep <= 0:
        return "logits of every token are wanted (logits_to_keep is not set)"
    return ""


def _why_opaque(module: nn.Module, kwargs: dict[str, Any], ids: Any, mask: Any) -> str:
    if module.training:
        return TRAINING
    if not isinstance(ids, Tensor) or ids.dim() != 2 or kwargs.get("inputs_embeds") is not None:
        return "the prompt has no input_ids (embeddings have no tokens to look up)"
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return "the attention mask is not two-dimensional"
    for name, value in kwargs.items():
        if name not in _UNDERSTOOD and not _is_nothing(value):
            return f"{name} may change what the tokens mean (as an image does)"
    return ""


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (dict, list)) and not value)


def trim(kwargs: dict[str, Any], rest: Rest) -> dict[str, Any]:
    """The arguments for what is left to compute."""
    if not rest.skip and rest.columns is None:
        return kwargs
    kept = slice(rest.skip, None) if rest.columns is None else rest.columns
    new = kwargs["input_ids"].shape[1]
    trimmed = {
        name: kwargs[name][..., kept]
        for name in _PER_TOKEN
        if isinstance(kwargs.get(name), Tensor) and kwargs[name].shape[-1] == new
    }
    if rest.columns is not None:
        trimmed |= {"position_ids": rest.positions, "attention_mask": rest.mask}
    return {**kwargs, **trimmed}
