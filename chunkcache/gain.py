"""Gain: whether to read known chunks, or to compute them because that is faster.

Reading usually wins by far; behind a slow link, or with a small model, it may lose. Both are timed
as they happen, for each model and store, so that no machine has to be known beforehand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from time import monotonic

SAMPLES = 8  # of each kind that are remembered
ENOUGH = 2  # fewer may be an accident
# What was smaller than this share tells too little: small reads are slow for each byte, and short
# prompts fast for each token.
SHARE = 0.25
# After so many reads that were left out, one finds out whether that is still right.
TRY_AGAIN = 16

# So long after a forward that had to be done again, the model waits until all is there.
CAUTION_SECONDS = 60.0

NO_GAIN = "known, but reading would take longer than computing (min_gain)"

Samples = deque[tuple[int, float]]
Computing = tuple[Callable[[], float | None], Callable[[float], None]]


class Gauge:
    """How long reading from one store and computing with one model took lately."""

    def __init__(self) -> None:
        self._read: Samples = deque(maxlen=SAMPLES)
        self._computed: Samples = deque(maxlen=SAMPLES)
        self._computing: deque[Computing] = deque(maxlen=SAMPLES)
        self._left_out = 0
        self._cautious_until = 0.0  # seconds of the monotonic clock

    @property
    def trusts_store(self) -> bool:
        """Whether what the store promised has come lately."""
        return monotonic() >= self._cautious_until

    def note_unsound(self) -> None:
        """Something was missing or damaged after the model had begun to work with it."""
        self._cautious_until = monotonic() + CAUTION_SECONDS

    def note_read(self, nbytes: int, ms: float) -> None:
        """So many bytes of blobs were there after so many milliseconds."""
        if nbytes:
            self._read.append((nbytes, ms))

    def note_computed(self, tokens: int, ms: float) -> None:
        """So many tokens of a prompt were computed in so many milliseconds."""
        if tokens:
            self._computed.append((tokens, ms))

    def note_computing(self, ms: Callable[[], float | None], note: Callable[[float], None]) -> None:
        """A prompt is being computed: `ms` tells how long that took, once it is done.

        `note` is then called with it. Not before somebody looks: see `look`.
        """
        self._computing.append((ms, note))
        self.look()

    def look(self) -> None:
        """Take note of what has been computed meanwhile. Waits for nothing."""
        while self._computing and (took := self._computing[0][0]()) is not None:
            with suppress(IndexError):  # another thread was faster
                self._computing.popleft()[1](took)

    def expects_gain(self, tokens: int, nbytes: int, min_gain: float) -> bool:
        """Whether reading chunks of so many tokens and bytes pays, as far as is known.

        It does unless computing them is known to take less than `min_gain` times as long.
        """
        self.look()
        reading, computing = _expected(self._read, nbytes), _expected(self._computed, tokens)
        return reading is None or computing is None or computing >= min_gain * reading

    def pays(self, tokens: int, nbytes: int, min_gain: float) -> bool:
        """Whether to read them now; now and then also what is not expected to pay."""
        if self.expects_gain(tokens, nbytes, min_gain):
            return True
        self._left_out = (self._left_out + 1) % (TRY_AGAIN + 1)
        return not self._left_out


def _expected(samples: Samples, size: int) -> float | None:
    """Milliseconds for so much, `None` if nothing of about that size was timed."""
    rates = [ms / much for much, ms in list(samples) if much >= SHARE * size]
    return size * median(rates) if len(rates) >= ENOUGH else None
