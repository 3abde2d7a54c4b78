"""From the layers to store entries: the chunks that are complete and not in the store yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from chunkcache.kv.codec import BlobForm
from chunkcache.kv.layers import row_runs, row_slice
from chunkcache.kv.transfer import is_host
from chunkcache.reuse.context import CacheContext
from chunkcache.reuse.continuations import WINDOW, continuation_entry
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.stores.base import Entry, LateBlob, merged
from chunkcache.stores.locks import OPEN, Latch
from chunkcache.tokens.chunking import Chunk, Grid, Tokens, as_text, cut
from chunkcache.tokens.transcript import Transcript

EXACT, APPROXIMATE = "exact", "approximate"


Shorter = dict[tuple[str, int], dict[str, int]]
"""By the hash of the chunk before them and where they begin: hashes of chunks that longer ones may
replace, and where they end."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a prompt has found in the store that bears on what it stores.

    Attributes:
        by_text: Of each row, chunks computed behind moved text, which only the anchors find.
        stale: Index entries to correct: by key, what shall replace them.
    """

    by_text: Sequence[Sequence[Chunk]] = ()
    stale: Mapping[str, Entry] = field(default_factory=dict)


NOTHING_FOUND = Found()


def created_now() -> str:
    """When a chunk is made, as metadata and index say it: later ones sort behind earlier ones."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def harvest(
    context: CacheContext,
    keys: KeySpace,
    layers: Sequence[Any],
    transcript: Transcript,
    known: set[str],
    shorter: Shorter,
    certain: int,
    tail: bool = False,
    found: Found = NOTHING_FOUND,
    may_copy: Latch = OPEN,
) -> list[Entry]:
    """Entries for all chunks that are not known yet, with the keys of those that they replace.

    They become known. Index entries stand behind the chunks that they name.

    Args:
        context: Store and settings.
        keys: Those of the chunks.
        layers: The layers that hold the K/V.
        transcript: The tokens they are of.
        known: Hashes of chunks that the store has.
        shorter: What longer chunks may replace; the last chunk of each row is added.
        certain: Columns that nobody will take back.
        tail: Whether a row's last, shorter chunk is kept.
        found: What the prompt has found that bears on it.
        may_copy: Opens when copying from a device does not delay an answer.
    """
    chunks: list[Entry] = []
    index: list[Entry] = []
    ids, lengths = transcript.ids(), transcript.exact_lengths(certain)
    for row, (pad, length) in enumerate(zip(transcript.pads, lengths, strict=True)):
        tokens = ids[row, pad:].numpy()
        exact = transcript.inexact_from[row] is None
        last = tail and exact and context.settings.store_tail
        row_chunks = [(c, EXACT) for c in cut(tokens[:length], context.grid, keys.salt, last)]
        if found.by_text and not exact:
            row_chunks += [(chunk, APPROXIMATE) for chunk in found.by_text[row]]
        before = [keys.key(chunk.hash) for chunk, _ in row_chunks]
        parent: Chunk | None = None
        for number, (chunk, how) in enumerate(row_chunks):
            previous, parent = parent, chunk
            if chunk.hash in known:
                continue
            behind = previous.hash if previous and previous.stop == chunk.start else ""
            known.add(chunk.hash)
            form = keys.form(tokens[chunk.start : chunk.stop].tolist(), chunk.start, chunk.hash)
            blob = blob_of(form, layers, row, pad + chunk.start, pad + chunk.stop, may_copy)
            metadata = _metadata(context, keys, form, tokens, chunk, blob, how, behind)
            pin = context.settings.pin
            created, gone = metadata["created"], list[str]()
            if how == EXACT:
                place = previous.hash if previous else "", chunk.start
                entry = continuation_entry(keys, chunk, place[0], tokens, created, pin)
                index += [entry] if entry else []
                gone = _replaced(shorter, place, chunk, tokens, context.grid, keys.salt)
                known.difference_update(gone)
            replaces = [keys.key(name) for name in gone]
            chunks.append(
                Entry(form.key, metadata, blob, False, pin, before[:number], replaces=replaces)
            )
            if context.indexer:
                index += context.indexer(keys, chunk, tokens, created, pin)
    return chunks + _joined(index, found.stale)


def _replaced(
    shorter: Shorter, place: tuple[str, int], chunk: Chunk, row: Tokens, grid: Grid, salt: bytes
) -> list[str]:
    """Hashes of shorter chunks that have the first tokens of this one; it takes their place."""
    there = shorter.get(place, {})
    gone = [
        name
        for name, stop in there.items()
        if stop < chunk.stop and cut(row[:stop], grid, salt, tail=True)[-1].hash == name
    ]
    rest = {name: stop for name, stop in there.items() if name not in gone}
    # What is shorter than a window would not be found by the longer chunk.
    if WINDOW <= chunk.stop - chunk.start < grid.size:
        rest[chunk.hash] = chunk.stop
    shorter[place] = rest
    return gone


def _metadata(
    context: CacheContext,
    keys: KeySpace,
    form: BlobForm,
    tokens: Tokens,
    chunk: Chunk,
    blob: memoryview | LateBlob,
    how: str,
    parent: str,
) -> dict[str, str]:
    settings, layout = context.settings, keys.layout
    return {
        "model": keys.identity.name,
        "revision": keys.identity.revision,
        "identity": keys.identity.digest,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "codec": keys.codec.format,
        "tokens": str(chunk.stop - chunk.start),
        "token_ids": keys.codec.hide(as_text(tokens[chunk.start : chunk.stop].tolist()), form.key),
        "positions": f"{chunk.start}-{chunk.stop}",
        "layers": str(len(layout.layers)),
        "bytes": str(blob.nbytes),
        "namespace": settings.namespace,
        "tags": settings.tags,
        "context": how,
        "parent": parent,
        "pinned": "yes" if settings.pin else "no",
        "created": created_now(),
        **settings.metadata,
    }


def blob_of(
    form: BlobForm,
    layers: Sequence[Any],
    row: int,
    start: int,
    stop: int,
    may_copy: Latch = OPEN,
) -> memoryview | LateBlob:
    """The blob of one row's columns `start` to `stop`, in memory of its own; see `blob_from`."""
    runs = row_runs(layers, row, start, stop) if form.is_direct else None
    if runs is not None:
        return form.file.copy(runs)
    return blob_from(form, form.numbers(row_slice(layers, row, start, stop)), may_copy)


def blob_from(
    form: BlobForm, tensors: Sequence[torch.Tensor], may_copy: Latch
) -> memoryview | LateBlob:
    """The blob of a file's tensors.

    Of those on a device a copy is taken there, which is brought over when it is asked for. Not
    where they are compressed: their size must be known, and that takes longer than the copy.
    """
    if form.nbytes is not None and all(not is_host(tensor.device) for tensor in tensors):
        with suppress(torch.OutOfMemoryError):
            return LateBlob(form.nbytes, form.encode_later(tensors), may_copy)
    return form.encode_tensors(tensors)


def extra_entry(
    form: BlobForm,
    tensors: Sequence[torch.Tensor],
    chunk: Chunk,
    before: Sequence[str],
    pin: bool,
    may_copy: Latch,
) -> Entry:
    """The entry of a value beside a chunk's K/V; the key of the chunk is the last of `before`."""
    blob, value = blob_from(form, tensors, may_copy), form.key.rpartition("@")[2]
    told = {value: str(blob.nbytes), "positions": f"{chunk.start}-{chunk.stop}"}
    return Entry(form.key, told, blob, True, pin, [*before])


def _joined(index: Iterable[Entry], stale: Mapping[str, Entry]) -> list[Entry]:
    """One entry per key. Those that are stale are replaced, the others added to."""
    joined = dict(stale)
    for entry in index:
        joined[entry.key] = merged(entry, joined.get(entry.key))
    return list(joined.values())
