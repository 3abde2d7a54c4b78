"""Bench: what the cache gains with this model, on this store, at several prompt lengths.

Each repeat asks two questions over one document, in turns: without a cache, cold (nothing stored
yet), warm with another question (the document is known), and warm with the same prompt again.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from chunkcache.cache import RedisChunkCache
from chunkcache.errors import SettingError, StoreError
from chunkcache.inventory import catalog
from chunkcache.model.check import CACHE
from chunkcache.samples import document
from chunkcache.stores.base import ChunkStore
from chunkcache.tokens.texts import chat_inputs, most_positions

log = logging.getLogger(__name__)

FLUSH_SECONDS = 60.0
QUESTIONS = (
    "What is the text above about? Answer in one sentence.",
    "Name one function that the text above describes, and say what it does.",
)
NO_CACHE, COLD, OTHER, SAME = "no cache", "cold", "warm, other question", "warm, same prompt"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to answer, at one length.

    Attributes:
        tokens: Length of the document.
        name: How it was answered.
        first_token_ms: From the call of `generate()` to its first new token, median. Loading the
            model, tokenizing and making the cache object come before.
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
    """All that was measured, in order of length; `store` is a URL without a password."""

    model: str
    store: str
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
        """All that was measured, ready for JSON."""
        arms = [{**asdict(arm), "speed_up": self.speed_up(arm)} for arm in self.arms]
        told = {"same": self.same, "without_reuse": list(self.without_reuse), "arms": arms}
        return {**asdict(self), **told}

    def table(self) -> Table:
        """One row per arm."""
        title = f"{self.model}, {self.store}: medians of {self.repeats}"
        table = Table(box=None, header_style="bold", title=title)  # fits into 80 columns
        table.add_column("prompt", justify="right")
        table.add_column("", no_wrap=True)
        for name in ("first token", "speed-up", "later token", "reused"):
            table.add_column(name, justify="right")
        table.add_column("answers")
        for arm in self.arms:
            plain = arm.name == NO_CACHE
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


class Stopwatch(BaseStreamer):
    """Notes when `generate()` hands out the prompt, which comes first, and its new tokens."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        """One more."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""

    @property
    def first_token_ms(self) -> float:
        """From the beginning to the first new token."""
        return 1e3 * (self.times[2] - self.times[0])

    @property
    def decode_ms(self) -> float:
        """Of one token after the first, on average; 0 if there is none."""
        later = len(self.times) - 3
        return 1e3 * (self.times[-1] - self.times[2]) / later if later else 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """One answer, and how it came about."""

    watch: Stopwatch
    answer: list[int]
    reused: int


@dataclass(frozen=True, slots=True)
class Bencher:
    """A loaded model on an open store, and how it is measured.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        store: The store.
        repeats: How often each arm is run; a first round, which warms up, is not counted.
        max_new_tokens: Tokens of each answer, at least 2.
        step: Told what is being done.
    """

    model: Any
    tokenizer: Any
    store: ChunkStore
    repeats: int
    max_new_tokens: int
    step: Callable[[str], object] = lambda _: None

    def run(self, lengths: Sequence[int]) -> tuple[Arm, ...]:
        """Measure with documents of so many tokens, and delete what was stored for it.

        Should that fail, the logger says how to do it.

        Raises:
            SettingError: A prompt is too long for the model, or cannot be made.
            ChunkCacheError: The cache could not be made.
        """
        prompts = {length: self._prompts(length) for length in lengths}  # all, before any is run
        run = f"bench-{uuid.uuid4().hex[:12]}"
        try:
            return tuple(
                arm for length, pair in prompts.items() for arm in self._measure(length, pair, run)
            )
        finally:
            _clean_up(self.store, run)

    def _prompts(self, length: int) -> list[dict[str, torch.Tensor]]:
        """Both questions behind a document: whatever is asked, its tokens are the same."""
        text = document(length, self.tokenizer)
        prompts = []
        for question in QUESTIONS:
            if self.tokenizer.chat_template:
                inputs = chat_inputs(self.tokenizer, f"{text}\n\n{question}")
            else:
                inputs = self.tokenizer(f"{text}\n\n{question}\n\nAnswer:", return_tensors="pt")
            needed = inputs["input_ids"].shape[1] + self.max_new_tokens
            longest = most_positions(self.model.config)
            if needed > longest:
                raise SettingError(
                    f"--tokens {length} makes {needed:,} tokens with question and answer; this "
                    f"model takes {longest:,}: ask for a shorter document"
                )
            names = ("input_ids", "attention_mask")
            prompts.append({name: inputs[name].to(self.model.device) for name in names})
        return prompts

    def _measure(
        self, length: int, prompts: Sequence[dict[str, torch.Tensor]], run: str
    ) -> list[Arm]:
        """All arms at one length."""
        first, second = prompts
        rounds: list[dict[str, tuple[Run, Run]]] = []
        for repeat in range(self.repeats + 1):
            self.step(f"{length:,} tokens, round {repeat + 1} of {self.repeats + 1}")
            settings = {"namespace": f"{run}-{length}-{repeat}", "tags": run}  # so, cold is cold
            plain_first, plain = self._answer(first, None), self._answer(second, None)
            rounds.append(
                {
                    NO_CACHE: (plain, plain),
                    COLD: (self._answer(first, settings), plain_first),
                    OTHER: (self._answer(second, settings), plain),
                    SAME: (self._answer(second, settings), plain),
                }
            )
        del rounds[0]
        return [
            Arm(
                tokens=length,
                name=name,
                first_token_ms=median(each[name][0].watch.first_token_ms for each in rounds),
                decode_ms=median(each[name][0].watch.decode_ms for each in rounds),
                reused=int(median(each[name][0].reused for each in rounds)),
                prompt_tokens=second["input_ids"].shape[1],
                same=all(done.answer == plain.answer for done, plain in (r[name] for r in rounds)),
            )
            for name in rounds[0]
        ]

    def _answer(self, prompt: dict[str, torch.Tensor], settings: dict[str, Any] | None) -> Run:
        """Answer a question greedily; without `settings`, without the cache."""
        cache = None
        if settings is not None:
            cache = RedisChunkCache(self.model, self.store, **settings)
        watch = Stopwatch()
        ids = self.model.generate(
            **prompt,
            **{CACHE: cache},
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            streamer=watch,
        )
        if cache is not None:
            cache.flush()
        answer = ids[0, prompt["input_ids"].shape[1] :].tolist()
        return Run(watch, answer, cache.report.reused if cache is not None else 0)


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
