"""What one forward of a sequence works on: the cache's setup, the K/V held, and how far it goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from chunkcache.errors import StoreError
from chunkcache.gain import Gauge
from chunkcache.keys import INT8
from chunkcache.kv.codec import KVLayout
from chunkcache.kv.coding import Codec
from chunkcache.model.identity import ModelIdentity
from chunkcache.model.state import ModelState
from chunkcache.report import Report
from chunkcache.reuse.arrival import Arrival
from chunkcache.reuse.index import Origin
from chunkcache.reuse.witness import Witness
from chunkcache.settings import OBSERVERS, Settings
from chunkcache.stores.base import ChunkStore, Entry, ReadOnly, calls_of_prompt
from chunkcache.tokens.chunking import Grid
from chunkcache.tokens.token_text import Decoder
from chunkcache.tokens.transcript import Transcript


@dataclass(frozen=True, slots=True)
class Setup:
    """What all sequences of one cache object share. `tokenizer` is for its reports."""

    model: nn.Module
    state: ModelState
    store: ChunkStore
    settings: Settings
    grid: Grid
    tokenizer: Decoder | None = None

    def origin(self, identity: ModelIdentity) -> Origin:
        """Where chunks of that identity, the model's present one, are found and kept."""
        chosen = self.settings
        codec = Codec(chosen.codec, chosen.sealing)
        if codec.numbers == INT8:
            codec = replace(codec, mover=self.state.rotation(identity))
        salt = identity.salt(chosen.namespace, chosen.secret, codec.world)
        return Origin(self.store, identity, salt, codec)

    @property
    def gauge(self) -> Gauge:
        """What reading from the store and computing with the model took lately."""
        store = self.store.store if isinstance(self.store, ReadOnly) else self.store
        return self.state.gauges.setdefault(store, Gauge())

    @property
    def foreign_code(self) -> str:
        """Why prefill must be as usual: code of others that would see a trimmed prompt, or `""`."""
        found = self.state.foreign
        if not found or self.settings.hooks == OBSERVERS:
            return ""
        return (
            f"{found} would see a trimmed prompt: if it only looks, and need not see reused "
            f"tokens, set hooks={OBSERVERS!r}"
        )

    @property
    def runs_ahead(self) -> bool:
        """Whether the model may begin while K/V are on their way.

        Not where it would have to raise what goes wrong, nor with other processes beside it, which
        would have to do it again too.
        """
        return self.settings.on_error == "compute" and self.state.ranks.size == 1

    def trouble(self, error: Exception, report: Report) -> None:
        """A store failed or held a bad blob: count it, and raise only if that was asked for."""
        report.note_error(error)
        if self.settings.on_error == "raise" and isinstance(error, StoreError):
            raise error

    @contextmanager
    def store_calls(self, report: Report) -> Iterator[None]:
        """Around a prompt's calls to the store, to report what failed in a part of it too."""
        with calls_of_prompt() as calls:
            yield
        for error in calls.errors:
            self.trouble(error, report)


@dataclass(frozen=True, slots=True)
class Held:
    """The K/V in a cache object's layers, and what they are of.

    Attributes:
        layers: The layers that the cache object works on.
        layout: What they cache.
        transcript: The tokens whose K/V they hold.
        origin: Where chunks of this model are found and kept.
        known: Hashes of chunks that are in the store or on their way there.
    """

    layers: list[Any]
    layout: KVLayout
    transcript: Transcript
    origin: Origin
    known: set[str]


@dataclass(slots=True)
class Step:
    """One forward: `past` columns stand before the ids given, `held` have K/V already.

    `held` exceeds `past` when a whole prompt was given whose beginning is held.

    Attributes:
        past: Columns before the ids given.
        held: Columns with K/V.
        total: Columns once it is done.
        certain: Columns whose tokens nobody will take back, as a draft's may be.
        is_prompt: Whether a prompt is read, rather than one token after another written.
        may_run_ahead: Whether the model may begin before all K/V are here: all ids were given, so
            that it can be done again.
        as_plain: Whether what is held is kept as a `DynamicCache` would, though its tokens alone do
            not name it.
        arrival: What is on its way.
        witness: A token computed once more, which tells whether the store may be trusted.
        trimmed: Whether the model computes less than it was given.
        computed: Tokens that the model computes, over all rows.
        prefill_from: When the model began, in seconds of `perf_counter`.
        fresh: Start and stop of each stretch of tokens that were found nowhere, row by row, in
            positions.
        stale: Index entries to put right: by key, what shall replace them.
    """

    past: int
    held: int
    total: int
    certain: int
    is_prompt: bool
    may_run_ahead: bool = False
    as_plain: bool = False
    arrival: Arrival | None = None
    witness: Witness | None = None
    trimmed: bool = False
    computed: int = 0
    prefill_from: float = 0.0
    fresh: list[list[tuple[int, int]]] = field(default_factory=list)
    stale: dict[str, Entry] = field(default_factory=dict)

    @property
    def is_whole_prompt(self) -> bool:
        """Whether a prompt ends here, so that its last, shorter chunk may be kept."""
        return self.is_prompt and self.certain == self.total
