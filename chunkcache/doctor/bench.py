"""Bench: what the cache gains with this model, on this store, at several prompt lengths.

Each repeat asks two questions over one document, in turns: without a cache, cold (nothing stored
yet), warm with another question (the document is known), and warm with the same prompt again.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from rich.table import Table

from chunkcache.doctor.measure import Job, Measurer, Run, store_name
from chunkcache.errors import StoreError
from chunkcache.inventory import catalog
from chunkcache.settings import Settings
from chunkcache.stores import ChunkStore, open_store

log = logging.getLogger(__name__)

FLUSH_SECONDS = 60.0
NO_CACHE, COLD, OTHER, SAME = "no cache", "cold", "warm, another question", "warm, same prompt"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to answer, at one length.

    Attributes:
        tokens: Length of the document.
        name: How it was answered.
        first_token_ms: From the call of `generate()` to its first new token, median.
        decode_ms: Of each later token, median.
        reused: Prompt tokens that came out of the store, median.
        prompt_tokens: Length of the prompt.
        same: Whether every answer has the tokens of the run without a cache.
    """

    tokens: int
    name: str
    first_token_ms: float
    decode_ms: float
    reused: int
    prompt_tokens: int
    same: bool


@dataclass(frozen=True, slots=True)
class Bench:
    """All that was measured, in order of length."""

    model: str
    store: str | list[str]
    repeats: int
    arms: tuple[Arm, ...]

    @property
    def same(self) -> bool:
        """Whether the cache changed no answer."""
        return all(arm.same for arm in self.arms)

    @property
    def without_reuse(self) -> tuple[int, ...]:
        """Lengths at which a warm run took nothing out of the store, which says nothing of it."""
        warm = (arm for arm in self.arms if arm.name in (OTHER, SAME))
        return tuple(dict.fromkeys(arm.tokens for arm in warm if not arm.reused))

    def speed_up(self, arm: Arm) -> float:
        """How many times sooner the first token came than without a cache."""
        (plain,) = (a for a in self.arms if (a.tokens, a.name) == (arm.tokens, NO_CACHE))
        return plain.first_token_ms / arm.first_token_ms

    def to_dict(self) -> dict[str, Any]:
        """All that was measured, ready for JSON; the store's password left out."""
        return {
            "model": self.model,
            "store": store_name(self.store),
            "repeats": self.repeats,
            "same": self.same,
            "without_reuse": list(self.without_reuse),
            "arms": [{**asdict(arm), "speed_up": self.speed_up(arm)} for arm in self.arms],
        }

    def table(self) -> Table:
        """One section per length."""
        table = Table(
            header_style="bold",
            title=f"{self.model}, {store_name(self.store)}: medians of {self.repeats}",
        )
        table.add_column("prompt", justify="right")
        table.add_column("")
        for name in ("first token", "speed-up", "each later token", "tokens reused"):
            table.add_column(name, justify="right")
        table.add_column("answers")
        for arm in self.arms:
            plain = arm.name == NO_CACHE
            if plain:
                table.add_section()
            table.add_row(
                f"{arm.prompt_tokens:,}" if plain else "",
                arm.name,
                f"{arm.first_token_ms:,.0f} ms",
                f"{self.speed_up(arm):.1f}×",
                f"{arm.decode_ms:,.1f} ms",
                f"{arm.reused:,}",
                "" if plain else "same" if arm.same else "[red]DIFFERENT[/red]",
            )
        return table


def run_bench(
    model: str,
    store: str | list[str],
    lengths: Sequence[int],
    repeats: int,
    max_new_tokens: int,
    step: Callable[[str], object] = lambda _: None,
) -> Bench:
    """Measure, and delete from the store what was stored for it.

    Should that fail, the logger says how to do it.

    Args:
        model: A model's folder or hub id.
        store: URL of a store that answers, or those of its tiers.
        lengths: Of the document, in tokens.
        repeats: How often each arm is run; a first round, which warms up, is not counted.
        max_new_tokens: Tokens of each answer.
        step: Told what is being done.

    Raises:
        SettingError: The model cannot be loaded, or a prompt is too long for it.
        ChunkCacheError: The cache could not be made.
    """
    step("loading the model")
    measurer = Measurer(model)
    plain = [
        Job(model, store, "", length, max_new_tokens, 0, use_cache=False)
        for length in dict.fromkeys(lengths)
    ]
    for job in plain:
        measurer.check(job)
        measurer.check(replace(job, question=1))
    arms: list[Arm] = []
    run = f"bench-{uuid.uuid4().hex[:12]}"
    with open_store(store, **Settings.load().of_store) as opened:
        try:
            for job in plain:
                arms += _measure(measurer, job, opened, run, repeats, step)
        finally:
            _clean_up(opened, run)
    return Bench(model, store, repeats, tuple(arms))


def _measure(
    measurer: Measurer,
    plain: Job,
    store: ChunkStore,
    run: str,
    repeats: int,
    step: Callable[[str], object],
) -> Iterator[Arm]:
    """All arms at one length."""
    rounds: list[dict[str, tuple[Run, bool]]] = []
    for repeat in range(repeats + 1):
        step(f"{plain.tokens:,} tokens, round {repeat + 1} of {repeats + 1}")
        space = f"{run}-{plain.tokens}-{repeat}"  # never used before: cold is cold
        job = replace(plain, namespace=space, tags=run, use_cache=True)
        rounds.append(dict(_round(measurer, plain, job, store)))
    for name in rounds[0]:
        yield _median(plain.tokens, name, [r[name] for r in rounds[1:]])


def _clean_up(store: ChunkStore, run: str) -> None:
    """Delete what was stored, also what waits to be written still, as after Ctrl-C."""
    why: object = f"it has not taken all of them within {FLUSH_SECONDS:.0f} s"
    try:
        flushed = store.flush(FLUSH_SECONDS)
        catalog.delete(store, catalog.Filter(tags=run))
        if flushed:
            return
    except StoreError as error:
        why = error
    log.error(
        "chunks of this run may be left in the store (%s): chunkcache purge tags=%s deletes them",
        why, run,
    )  # fmt: skip


def _round(
    measurer: Measurer, plain: Job, job: Job, store: ChunkStore
) -> Iterator[tuple[str, tuple[Run, bool]]]:
    """Each arm once: what was measured, and whether the answer is the plain one."""
    first = measurer.measure(plain)
    second = measurer.measure(replace(plain, question=1))
    cold = measurer.measure(job, store)
    other = measurer.measure(replace(job, question=1), store)
    same = measurer.measure(replace(job, question=1), store)
    yield NO_CACHE, (second, True)
    yield COLD, (cold, cold.answer_ids == first.answer_ids)
    yield OTHER, (other, other.answer_ids == second.answer_ids)
    yield SAME, (same, same.answer_ids == second.answer_ids)


def _median(tokens: int, name: str, runs: list[tuple[Run, bool]]) -> Arm:
    return Arm(
        tokens=tokens,
        name=name,
        first_token_ms=median(run.first_token_ms for run, _ in runs),
        decode_ms=median(run.decode_ms for run, _ in runs),
        reused=int(median(run.reused for run, _ in runs)),
        prompt_tokens=runs[0][0].prompt_tokens,
        same=all(same for _, same in runs),
    )
