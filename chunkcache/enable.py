"""enabled(): every `generate()` of a model uses the cache, for code that cannot pass one itself.

Pipelines, evaluation harnesses and agents call `model.generate()` out of reach. While a context is
open, a `generate` that makes a cache for each call covers the model's own. With `forwards=True`, so
does each forward that brings none: losses, perplexities and log-likelihoods are made with such.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.cache import RedisChunkCache
from chunkcache.errors import SettingError
from chunkcache.model.check import CACHE, TAKES_A_CACHE, check_model
from chunkcache.model.self_test import takes
from chunkcache.model.state import ModelState
from chunkcache.report import Report
from chunkcache.reuse.hook import (
    INSTALLING,
    NO_LABEL,
    TRAINING,
    cache_in,
    cover,
    is_installed,
    uninstall,
)
from chunkcache.stores.base import ChunkStore
from chunkcache.stores.locks import ForkSafeLock


@dataclass(eq=False)
class Enabled:
    """An open context.

    Attributes:
        store: Where chunks are looked up and kept.
        settings: Keyword arguments for each cache.
        forwards: Whether forwards without a cache use one too.
        last_outputs: How many positions at the end of these have logits; 0 for all.
        report: What was reused of the last prompt.
    """

    store: ChunkStore
    settings: Mapping[str, Any]
    forwards: bool = False
    last_outputs: int = 0
    report: Report = field(default_factory=Report)
    thread: int = field(default_factory=get_ident)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all chunks are written. False if `timeout` seconds passed before."""
        return self.store.flush(timeout)


@contextmanager
def enabled(
    model: nn.Module,
    store: ChunkStore | str | list[str] | None = None,
    *,
    forwards: bool = False,
    last_outputs: int = 0,
    **settings: Any,
) -> Iterator[Enabled]:
    """Within this context, each `model.generate()` uses a `RedisChunkCache` of its own.

    ```python
    with chunkcache.enabled(model, "redis://localhost:6379/0") as context:
        pipeline("text-generation", model=model, tokenizer=tokenizer)(prompts)
    print(context.report)
    ```

    Calls that bring a cache, or want none (`use_cache=False`, a static cache), are not changed.
    Contexts may be nested and be open in several threads: a call takes the innermost one of its own
    thread; a thread that opened none, as a streamer's, takes the latest. Afterwards the model is
    as it was.

    Args:
        model: As for `RedisChunkCache`.
        store: As for `RedisChunkCache`.
        forwards: Also forwards that bring no cache use one, `use_cache=False` or not, unless
            gradients are enabled. Logits and losses are those of a plain run; of padding on the
            left, logits are NaN. The last, shorter chunk of a row is stored only with
            `store_tail=True`, as each call may end otherwise.
        last_outputs: Of these, only logits of the last so many positions are looked at: before
            them they are NaN, and need not be computed. 0 for all. Calls whose labels count earlier
            positions, or that say themselves what they keep, are served as they are.
        settings: Keyword arguments as in `Settings`.

    Raises:
        UnsupportedModelError: As `RedisChunkCache`, at once.
        UnsupportedCallError: As `RedisChunkCache`, at once.
        SettingError: As `RedisChunkCache`, at once; or `last_outputs` is below 0, or has no use.
    """
    if last_outputs < 0 or (last_outputs and not forwards):
        raise SettingError(
            f"last_outputs={last_outputs} must be 0 or a number of positions, with forwards=True"
        )
    inner = check_model(model)
    over = context = None
    try:
        with _LOCK.own:
            hooked = is_installed(inner)
            try:
                # What cannot work is told of here, before any prompt.
                opened = RedisChunkCache(inner, store, **settings).store
                context = Enabled(opened, settings, forwards, last_outputs)
            except BaseException:
                _unhook(inner, hooked)
                raise
            over = _COVERS.setdefault(id(inner), _Cover(inner, hooked))
            over.open(context)
        yield context
    finally:
        if over is not None and context is not None:
            with _LOCK.own:
                over.close(context)


class _Cover:
    """What lies over a model's `generate` as long as contexts are open."""

    def __init__(self, model: Any, hooked: bool) -> None:
        self.model, self.hooked = model, hooked
        self.contexts: list[Enabled] = []
        self.own = vars(model).get("generate")  # somebody else's cover, if there is one
        self.generate = model.generate

    def open(self, context: Enabled) -> None:
        self.contexts.append(context)
        if len(self.contexts) == 1:

            @functools.wraps(self.generate)
            def generate(*args: Any, **kwargs: Any) -> Any:
                return self.call(args, kwargs)

            self.model.generate = generate
            cover(self.model, self.give)

    def close(self, context: Enabled) -> None:
        if context in self.contexts:  # not if its opening was interrupted
            self.contexts.remove(context)
        if self.contexts:
            return
        _COVERS.pop(id(self.model), None)
        cover(self.model, None)
        if self.own is None:
            vars(self.model).pop("generate", None)
        else:
            self.model.generate = self.own
        _unhook(self.model, self.hooked)

    def context(self) -> Enabled | None:
        """That of a call by this thread."""
        contexts = [*self.contexts]  # empty for who kept it longer than the context
        mine = [context for context in contexts if context.thread == get_ident()]
        return (mine or contexts)[-1] if contexts else None

    def give(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward that brings no cache, with one if that may be."""
        context = self.context()
        if context is None or not context.forwards or getattr(_LOCAL, "generates", False):
            return kwargs
        if torch.is_grad_enabled() or self.model.training:
            why = TRAINING if self.model.training else "gradients are enabled: use torch.no_grad()"
            context.report = Report(skipped=why)
            return kwargs
        settings = {"store_tail": False, **context.settings}
        cache = RedisChunkCache(self.model, context.store, **settings)
        config: Any = self.model.config
        keeps = kwargs.get("use_cache")
        keeps = getattr(config, "use_cache", True) if keeps is None else keeps
        given = {**kwargs, CACHE: cache, "use_cache": True}
        last = context.last_outputs
        if last and _may_end_with(self.model, kwargs, last):
            # By index: of a number, generate() may take tokens back again.
            ids = kwargs["input_ids"]
            last = min(last, ids.shape[1])
            given["logits_to_keep"] = torch.arange(-last, 0, device=ids.device)
            if kwargs.get("labels") is not None:
                given["labels"] = kwargs["labels"][:, -last:]
        else:
            last = 0

        def finish(output: Any) -> Any:
            context.report = cache.report
            if last:
                output.logits = _behind_nothing(output.logits, kwargs["input_ids"].shape[1])
            return output if keeps else _without(output, cache)

        cache.on_output = finish
        return given

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outer, _LOCAL.generates = getattr(_LOCAL, "generates", False), True
        try:
            return self._call(args, kwargs)
        finally:
            _LOCAL.generates = outer

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = self.context()
        if context is None or self._is_of_its_own(args, kwargs):
            return self.generate(*args, **kwargs)
        cache = RedisChunkCache(self.model, context.store, **context.settings)
        try:
            return self.generate(*args, **{**kwargs, CACHE: cache})
        except BaseException:  # whose traceback holds the cache: nobody will use it
            ModelState.of(self.model).caches.discard(cache)
            raise
        finally:
            context.report = cache.report

    def _is_of_its_own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call says itself what cache it wants."""
        if cache_in(kwargs) is not None:
            return True
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        for source in (kwargs, vars(config or self.model.generation_config)):
            implementation = source.get("cache_implementation")
            if source.get("use_cache") is False or implementation not in TAKES_A_CACHE:
                return True
        return False


def _may_end_with(model: nn.Module, kwargs: Mapping[str, Any], last: int) -> bool:
    """Whether a forward gives logits of every token, and the last so many can stand for them.

    The first of these tells the second one's label.
    """
    labels = kwargs.get("labels")
    counts = labels is not None and bool((labels[:, : 1 - last or None] != NO_LABEL).any())
    tuples = kwargs.get("return_dict") is False
    given = kwargs.get("logits_to_keep") is not None
    named = kwargs.get("input_ids") is not None
    return named and not (counts or tuples or given) and takes(model, "logits_to_keep")


def _behind_nothing(logits: Tensor, tokens: int) -> Tensor:
    """Logits `[batch, last, vocabulary]` as those of so many tokens: NaN where there are none."""
    batch, last, vocabulary = logits.shape
    whole = logits.new_full((batch, tokens, vocabulary), torch.nan)
    whole[:, tokens - last :] = logits
    return whole


def _without(output: Any, cache: Any) -> Any:
    """What a forward returns, but for the cache, of which its caller knows nothing."""
    if isinstance(output, tuple):
        return tuple(part for part in output if part is not cache)
    return type(output)(**{name: part for name, part in output.items() if part is not cache})


def _unhook(model: nn.Module, hooked: bool) -> None:
    """Take our hook off a model that did not have it before, unless a cache lives that needs it."""
    with INSTALLING:
        if not hooked and not ModelState.of(model).caches:
            uninstall(model)


_COVERS: dict[int, _Cover] = {}
_LOCK = ForkSafeLock()
_LOCAL = threading.local()  # `.generates`: whether this thread is within `generate()`
