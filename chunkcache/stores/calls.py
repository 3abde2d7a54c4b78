"""The store calls of one prompt: what failed in a part only, and how long lookups took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from chunkcache.errors import StoreError


@dataclass(slots=True)
class Calls:
    """What stores note while one prompt calls them.

    Attributes:
        errors: Errors of a part of a store (a tier, a node) without which it could go on.
        seconds: How long lookups have taken, by the store that notes it.
    """

    errors: list[StoreError] = field(default_factory=list)
    seconds: defaultdict[object, float] = field(default_factory=lambda: defaultdict(float))


@contextmanager
def calls_of_prompt() -> Iterator[Calls]:
    """Gather what stores note inside. Each thread has its own, also in an asyncio task."""
    calls = Calls()
    token = _CURRENT.set(calls)
    try:
        yield calls
    finally:
        _CURRENT.reset(token)


def current_calls() -> Calls:
    """Those of the prompt that this thread serves now; outside of one, some that nobody reads."""
    return _CURRENT.get() or Calls()


def note_partial(error: StoreError) -> None:
    """Tell the prompt that a part of the store failed, where the others give an answer.

    To be called from the thread that called the store.
    """
    current_calls().errors.append(error)


_CURRENT: ContextVar[Calls | None] = ContextVar("chunkcache_calls", default=None)
