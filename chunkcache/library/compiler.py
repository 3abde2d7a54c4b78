"""Compiler: documents to chunks in the store, each computed behind what all of them stand behind.

One look at the store tells what it lacks of many documents; what is missing is computed in batches
of like length, and another look tells whether it has arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from chunkcache.anywhere.index import (
    MOST_VARIANTS,
    index_entries,
    is_prepared,
    prepared_chunk,
    prepared_places,
    prepared_variants,
)
from chunkcache.cache import RedisChunkCache
from chunkcache.errors import SettingError, StoreError, UnsupportedCallError
from chunkcache.keys import INDEX_FORMAT
from chunkcache.model.check import check_model
from chunkcache.model.self_test import forward, takes
from chunkcache.model.state import ModelState
from chunkcache.reuse.context import CacheContext
from chunkcache.reuse.continuations import staying
from chunkcache.reuse.harvest import created_now
from chunkcache.reuse.hook import TRAINING
from chunkcache.reuse.prompt import Prompt
from chunkcache.stores.base import ChunkStore, Entry
from chunkcache.stores.writer import PatientStore
from chunkcache.tokens.chunking import Chunk, Grid, Tokens, cut

KEYS_AT_ONCE = 1 << 9
ENTRIES_AT_ONCE = 1 << 13  # a write queue takes 65,536
LEAST_FILLER = 128

Answer = TypeVar("Answer")


@dataclass(eq=False, slots=True)
class Document:
    """One row for the model, and what the store is to have of it.

    Attributes:
        row: Token ids of prefix and document, `[tokens]`.
        begin: Where the document begins in it.
        chunks: The chunks that hold tokens of the document.
        index: The entries by which they are found at any position.
        incomplete: Whether the store lacks a chunk.
        unindexed: The entries that it lacks.
    """

    row: Tokens
    begin: int
    chunks: list[Chunk]
    index: list[Entry]
    incomplete: bool = True
    unindexed: list[Entry] = field(default_factory=list)


class PreparedChunks(PatientStore):
    """A store in which a run over documents marks what it writes.

    No longer chunk of a prompt replaces it, and none serves in its place.
    """

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        # Not what goes on like a document: that may be a prompt's.
        rest = [key for key in keys if not _is_of_index(key)]
        found = dict(zip(rest, super().read_metadata(rest), strict=True)) if rest else {}
        return [found.get(key) for key in keys]

    def write(self, entries: Sequence[Entry]) -> int:
        return super().write(
            [
                prepared_chunk(entry)
                if entry.nbytes
                else staying(entry)
                if _is_of_index(entry.key)
                else entry
                for entry in entries
            ]
        )


def _is_of_index(key: str) -> bool:
    return key.startswith(f"{INDEX_FORMAT}@")


class Compiler:
    """Computes what a store lacks of documents.

    Args:
        model: The model, in evaluation mode.
        store: As in `RedisChunkCache`.
        settings: Those of the caches that shall find the documents, with `reuse="anywhere"`.
        batch_tokens: Tokens that go through the model at once, padding included.

    Attributes:
        store: The store, whose writes wait.
        settings: The settings in force.
        computed: Tokens that the model has computed.

    Raises:
        SettingError: A setting cannot work.
        UnsupportedModelError: K/V of this model cannot be moved.
        UnsupportedCallError: The model is in training mode.
    """

    def __init__(
        self,
        model: nn.Module,
        store: ChunkStore | str | list[str] | None,
        settings: Mapping[str, Any],
        batch_tokens: int,
    ) -> None:
        self.model = check_model(model)
        if self.model.training:
            raise UnsupportedCallError(TRAINING)
        cache = RedisChunkCache(model, store, **settings)
        if not cache.settings.write:
            raise SettingError("write=False is not for add_documents, which only writes")
        self.store, self.settings = PatientStore(cache.store), cache.settings
        self._prepared = PreparedChunks(cache.store)
        self.batch_tokens = batch_tokens
        self.computed = 0
        state = ModelState.of(self.model)
        context = CacheContext(self.model, state, self.store, self.settings)
        keys, self._grid = context.model_keys(), context.grid
        assert keys is not None, "a model without a layout is refused"
        self._keys = keys
        # Never "anywhere" here: what documents have in common would be moved from one to the other,
        # and bring its context along.
        self._exact = {**settings, "reuse": "prefix", "on_error": "raise"}
        self._aside = ""

    @property
    def bytes_written(self) -> int:
        """Bytes of K/V handed to the store."""
        return self._prepared.bytes_written

    def behind(self, prefix: Tokens, filler: Tokens) -> Tokens:
        """Prefix `[tokens]` and as much of the end of a filler `[tokens]` as makes whole chunks.

        So the chunks of a document behind them hold nothing but the document.
        """
        if not len(filler):
            return prefix
        count = LEAST_FILLER + -(len(prefix) + LEAST_FILLER) % self._grid.stride
        return np.concatenate([prefix, np.resize(filler[::-1], count)[::-1]])

    def document(self, prefix: Tokens, ids: Tokens) -> Document:
        """A document `[tokens]` behind a prefix `[tokens]`."""
        row, begin = np.concatenate([prefix, ids]), len(prefix)
        chunks = cut(row, self._grid, self._keys.salt, self.settings.store_tail)
        chunks = [chunk for chunk in chunks if chunk.stop > begin]
        created = created_now()
        index: list[Entry] = []
        for chunk in chunks:
            # Of the document's own tokens only: by what all documents begin with, none is found.
            shifted = Chunk(chunk.start - begin, chunk.stop - begin, chunk.hash)
            entries = index_entries(self._keys, shifted, ids, created, self.settings.pin)
            index += map(prepared_places, entries)
        return Document(row, begin, chunks, index)

    def look(self, documents: Sequence[Document]) -> list[Document]:
        """Those documents of which the store lacks anything, in a few round trips.

        Raises:
            StoreError: The store failed.
        """
        keys = {c.hash: self._keys.key(c.hash) for doc in documents for c in doc.chunks}
        sizes = self._ask(self.store.sizes, keys.values())
        index = {entry.key for doc in documents for entry in doc.index}
        fields = self._ask(self.store.read_metadata, [*keys.values(), *index])
        there = {key for key in keys.values() if is_prepared(fields[key] or {})}
        # A blob whose metadata were evicted is not found anywhere, and that of a prompt is none of
        # ours; being there, it would not be written again.
        if others := [key for key in keys.values() if sizes[key] and key not in there]:
            self.store.delete(others)
        named = {name for key in index for name in prepared_variants(fields[key] or {})}
        for doc in documents:
            doc.incomplete = not all(
                sizes[keys[c.hash]] and keys[c.hash] in there for c in doc.chunks
            )
            doc.unindexed = [
                entry for entry in doc.index if _lacks(entry, fields[entry.key] or {}, named)
            ]
        return [doc for doc in documents if doc.incomplete or doc.unindexed]

    def _ask(
        self, verb: Callable[[list[str]], Sequence[Answer]], keys: Iterable[str]
    ) -> dict[str, Answer]:
        """Each key's answer. Little at once, so that no single one seems slow."""
        left = list(keys)
        answers: dict[str, Answer] = {}
        for at in range(0, len(left), KEYS_AT_ONCE):
            part = left[at : at + KEYS_AT_ONCE]
            answers.update(zip(part, verb(part), strict=True))
        return answers

    def complete(self, documents: Sequence[Document], done: Callable[[int], object]) -> None:
        """Compute and write what the store lacks of documents that `look` has returned.

        Args:
            documents: What to complete.
            done: Told how many documents have come out of the model, batch by batch.

        Raises:
            StoreError: The store failed, or has not kept what was written.
            UnsupportedCallError: Hooks change what the model computes.
        """
        for batch in batches([doc for doc in documents if doc.incomplete], self.batch_tokens):
            self.store.check_writable()
            self._run(batch)
            done(len(batch))
        entries = [entry for doc in documents for entry in doc.unindexed]
        for at in range(0, len(entries), ENTRIES_AT_ONCE):
            self.store.write(entries[at : at + ENTRIES_AT_ONCE])
            self.store.flush()
        self.store.flush()
        if self.look(documents):
            if self._aside:
                raise UnsupportedCallError(f"the model's K/V cannot be stored: {self._aside}")
            self.store.check_writable()  # it may know why
            raise StoreError("the store has not kept all that it took: make it larger")

    @torch.no_grad()
    def _run(self, batch: Sequence[Document]) -> None:
        """One prefill, from which the cache keeps every chunk."""
        cache = RedisChunkCache(self.model, self._prepared, **self._exact)
        width = len(batch[0].row)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, doc in enumerate(batch):
            ids[row, width - len(doc.row) :] = torch.from_numpy(doc.row)
            mask[row, width - len(doc.row) :] = 1
        positions = Prompt(ids, mask).positions
        keep = {"logits_to_keep": 1} if takes(self.model, "logits_to_keep") else {}
        for begin, end in pieces(width, self._grid, self.batch_tokens):
            forward(
                self.model, ids[:, begin:end], cache, attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end], **keep,
            )  # fmt: skip
        self.computed += cache.report.computed
        self._aside = cache.report.skipped


def _lacks(entry: Entry, there: Mapping[str, str], named: Collection[str]) -> bool:
    """Whether an index entry is to be written.

    What many documents have in common leads to the newest of them only; it is enough that other
    entries lead to this one.
    """
    (chunk_hash,) = entry.metadata
    variants = prepared_variants(there)
    crowded = len(variants) >= MOST_VARIANTS
    return chunk_hash not in variants and not (crowded and chunk_hash in named)


def batches(documents: Sequence[Document], most_tokens: int) -> Iterator[list[Document]]:
    """Rows of like length together, the longest first; padding counts."""
    batch: list[Document] = []
    for doc in sorted(documents, key=lambda doc: len(doc.row), reverse=True):
        if batch and (len(batch) + 1) * len(batch[0].row) > most_tokens:
            yield batch
            batch = []
        batch.append(doc)
    if batch:
        yield batch


def pieces(tokens: int, grid: Grid, most_tokens: int) -> list[tuple[int, int]]:
    """Start and stop of the pieces in which a row is computed.

    They end where chunks end, so that none leaves a tail behind, and are never smaller than one.
    """
    ends = sorted({*(stop for _, stop in grid.spans(tokens)), tokens})
    cuts = [0]
    for end, following in pairwise(ends):
        if following - cuts[-1] > most_tokens:
            cuts.append(end)
    return list(pairwise([*cuts, tokens]))
