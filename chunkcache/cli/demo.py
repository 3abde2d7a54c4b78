"""The demo: one document, two questions, and how long the first token takes to come.

Five runs: without a cache, cold (nothing stored yet) and warm for one question; without a cache and
warm for another one. Both warm runs are processes of their own.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from chunkcache.doctor.measure import Job, Measurer, Run, in_fresh_process, store_name
from chunkcache.errors import SettingError
from chunkcache.settings import Settings
from chunkcache.stores import named_urls, open_store
from chunkcache.stores.embedded import resolved
from chunkcache.tokens.token_text import shown

STEPS = (
    "loading the model (the sample model is converted once)",
    "first question, no cache",
    "first question, cold",
    "second question, no cache",
    "first question, warm, in a new process",
    "second question, warm, in a new process",
)


@dataclass(frozen=True, slots=True)
class Row:
    """A run beside the run without a cache of the same question."""

    name: str
    run: Run
    baseline: Run

    @property
    def same(self) -> bool:
        """Whether the answer has the same tokens."""
        return self.run.answer_ids == self.baseline.answer_ids

    @property
    def speed_up(self) -> float:
        """How many times sooner the first token came."""
        return self.baseline.first_token_ms / self.run.first_token_ms


@dataclass(frozen=True, slots=True)
class Outcome:
    """The five runs, in the order in which they are shown, and where their chunks are."""

    model: str
    store: str | list[str]
    namespace: str
    rows: list[Row]

    @property
    def same(self) -> bool:
        """Whether the cache changed no answer."""
        return all(row.same for row in self.rows)

    def print(self, console: Console) -> None:
        """A table and what must be known to read it."""
        cold, warm = self.rows[1].run, self.rows[2].run
        place = f"{store_name(self.store)}, namespace {self.namespace}"
        console.print(_table(self.rows))
        for line in (
            "Warm runs are new processes, which know nothing but the store.",
            "First token: the time from the call of generate() to its first new token. Not in it:",
            f"loading the model, and making the cache object ({warm.setup_ms:,.0f} ms when warm).",
            f"The warm run's report: {warm.report}",
            f"The chunks, {cold.bytes_written / 1e6:,.0f} MB, are in {place}",
            f"(chunkcache purge namespace={self.namespace} deletes them)",
        ):
            console.print(shown(line), soft_wrap=True, markup=False, highlight=False)

    def to_dict(self) -> dict[str, Any]:
        """All that was measured, ready for JSON; the store's password left out."""
        return {
            "model": self.model,
            "store": store_name(self.store),
            "namespace": self.namespace,
            "same": self.same,
            "runs": [
                {"name": row.name, "speed_up": row.speed_up, "same": row.same, **asdict(row.run)}
                for row in self.rows
            ],
        }


def ready_store(url: str | None) -> str | list[str]:
    """A store that answers: `url`, or what `CHUNKCACHE_URL` says, or the embedded store.

    Raises:
        SettingError: The URL makes no store, or one that another process cannot share; or a setting
            keeps chunks from being stored or reused.
        StoreError: The store does not answer.
    """
    settings = Settings.load()
    if not settings.write or settings.reuse == "off":
        raise SettingError(
            "write=False or reuse='off' (CHUNKCACHE_WRITE, CHUNKCACHE_REUSE): nothing could be "
            "reused, and this is about how much that gains; leave them out"
        )
    # Spelled out, so that every process means the same one and people can find it.
    urls = named_urls(url) or [f"embedded://{quote(str(resolved(None)))}"]
    if all(each.startswith("memory:") for each in urls):
        raise SettingError(
            f"--store {' '.join(urls)!r} lives in one process, and this is about a store that is "
            "shared: use redis://…, unix://… or file:///…, or leave --store out"
        )
    place = urls[0] if len(urls) == 1 else urls
    with open_store(place, **settings.of_store) as store:
        store.sizes(["demo"])  # nobody has this key: asked only to hear an answer
    return place


def run_demo(
    store: str | list[str],
    model: str,
    tokens: int,
    max_new_tokens: int,
    step: Callable[[str], None],
) -> Outcome:
    """Do the five runs on a `store` that answers. `step` hears each of `STEPS` as it begins.

    Raises:
        ChunkCacheError: A setting cannot work, the store kept nothing, or a process failed.
    """
    plain = Job(
        model=model,
        store=store,
        namespace=f"demo-{uuid.uuid4().hex[:12]}",  # never used before: cold is cold
        tokens=tokens,
        max_new_tokens=max_new_tokens,
        question=0,
        use_cache=False,
    )
    cached = replace(plain, use_cache=True)
    step(STEPS[0])
    measurer = Measurer(model)
    step(STEPS[1])
    first = measurer.measure(plain)
    step(STEPS[2])
    cold = measurer.measure(cached)
    step(STEPS[3])
    second = measurer.measure(replace(plain, question=1))
    step(STEPS[4])
    warm = in_fresh_process(cached)
    step(STEPS[5])
    other = in_fresh_process(replace(cached, question=1))
    if not warm.reused:
        raise SettingError(
            f"a second process found nothing in the store, which may be full or read-only: "
            f"{warm.report}"
        )
    rows = [
        Row("no cache", first, first),
        Row("cold", cold, first),
        Row("warm", warm, first),
        Row("no cache", second, second),
        Row("warm", other, second),
    ]
    return Outcome(model, store, plain.namespace, rows)


def _table(rows: list[Row]) -> Table:
    table = Table(header_style="bold")
    for name in ("question", "run"):
        table.add_column(name)
    for name in ("first token", "speed-up", "tokens reused"):
        table.add_column(name, justify="right")
    table.add_column("answer")
    questions = 0
    for row in rows:
        plain = row.run is row.baseline
        if plain:
            questions += 1
            table.add_section()
        table.add_row(
            str(questions) if plain else "",
            row.name,
            f"{row.run.first_token_ms:,.0f} ms",
            f"{row.speed_up:.1f}×",
            f"{row.run.reused:,} / {row.run.prompt_tokens:,}",
            "" if plain else "same" if row.same else "[red]DIFFERENT[/red]",
        )
    return table
