"""From the layers into the store: chunks that are complete and not there yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from chunkcache.kv.coding import Form
from chunkcache.kv.layers import row_runs, row_slice
from chunkcache.reuse.index import created_now, index_entries
from chunkcache.reuse.step import Held, Setup, Step
from chunkcache.stores.base import Entry, merged
from chunkcache.tokens.chunking import Chunk, Tokens, as_text, cut, keyed_hash
from chunkcache.tokens.matching import SHORTEST_RUN

EXACT, APPROXIMATE = "exact", "approximate"


def exact_lengths(held: Held, step: Step) -> list[int]:
    """Tokens from the start of each row whose K/V may be kept under exact keys."""
    transcript = held.transcript
    last = step.certain if transcript.text_until is None else transcript.text_until
    return [
        max(min(step.certain, last if end is None else min(end, last)) - pad, 0)
        for pad, end in zip(transcript.pads, transcript.exact_until, strict=True)
    ]


def harvest(setup: Setup, held: Held, step: Step) -> list[Entry]:
    """Entries for all chunks that are not known yet; they become known.

    Index entries stand behind the chunks that they name.
    """
    chunks: list[Entry] = []
    index: list[Entry] = []
    ids = held.transcript.ids()
    for row, pad in enumerate(held.transcript.pads):
        tokens = ids[row, pad:].numpy()
        before: Chunk | None = None
        found = _chunks(setup, held, step, row, tokens)
        keys = [held.origin.key(chunk.hash) for chunk, _ in found]
        for number, (chunk, context) in enumerate(found):
            parent = before.hash if before and before.stop == chunk.start else ""
            before = chunk
            if chunk.hash in held.known:
                continue
            held.known.add(chunk.hash)
            entry = _entry(setup, held, row, chunk, context, parent)
            chunks.append(replace(entry, before=keys[:number]))
            if setup.settings.reuse == "anywhere":
                created = entry.metadata["created"]
                index += index_entries(held.origin, chunk, tokens, created, setup.settings.pin)
    return chunks + _joined(index, step.stale)


def _chunks(
    setup: Setup, held: Held, step: Step, row: int, tokens: Tokens
) -> list[tuple[Chunk, str]]:
    """The chunks of a row that may be kept, in order, and what their context was."""
    exact = held.transcript.exact_until[row] is None
    length = exact_lengths(held, step)[row]
    tail = step.is_whole_prompt and exact and setup.settings.store_tail
    chunks = cut(tokens[:length], setup.grid, held.origin.salt, tail)
    found = [(chunk, EXACT) for chunk in chunks]
    if not exact and step.is_prompt:
        begin = chunks[-1].stop if chunks else 0
        end = step.certain - held.transcript.pads[row]
        for start, stop in step.fresh[row]:
            behind = _approximate(
                tokens, max(start, begin), min(stop, end), setup.grid.size, held.origin.salt
            )
            found += [(chunk, APPROXIMATE) for chunk in behind]
    return found


def _approximate(tokens: Tokens, start: int, stop: int, size: int, salt: bytes) -> list[Chunk]:
    """Chunks for tokens that were computed behind moved ones.

    Their K/V are not those of their prefix, so their hashes can never be those of exact chunks:
    they are found by their text alone.
    """
    chunks = []
    for begin in range(start, stop if stop - start >= SHORTEST_RUN else start, size):
        end = min(begin + size, stop)
        before = np.ascontiguousarray(tokens[:end], dtype="<i8").tobytes()
        place = begin.to_bytes(8, "little")
        digest = keyed_hash(salt, b"chunkcache/approximate/2", place, before)
        chunks.append(Chunk(begin, end, digest.hex()))
    return chunks


def _entry(setup: Setup, held: Held, row: int, chunk: Chunk, context: str, parent: str) -> Entry:
    origin, layout, pad = held.origin, held.layout, held.transcript.pads[row]
    start, stop = pad + chunk.start, pad + chunk.stop
    tokens = held.transcript.ids()[row, start:stop].tolist()
    form = origin.form(layout, tokens, chunk.start, chunk.hash)
    blob = blob_of(form, held.layers, row, start, stop)
    metadata = {
        "model": origin.identity.name,
        "revision": origin.identity.revision,
        "identity": origin.identity.digest,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "codec": origin.codec.format,
        "tokens": str(chunk.stop - chunk.start),
        "token_ids": origin.codec.hide(as_text(tokens), form.key),
        "positions": f"{chunk.start}-{chunk.stop}",
        "layers": str(len(layout.layers)),
        "bytes": str(blob.nbytes),
        "namespace": setup.settings.namespace,
        "tags": setup.settings.tags,
        "context": context,
        "parent": parent,
        "pinned": "yes" if setup.settings.pin else "no",
        "created": created_now(),
        **setup.settings.metadata,
    }
    return Entry(form.key, metadata, blob, pinned=setup.settings.pin)


def blob_of(form: Form, layers: Sequence[Any], row: int, start: int, stop: int) -> memoryview:
    """The blob of one row's columns `start` to `stop`, in memory of its own."""
    runs = row_runs(layers, row, start, stop) if form.is_direct else None
    if runs is None:
        return form.encode(row_slice(layers, row, start, stop))
    return form.file.copy(runs)


def _joined(index: Iterable[Entry], stale: Mapping[str, Entry]) -> list[Entry]:
    """One entry per key. Those that are stale are replaced, the others added to."""
    joined = dict(stale)
    for entry in index:
        joined[entry.key] = merged(entry, joined.get(entry.key))
    return list(joined.values())
