"""CacheContext: what a cache object is made with, and what all its prompts share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import nn

from chunkcache.errors import StoreError
from chunkcache.gain import Gauge
from chunkcache.keys import INT8
from chunkcache.kv.codec import Codec
from chunkcache.kv.layout import KVLayout
from chunkcache.model.identity import ModelIdentity
from chunkcache.model.state import ModelState
from chunkcache.report import Report
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.reuse.pieces import Pieces, environment
from chunkcache.settings import OBSERVERS, Settings
from chunkcache.stores.base import ChunkStore, Entry, ReadOnly, calls_of_prompt
from chunkcache.tokens.chunking import Chunk, Grid, Tokens
from chunkcache.tokens.token_text import Decoder

Indexer = Callable[[KeySpace, Chunk, Tokens, str, bool], list[Entry]]
"""Makes the index entries of a chunk: from key space, chunk, its row's tokens, time and pin."""


@dataclass(frozen=True, slots=True)
class CacheContext:
    """Model, store and settings of one cache object.

    Attributes:
        indexer: Makes the index entries by which `reuse="anywhere"` finds chunks, else `None`.
        tokenizer: For its reports.
        grid: Where chunks begin and end; with `reproducible=True`, a chunk is a piece.
    """

    model: nn.Module
    state: ModelState
    store: ChunkStore
    settings: Settings
    indexer: Indexer | None = None
    tokenizer: Decoder | None = None
    grid: Grid = field(init=False)

    def __post_init__(self) -> None:
        chosen = self.settings
        size = chosen.in_pieces if chosen.reproducible else chosen.chunk_size
        object.__setattr__(self, "grid", Grid(size, chosen.chunk_overlap))

    def model_keys(self) -> KeySpace | None:
        """Where chunks of the model as it is now are found; `None` if none may be reused."""
        identity = self.state.identity()
        layout = self.state.self_test(identity, self.store).layout
        return None if layout is None else self.keyspace(identity, layout)

    def keyspace(self, identity: ModelIdentity, layout: KVLayout) -> KeySpace:
        """Where chunks of that identity, the model's present one, are found and kept."""
        chosen = self.settings
        codec = Codec(chosen.codec, chosen.sealing)
        if codec.numbers == INT8:
            codec = replace(codec, rotation=self.state.rotation(identity))
        world = codec.world
        if self.pieces.reproducible:
            world += f" pieces={self.pieces.tokens} {environment(self.model)}"
        salt = identity.salt(chosen.namespace, chosen.secret, world)
        return KeySpace(identity, layout, salt, codec)

    @property
    def pieces(self) -> Pieces:
        """Where prompts are cut."""
        return Pieces(self.settings.in_pieces, self.settings.reproducible)

    @property
    def gauge(self) -> Gauge:
        """What reading from the store and computing with the model took lately."""
        store = self.store.store if isinstance(self.store, ReadOnly) else self.store
        return self.state.gauges.setdefault(store, Gauge())

    @property
    def foreign_code(self) -> str:
        """Code of others that would see a trimmed prompt, as a reason to bypass; or `""`."""
        found = self.state.foreign
        if not found or self.vouches_for_hooks:
            return ""
        return (
            f"{found} would see a trimmed prompt: if it only looks, and need not see reused "
            f"tokens, set hooks={OBSERVERS!r}"
        )

    @property
    def vouches_for_hooks(self) -> bool:
        """Whether the user has promised that hooks of others only look."""
        return self.settings.hooks == OBSERVERS

    @property
    def may_do_again(self) -> bool:
        """Whether the model may begin before all K/V have come, at the risk of computing twice.

        Not where errors are to be raised, nor with other processes beside it, which would have to
        do it again too.
        """
        return self.settings.on_error == "compute" and self.state.ranks.size == 1

    def handle_store_error(self, error: Exception, report: Report) -> None:
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
            self.handle_store_error(error, report)
