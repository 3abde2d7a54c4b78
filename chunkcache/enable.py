"""enabled(): every `generate()` of a model uses the cache, for code that cannot pass one itself.

Pipelines, evaluation harnesses and agents call `model.generate()` out of reach. While a context is
open, a `generate` that makes a cache for each call covers the model's own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from torch import nn

from chunkcache.cache import RedisChunkCache
from chunkcache.model.check import CACHE, TAKES_A_CACHE, check_model
from chunkcache.model.state import ModelState
from chunkcache.report import Report
from chunkcache.reuse.hook import INSTALLING, cache_in, is_installed, uninstall
from chunkcache.stores.base import ChunkStore
from chunkcache.stores.locks import ForkSafeLock


@dataclass(eq=False)
class Enabled:
    """An open context.

    Attributes:
        store: Where chunks are looked up and kept.
        settings: Keyword arguments for each cache.
        report: What was reused of the last prompt.
    """

    store: ChunkStore
    settings: Mapping[str, Any]
    report: Report = field(default_factory=Report)
    thread: int = field(default_factory=get_ident)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all chunks are written. False if `timeout` seconds passed before."""
        return self.store.flush(timeout)


@contextmanager
def enabled(
    model: nn.Module, store: ChunkStore | str | list[str] | None = None, **settings: Any
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
        settings: Keyword arguments as in `Settings`.

    Raises:
        UnsupportedModelError: As `RedisChunkCache`, at once.
        UnsupportedCallError: As `RedisChunkCache`, at once.
        SettingError: As `RedisChunkCache`, at once.
    """
    inner = check_model(model)
    cover = context = None
    try:
        with _LOCK.own:
            hooked = is_installed(inner)
            try:
                # What cannot work is told of here, before any prompt.
                context = Enabled(RedisChunkCache(inner, store, **settings).store, settings)
            except BaseException:
                _unhook(inner, hooked)
                raise
            cover = _COVERS.setdefault(id(inner), _Cover(inner, hooked))
            cover.open(context)
        yield context
    finally:
        if cover is not None and context is not None:
            with _LOCK.own:
                cover.close(context)


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

    def close(self, context: Enabled) -> None:
        if context in self.contexts:  # not if its opening was interrupted
            self.contexts.remove(context)
        if self.contexts:
            return
        _COVERS.pop(id(self.model), None)
        if self.own is None:
            vars(self.model).pop("generate", None)
        else:
            self.model.generate = self.own
        _unhook(self.model, self.hooked)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        contexts = [*self.contexts]  # empty for who kept it longer than the context
        if not contexts or self._is_of_its_own(args, kwargs):
            return self.generate(*args, **kwargs)
        mine = [context for context in contexts if context.thread == get_ident()]
        context = (mine or contexts)[-1]
        cache = RedisChunkCache(self.model, context.store, **context.settings)
        try:
            return self.generate(*args, **kwargs, **{CACHE: cache})
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


def _unhook(model: nn.Module, hooked: bool) -> None:
    """Take our hook off a model that did not have it before, unless a cache lives that needs it."""
    with INSTALLING:
        if not hooked and not ModelState.of(model).caches:
            uninstall(model)


_COVERS: dict[int, _Cover] = {}
_LOCK = ForkSafeLock()
