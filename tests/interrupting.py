"""KeyboardInterrupt at moments of our choice, and a watch for what hangs afterwards."""

from __future__ import annotations

import dis
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

# Behind these, CPython looks whether a signal has come; and where a function begins.
LOOKS = ("CALL", "PRECALL", "JUMP_BACKWARD", "RESUME", "FOR_ITER", "SEND")


class HangError(BaseException):
    """Something takes too long; all stacks were dumped to stderr."""


@contextmanager
def no_hang(seconds: float) -> Iterator[None]:
    """Raise HangError in this, the main, thread when the block takes longer than that."""
    over = threading.Event()

    def watch() -> None:
        if not over.wait(seconds):
            faulthandler.dump_traceback(all_threads=True)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def give_up(*_: object) -> None:
        if not over.is_set():
            raise HangError(f"it takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGUSR1, give_up)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        signal.signal(signal.SIGUSR1, before)


def after(seconds: float, call: Callable[[], object]) -> bool:
    """Call, with an interrupt so many seconds later. Whether it came before the end."""
    armed = True

    def interrupt(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        call()
        armed = False
        return False
    except KeyboardInterrupt:
        return True
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Steps:
    """Counts the moments at which an interrupt could land in code of `packages`.

    `at(n, call)` raises KeyboardInterrupt at the n-th of them, and `count(call)` only counts.
    """

    def __init__(self, *packages: str) -> None:
        self._marks = tuple(f"/{package}/" for package in packages)
        self._names: dict[CodeType, list[str]] = {}
        self._seen = 0
        self._stop = -1
        self.where = ""

    def count(self, call: Callable[[], object]) -> int:
        self.at(-1, call)
        return self._seen

    def at(self, stop: int, call: Callable[[], object]) -> bool:
        """Whether the interrupt has come out of the call."""
        self._seen, self._stop, self.where = 0, stop, "nowhere"
        sys.settrace(self._enter)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        if not any(mark in frame.f_code.co_filename for mark in self._marks):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        names = self._names.get(frame.f_code) or self._read(frame.f_code)
        before = [0]  # where this frame was last

        def step(frame: FrameType, event: str, arg: object) -> Any:
            if event == "opcode":
                if names[before[0]].startswith(LOOKS):
                    self._look(frame)
                before[0] = frame.f_lasti
            return step

        return step

    def _read(self, code: CodeType) -> list[str]:
        names = [""] * len(code.co_code)
        for instruction in dis.get_instructions(code):
            names[instruction.offset] = instruction.opname
        names[0] = "RESUME"
        self._names[code] = names
        return names

    def _look(self, frame: FrameType) -> None:
        self._seen += 1
        if self._seen == self._stop:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}"
            raise KeyboardInterrupt


def until(is_so: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait for it; whether it came to pass."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
