"""Repair: which tokens of moved runs to compute again.

A moved token remembers its old context. Computing some tokens again, in the new context, repairs
most of the harm; the question is which. Each strategy is a small dataclass with one method; names
join with `+`, as in `"head:4+query:0.1"`. What a strategy costs beyond the tokens it picks (looking
takes passes through some layers) is charged to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from chunkcache.errors import SettingError

Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float64]


class Situation(Protocol):
    """What a strategy may look at.

    Attributes:
        tokens: Tokens of the prompt.
        runs: Start and stop of each moved run, in order.
    """

    runs: list[tuple[int, int]]

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""

    def deviation(self) -> Scores:
        """For each token, how far its values at layer 1 are from fresh ones. Charged once."""

    def query_attention(self) -> Scores:
        """For each token, the attention it gets from the prompt's last tokens. Charged once."""


def moved_mask(situation: Situation) -> Mask:
    """True for the tokens of moved runs."""
    mask = np.zeros(situation.tokens, dtype=bool)
    for start, stop in situation.runs:
        mask[start:stop] = True
    return mask


class Repair(ABC):
    """A strategy."""

    @abstractmethod
    def pick(self, situation: Situation) -> Mask:
        """`[tokens]`, True for moved tokens to compute again."""


@dataclass(frozen=True, slots=True)
class Nothing(Repair):
    """Move only. For research: the first tokens of a run carry a false attention sink."""

    def pick(self, situation: Situation) -> Mask:
        return np.zeros(situation.tokens, dtype=bool)


@dataclass(frozen=True, slots=True)
class Full(Repair):
    """Compute everything again: equal to a run without the cache, and no faster."""

    def pick(self, situation: Situation) -> Mask:
        return moved_mask(situation)


@dataclass(frozen=True, slots=True)
class Head(Repair):
    """The first `count` tokens of each run. EPIC's LegoLink (https://arxiv.org/abs/2410.15332)."""

    count: int = 4

    def pick(self, situation: Situation) -> Mask:
        mask = np.zeros(situation.tokens, dtype=bool)
        for start, stop in situation.runs:
            mask[start : min(start + self.count, stop)] = True
        return mask


@dataclass(frozen=True, slots=True)
class Seam(Repair):
    """The first and last `count` tokens of each run, as HYPIC (https://arxiv.org/abs/2607.01299)."""

    count: int = 8

    def pick(self, situation: Situation) -> Mask:
        mask = Head(self.count).pick(situation)
        for start, stop in situation.runs:
            mask[max(stop - self.count, start) : stop] = True
        return mask


@dataclass(frozen=True, slots=True)
class Share(Repair):
    """The `share` of moved tokens with the highest score. Subclasses say what the score is."""

    share: float

    @abstractmethod
    def score(self, situation: Situation) -> Scores:
        """`[tokens]`, larger for tokens that need it more."""

    def pick(self, situation: Situation) -> Mask:
        mask = np.zeros(situation.tokens, dtype=bool)
        moved = np.flatnonzero(moved_mask(situation))
        count = round(self.share * len(moved))
        if count:
            order = np.argsort(-self.score(situation)[moved], kind="stable")
            mask[moved[order[:count]]] = True
        return mask


@dataclass(frozen=True, slots=True)
class Deviation(Share):
    """Tokens whose values deviate most at layer 1. CacheBlend (https://arxiv.org/abs/2405.16444)."""

    def score(self, situation: Situation) -> Scores:
        return situation.deviation()


@dataclass(frozen=True, slots=True)
class Query(Share):
    """Tokens that the prompt's last tokens look at. ProphetKV (https://arxiv.org/abs/2602.02579)."""

    def score(self, situation: Situation) -> Scores:
        return situation.query_attention()


@dataclass(frozen=True, slots=True)
class Random(Share):
    """Tokens at random, the same for the same prompt: the control that others must beat."""

    def score(self, situation: Situation) -> Scores:
        return np.random.default_rng(situation.tokens).random(situation.tokens)


@dataclass(frozen=True, slots=True)
class Several(Repair):
    """What any of several strategies picks."""

    parts: tuple[Repair, ...]

    def pick(self, situation: Situation) -> Mask:
        mask = np.zeros(situation.tokens, dtype=bool)
        for part in self.parts:
            mask |= part.pick(situation)
        return mask


_COUNTED: dict[str, Callable[[int], Repair]] = {"head": Head, "seam": Seam}
_SHARED: dict[str, Callable[[float], Repair]] = {
    "deviation": Deviation,
    "query": Query,
    "random": Random,
}
_PLAIN: dict[str, Repair] = {"none": Nothing(), "full": Full()}
KNOWN = "none, full, head:k, seam:k, deviation:r, query:r, random:r, joined by +"


def parse_repair(text: str) -> Repair:
    """The strategy that `"head:4"`, `"head:4+query:0.1"` and the like name.

    Raises:
        SettingError: The name or its number is not known.
    """
    parts = tuple(_parse_part(part.strip(), text) for part in text.split("+"))
    return parts[0] if len(parts) == 1 else Several(parts)


def _parse_part(part: str, text: str) -> Repair:
    name, _, number = part.partition(":")
    try:
        if name in _PLAIN and not number:
            return _PLAIN[name]
        if name in _COUNTED and int(number) >= 0:
            return _COUNTED[name](int(number))
        if name in _SHARED and 0 <= float(number) <= 1:
            return _SHARED[name](float(number))
    except ValueError:
        pass
    raise SettingError(f"repair={text!r} is not known ({part!r}): use {KNOWN}")
