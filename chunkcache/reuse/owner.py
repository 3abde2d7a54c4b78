"""Owner: which call works with a cache object now. Two at once would mix their K/V.

A `generate()` call owns the cache from its beginning until its frame is gone, a direct `model()`
call for one forward. Chat front ends start the next message while a streamer's thread still runs;
web applications share a global. The later call raises an error before it has touched anything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from threading import get_ident
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import nn
from transformers import GenerationMixin

from chunkcache.errors import UnsupportedCallError

_GENERATE = getattr(GenerationMixin.generate, "__wrapped__", GenerationMixin.generate).__code__
_FORWARD = nn.Module._call_impl.__code__
_IN_USE = (
    "this cache object is used by another call at the same time, whose K/V would mix with this "
    "one's: make a RedisChunkCache for each call (they share the store), or wait until the other "
    "call has ended"
)


class Caller(NamedTuple):
    """A call: its thread, and its frame by address, 0 where there is none."""

    thread: int
    frame: int


class Owner:
    """The call that owns one cache object.

    Attributes:
        failed: Whether its last forward began and did not come back.
    """

    def __init__(self) -> None:
        # Cells that threads set atomically, by dict.setdefault: no lock, so none to leak.
        self._call: dict[str, Caller] = {}
        self._forward: dict[str, Caller] = {}
        self.failed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        """A copy of a cache has no owner yet."""
        twin = Owner()
        twin.failed = self.failed or bool(self._forward)
        return twin

    def begin_call(self, cache: object) -> None:
        """A `generate()` call begins with this cache.

        Raises:
            UnsupportedCallError: Another one is not over yet.
        """
        caller = _caller()
        owner = self._call.get("by", caller)
        if owner != caller and _is_running(owner, cache):
            raise UnsupportedCallError(_IN_USE)
        self._check_forward()
        self._call["by"] = caller

    def begin_forward(self) -> None:
        """A forward begins.

        Raises:
            UnsupportedCallError: Of another call than the owner's, or beside another forward.
        """
        caller = _caller()
        if not caller.frame:
            self._call["by"] = caller
        elif self._call.get("by", caller) != caller:
            raise UnsupportedCallError(_IN_USE)
        self._check_forward()
        forward = _caller(_FORWARD)
        if self._forward.setdefault("by", forward) != forward:
            raise UnsupportedCallError(_IN_USE)

    @property
    def computes_here(self) -> bool:
        """Whether this thread has begun a forward."""
        forward = self._forward.get("by")
        return forward is not None and forward.thread == get_ident()

    def end_forward(self, failed: bool = False) -> None:
        """The forward has come back, or has raised."""
        self.failed = failed
        self._forward.clear()

    def _check_forward(self) -> None:
        """Take note of a forward that was interrupted, or raise if it goes on."""
        forward = self._forward.get("by")
        if forward is None:
            return
        if forward.thread != get_ident() and _goes_on(forward):
            raise UnsupportedCallError(_IN_USE)
        self.end_forward(failed=True)


def _caller(code: CodeType = _GENERATE) -> Caller:
    """The call of this function that runs now, in this thread."""
    frames = _outwards(sys._getframe())
    return Caller(get_ident(), next((id(f) for f in frames if f.f_code is code), 0))


def _goes_on(forward: Caller) -> bool:
    """Whether another thread's forward has not ended. Ctrl-C ends it without a word."""
    frames = list(_outwards(sys._current_frames().get(forward.thread)))
    if not forward.frame:
        return bool(frames)
    return any(id(frame) == forward.frame and frame.f_code is _FORWARD for frame in frames)


def _is_running(caller: Caller, cache: object) -> bool:
    """Whether a `generate()` call with this cache has not ended."""
    for frame in _outwards(sys._current_frames().get(caller.thread)):
        # Its address alone may have come to be another frame's.
        if id(frame) == caller.frame and frame.f_code is _GENERATE:
            inputs = frame.f_locals.get("model_kwargs") or {}
            return any(value is cache for value in inputs.values())
    return False


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
