"""The hook on a model's forward: sees the prompt, asks the cache what is known, trims the call.

How a forward's arguments are read and cut is here. The hook sits on the top-level model (which sees
`input_ids` and `logits_to_keep` as keywords), is inert for calls with any other cache, is installed
once per model and can be removed. What else depends on how `generate()` works: how it begins
(`cache.py`), its frames (`owner.py`), its positions (`resume.py`).
"""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from chunkcache.errors import UnsupportedCallError
from chunkcache.kv.transfer import is_host
from chunkcache.model.grouped import share_heads
from chunkcache.model.head import HeadInput, feed, untap
from chunkcache.reuse.pieces import PER_TOKEN, TYPES, chosen, piece, run_pieces
from chunkcache.tokens.transcript import Padding

INSTALLING = RLock()  # held by who puts the hook on or takes it off
NO_LABEL = -100  # of tokens that a loss leaves out
TRAINING = "the model is in training mode: call model.eval()"
_UNDERSTOOD = frozenset(
    (
        *PER_TOKEN,
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
# What generate() takes for itself: some ways of decoding hand it on to the model, as they do with
# tokenizers. The last scales a loss. Not the model's unless a forward in it has such a parameter.
_OF_GENERATE = frozenset(
    (
        *inspect.signature(GenerationMixin.generate).parameters,
        "assistant_tokenizer",
        "tokenizer",
        "num_items_in_batch",
    )
) - {"self", "inputs", "kwargs"}


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """What one forward was asked to do.

    Attributes:
        ids: `[batch, new]` token ids, or `None` when the prompt came as embeddings.
        mask: `[batch, past + new]` attention mask, or `None` when nothing is masked.
        positions: `[..., batch, new]` positions, or `None` for the model's default.
        keep: How many tokens at the end have outputs that the caller wants; 0 means all.
        full_reason: Why outputs of all tokens are wanted, so that none may be trimmed, or `""`.
        scores: Whether logits of several tokens are wanted, and nothing else of them.
        logits_to_keep: As the caller gave it.
        labels: As the caller gave them.
        bypass_reason: Why the K/V of this call cannot be named by its tokens, or `""`.
        drafts: How many tokens at the end may be taken back, as in assisted generation.
        beyond: What the K/V depend on besides the tokens (as an image), in words, or `""`.
        embedded: Rows and columns of embeddings that came in place of ids, or `None`.
        types: `[batch, new]` token type ids, by the name of the argument.
        features: Vectors that encoded images and videos bring, or `None` where that is not known.
        device: Where ids were given that are elsewhere now (see `on_host`), or embeddings.
    """

    ids: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    keep: int
    full_reason: str
    bypass_reason: str
    scores: bool = False
    logits_to_keep: Any = None
    labels: Tensor | None = None
    drafts: int = 0
    beyond: str = ""
    embedded: tuple[int, int] | None = None
    types: Mapping[str, Tensor] = field(default_factory=dict)
    features: int | None = None
    device: torch.device | None = None

    @property
    def away(self) -> dict[str, Tensor]:
        """What is looked at, and lies on a device: by name, for `on_host`."""
        if self.ids is None:
            return {}
        given = {"ids": self.ids, "positions": self.positions, "mask": self.mask, **self.types}
        away = {n: x for n, x in given.items() if x is not None and not is_host(x.device)}
        if "mask" in away:
            if away["mask"].dim() == 2:
                away["mask"] = away["mask"] != 0
            else:
                del away["mask"]
        return away

    def on_host(self, brought: Mapping[str, Tensor]) -> ForwardCall:
        """The same, of which these were brought to the host."""
        if self.ids is None or not brought:
            return self
        types = {name: brought.get(name, x) for name, x in self.types.items()}
        others: Any = {name: x for name, x in brought.items() if name not in types}
        return replace(self, types=types, device=self.ids.device, **others)

    @property
    def place(self) -> torch.device:
        """Where the caller has put the ids, and so where the model is."""
        if self.device is not None:
            return self.device
        return torch.device("cpu") if self.ids is None else self.ids.device

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the ids given, or of the embeddings."""
        if self.embedded is not None:
            return self.embedded
        return (1, 0) if self.ids is None else (self.ids.shape[0], self.ids.shape[1])

    @property
    def new(self) -> int:
        """Columns of ids given, or of embeddings."""
        return self.shape[1]

    def pads(self) -> list[int]:
        """Columns of left padding in each row: the leading zeros of the mask."""
        if self.mask is None or self.mask.dim() != 2:
            return [0] * self.shape[0]
        unseen = self.mask == 0
        pads: list[int] = unseen.long().cumprod(dim=1).sum(dim=1).tolist()
        return pads

    def follows(self, past: int, pads: list[int] | Padding) -> Tensor | bool:
        """Whether mask and positions are those of rows of text with that much left padding.

        No gaps, nothing masked on the right, and each row's positions count its tokens from 0. The
        answer stays on the device, so that asking does not wait for a GPU.

        Args:
            past: Columns that come before the ids of this call.
            pads: Columns of left padding of each row.
        """
        sound = self._sound(past, pads)
        return sound if isinstance(sound, bool) else sound.all()

    def text_columns(self, past: int, pads: list[int]) -> int:
        """How many columns from the first on, past ones included, satisfy `follows`."""
        sound = self._sound(past, pads)
        if isinstance(sound, bool):
            return past + self.new if sound else 0
        return int(sound.long().cumprod(dim=0).sum())

    def _sound(self, past: int, pads: list[int] | Padding) -> Tensor | bool:
        """As `follows`, for each column (`[past + new]`), or one answer for all of them."""
        assert self.ids is not None
        padding = pads if isinstance(pads, Padding) else Padding.of(pads, self.ids.device)
        begin = padding.columns
        batch, total = len(begin), past + self.new
        if self.mask is None and self.positions is None:
            return not padding.is_any
        column = torch.arange(total, device=self.ids.device)
        sound = torch.ones_like(column, dtype=torch.bool)
        if self.mask is None:
            if padding.is_any:
                return False
        elif tuple(self.mask.shape) != (batch, total):
            return False
        else:
            sound = ((self.mask != 0) == (column >= begin)).all(dim=0)
        if self.positions is None:
            # The default counts columns, padding included.
            return sound if not padding.is_any else False
        if self.positions.shape[-1] != self.new:
            return False
        column = column[past:]
        placed = (self.positions == column - begin) | (column < begin)
        return torch.cat([sound[:past], sound[past:] & placed.reshape(-1, self.new).all(dim=0)])

    def first_position(self) -> int | None:
        """The first position of the first row, `None` when there are none."""
        return None if self.positions is None else int(first_row(self.positions)[0])


@dataclass(frozen=True, slots=True)
class TrimSpec:
    """What is left to compute of the ids given: all behind a prefix, or scattered columns.

    Attributes:
        skip: Prefix reuse: leave out this many columns of ids on the left.
        cuts: Columns of the ids at which the forward is cut into pieces (see `pieces.py`).
        number_from: Position of the first id, for a model that is to be given positions.
        columns: Reuse anywhere: compute only these columns of the ids, `[queries]`, with the
            positions and mask below.
        positions: Position of each of them in each row, `[batch, queries]`.
        mask: What to pass as attention mask.
        head: What sees, and completes, the input of the output embeddings; then the model is to
            give it all tokens that it computes.
    """

    skip: int = 0
    cuts: tuple[int, ...] = ()
    number_from: int | None = None
    columns: Tensor | None = None
    positions: Tensor | None = None
    mask: Any = None
    head: HeadInput | None = None


NOTHING_TRIMMED = TrimSpec()


def first_row(positions: Tensor) -> Tensor:
    """Positions of the first row, `[tokens]`, on the last axis where there are several."""
    while positions.dim() > 2:
        positions = positions[-1]
    return positions.reshape(-1, positions.shape[-1])[0]


class PrefillAware(ABC):
    """A cache that the hook talks to."""

    untrimmed: dict[str, Any] | None = None
    """The arguments of a forward that may have to be done again."""
    on_output: Callable[[Any], Any] | None = None
    """What makes of a forward's output what its caller gets, who knows of no cache."""

    @abstractmethod
    def begin_forward(self, module: nn.Module, call: ForwardCall) -> TrimSpec:
        """Prepare for a forward. Returns what the model has to compute."""

    @abstractmethod
    def end_piece(self, columns: int) -> None:
        """Take note that a piece of the forward has come back, after so many columns of its ids."""

    @abstractmethod
    def end_forward(self) -> bool:
        """Take note that the forward has come back. True if it must be done again, untrimmed."""

    @abstractmethod
    def fail_forward(self) -> None:
        """Take note that the forward raised an exception."""


def cover(model: nn.Module, give: Cover | None) -> None:
    """Have forwards of a model without a cache given one, or no more; it has the hook."""
    if give is None:
        _COVERS.pop(model, None)
    else:
        _COVERS[model] = give


def is_installed(model: nn.Module) -> bool:
    """Whether a model has the hook."""
    return _before in model._forward_pre_hooks.values()


def install(model: nn.Module) -> None:
    """Put the hook on a model that has none yet."""
    with INSTALLING:
        if not is_installed(model):
            model.register_forward_pre_hook(_before, with_kwargs=True)
            model.register_forward_hook(_after, with_kwargs=True, always_call=True)


def uninstall(model: nn.Module) -> None:
    """Take the hook off again; the model is as it was before its first cache."""
    with INSTALLING:
        for hooks, ours, flags in (
            (model._forward_pre_hooks, _before, model._forward_pre_hooks_with_kwargs),
            (model._forward_hooks, _after, model._forward_hooks_with_kwargs),
        ):
            for number in [number for number, hook in hooks.items() if hook is ours]:
                del hooks[number]
                flags.pop(number, None)
                model._forward_hooks_always_called.pop(number, None)
        untap(model)


# A hook and the flag that says how to call it are two entries: a forward of another thread that
# begins between them, when the hook is put on or taken off, calls it without keyword arguments.
# Such a forward has no cache of ours.


@torch.compiler.disable  # type: ignore[untyped-decorator]  # what asks a store is no graph
def _before(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    _clear()
    if kwargs is None:
        return None
    if args:
        kwargs = _by_name(module, args, kwargs)
    cache = cache_in(kwargs)
    if cache is None and (give := _COVERS.get(module)) is not None:
        kwargs = give(kwargs)
        cache = cache_in(kwargs)
    if not isinstance(cache, PrefillAware):
        return None
    if kwargs.get("use_cache") is False:
        raise UnsupportedCallError(
            "use_cache=False, of this call, of the model's generation settings or of a wrapper "
            "that always sets it (as X-LoRA does), contradicts "
            "past_key_values=RedisChunkCache(...): pass use_cache=True, or no cache"
        )
    rest = cache.begin_forward(module, read_call(module, kwargs))
    cache.untrimmed = kwargs
    if rest.number_from is not None and "position_ids" in _parameters(module):
        first, ids = rest.number_from, kwargs["input_ids"]
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)
        kwargs = {**kwargs, "position_ids": positions.expand(ids.shape)}
    kwargs = trim(kwargs, rest)
    share_heads(bool(rest.skip or rest.cuts) or rest.columns is not None)
    if rest.cuts:
        kwargs = run_pieces(module, kwargs, rest.skip, rest.cuts, cache.end_piece)
    feed(rest.head)
    return (), kwargs


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
    if len(rest) == 1:  # the output alone
        return None
    kwargs, output = rest
    cache = cache_in(kwargs)
    if not isinstance(cache, PrefillAware):
        return None
    _clear()
    on_output, cache.on_output = cache.on_output, None
    if output is None:
        cache.fail_forward()
        return None
    arguments, cache.untrimmed = cache.untrimmed, None
    again = cache.end_forward()
    if again:
        output = _done_again(module, cache, arguments or {})
    if on_output is not None:
        return on_output(output)
    return output if again else None


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
    finally:
        _clear()
    for number, hook in list(module._forward_hooks.items()):
        if hook is _after:
            break
        seen = (kwargs,) if number in module._forward_hooks_with_kwargs else ()
        result = hook(module, (), *seen, output)
        output = output if result is None else result
    cache.untrimmed = None
    cache.end_forward()
    return output


def _clear() -> None:
    """Nothing that was said of one forward holds for another."""
    feed(None)
    share_heads(False)


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
    embeds = kwargs.get("inputs_embeds")
    if embeds is not None or not isinstance(ids, Tensor) or ids.dim() != 2:
        ids = None
    wanted = kwargs.get("logits_to_keep")
    keep = _last_wanted(wanted, 0 if ids is None else ids.shape[1])
    beyond = _beyond(module, kwargs, ids is not None, mask)
    labels, positions = kwargs.get("labels"), kwargs.get("position_ids")
    others = _why_others(module, kwargs)
    return ForwardCall(
        ids=ids,
        mask=_beside(ids, mask) if isinstance(mask, Tensor) else None,
        positions=_beside(ids, positions) if isinstance(positions, Tensor) else positions,
        keep=keep,
        full_reason=others or _why_full(labels, keep),
        scores=not others and (keep != 1 or labels is not None),
        logits_to_keep=wanted,
        labels=labels,
        bypass_reason=TRAINING if module.training else beyond,
        drafts=max(keep - 1, 0) if isinstance(wanted, int) else 0,
        beyond=beyond,
        device=embeds.device if isinstance(embeds, Tensor) else None,
        embedded=(embeds.shape[0], embeds.shape[1]) if isinstance(embeds, Tensor) else None,
        types={name: kwargs[name] for name in TYPES if isinstance(kwargs.get(name), Tensor)},
        features=_features(kwargs.get("mm_encoder_outputs")),
    )


def _beside(ids: Tensor | None, given: Tensor) -> Tensor:
    """The same where the ids are: Transformers moves a mask that was left on the CPU."""
    return given if ids is None else given.to(ids.device, non_blocking=True)


def _features(encoded: Any) -> int | None:
    """Rows of features in `mm_encoder_outputs`: one for each placeholder among the ids."""
    if not isinstance(encoded, dict):
        return None
    pooled = [getattr(output, "pooler_output", None) for output in encoded.values() if output]
    parts = [part for features in pooled if features is not None for part in features]
    return sum(part.numel() // part.shape[-1] for part in parts) if parts else None


def _last_wanted(keep: Any, new: int) -> int:
    """Of `new` tokens, how many at the end hold all whose outputs are wanted; 0 means all.

    `logits_to_keep` is a number of tokens or a tensor of indices, for which a GPU is waited for:
    `generate()` passes none.
    """
    if isinstance(keep, int):
        return max(keep, 0)
    if not isinstance(keep, Tensor) or keep.dtype not in (torch.int32, torch.int64):
        return 0
    first = min((i + new if i < 0 else i for i in keep.flatten().tolist()), default=-1)
    return new - first if 0 <= first < new else 0


def _why_others(module: nn.Module, kwargs: dict[str, Any]) -> str:
    """Why more than logits is wanted of all tokens, or `""`."""
    config: Any = module.config
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        wanted = kwargs.get(name)
        if wanted or (wanted is None and getattr(config, name, False)):
            return f"{name} was asked for: it covers every token"
    return ""


def _why_full(labels: Any, keep: int) -> str:
    """Why logits of all tokens are wanted, or `""`."""
    if labels is not None:
        return "labels were given: the loss needs the outputs of every token"
    if not keep:
        return "logits of every token are wanted (logits_to_keep is not set)"
    return ""


def _beyond(module: nn.Module, kwargs: dict[str, Any], named: bool, mask: Any) -> str:
    """What else than tokens, mask and positions the K/V may depend on."""
    if not named:
        return (
            "the prompt has no input_ids: embeddings have no tokens to look up (PEFT's prompt "
            "tuning and P-tuning turn a prompt into them)"
        )
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return "the attention mask is not two-dimensional"
    for name, value in kwargs.items():
        if name in _UNDERSTOOD or _is_nothing(value):
            continue
        if name in TYPES and isinstance(value, Tensor):
            continue  # looked at when a prompt comes: see `ForwardCall.types`
        if name not in _OF_GENERATE or name in _parameters(module):
            return may_change(name)
    return ""


def may_change(name: str) -> str:
    """Why a call with this argument is not known by its tokens."""
    return f"{name} may change what the tokens mean (as an image does)"


def _parameters(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of every forward in a model."""
    if model not in _PARAMETERS:
        kinds = {type(part) for part in model.modules()}
        names = (inspect.signature(kind.forward).parameters for kind in kinds)
        _PARAMETERS[model] = frozenset().union(*names)
    return _PARAMETERS[model]


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (dict, list)) and not value)


def trim(kwargs: dict[str, Any], rest: TrimSpec) -> dict[str, Any]:
    """The arguments for what is left to compute, where that is not done in pieces."""
    if rest.head is not None and kwargs.get("logits_to_keep") is not None:
        kwargs = {**kwargs, "logits_to_keep": 0}
    if rest.columns is not None:
        scattered = {"position_ids": rest.positions, "attention_mask": rest.mask}
        return chosen(kwargs, rest.columns) | scattered
    return piece(kwargs, rest.skip) if rest.skip and not rest.cuts else kwargs


Cover = Callable[[dict[str, Any]], dict[str, Any]]
"""Gives the arguments of a forward that brings no cache, with one or as they are."""
_COVERS: weakref.WeakKeyDictionary[nn.Module, Cover] = weakref.WeakKeyDictionary()
_PARAMETERS: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()
