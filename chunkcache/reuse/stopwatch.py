"""Stopwatch: how long a device has worked, known without waiting for it.

A call that starts a GPU's work returns before it is done. So the device itself is asked to note the
time, before and after, and what it has noted is read once it has come so far.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch

from chunkcache.kv.transfer import is_host


class Stopwatch:
    """Runs from now on, until `stop`.

    Attributes:
        is_certain: Whether it has timed computing alone: what a device did while the host waited,
            nobody knows.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_certain = True
        self._host = is_host(device)
        self._began = self._ended = perf_counter()
        self._event: Any = None if self._host else _timing_event(device)
        self._start = self._note()
        self._end: Any = None

    def leave_out(self, seconds: float) -> None:
        """So long the host has waited for something else."""
        self._began += seconds
        self.is_certain = self._host or not seconds

    def stop(self) -> None:
        """What comes now counts no more."""
        self._ended, self._end = perf_counter(), self._note()

    def _note(self) -> Any:
        if self._event is None:
            return None
        event = self._event(enable_timing=True)
        event.record()
        return event

    def ms(self) -> float | None:
        """Milliseconds; `None` while the device is not done, and for one that notes no time."""
        if self._host:
            return 1e3 * (self._ended - self._began)
        if self._end is None or not self._end.query():
            return None
        elapsed: float = self._start.elapsed_time(self._end)
        return elapsed


def _timing_event(device: torch.device) -> Any:
    """What makes events that note the time, if the device has any."""
    try:
        return getattr(torch.get_device_module(device), "Event", None)
    except RuntimeError:  # it is none: weights are elsewhere, and come when they are needed
        return None
