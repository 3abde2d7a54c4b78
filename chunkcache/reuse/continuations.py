"""Continuations: stored chunks that go on like a prompt does where its known chunks end.

A chunk is known by all of its tokens, so a prompt that shares only the first of them would compute
them again. But K/V of a token depend on the tokens before it alone: what a stored chunk and the
prompt begin with is exact. An index entry tells which chunks there are behind a chunk (or at a
prompt's beginning) that begin with certain tokens: it is named by the hash of both, and has a field
for each chunk with its age and its tokens. Entries are hints: tokens are compared here, and blobs
when they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from chunkcache.errors import BlobError, SealedBlobError
from chunkcache.keys import INDEX_FORMAT
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.stores.base import ChunkStore, Entry
from chunkcache.tokens.chunking import Chunk, Tokens, as_text, from_text, keyed_hash
from chunkcache.tokens.plan import RowPlan

WINDOW = 16  # tokens by which an entry is named: shorter beginnings are not found
MOST = 16  # chunks that an entry names; the newest are enough

_PINNED = "pinned "
_NAME = b"chunkcache/continuation/1"


class Continuation(NamedTuple):
    """A stored chunk that begins like a prompt does from `start` on.

    Attributes:
        chunk: Its hash, and the positions of the prompt at which its tokens agree.
        tokens: `[tokens]`, all of its own token ids.
        pinned: Whether it was stored to stay.
        key: The key of the index entry that names it.
        fields: The fields of that entry.
    """

    chunk: Chunk
    tokens: Tokens
    pinned: bool
    key: str
    fields: Mapping[str, str]

    @property
    def is_whole(self) -> bool:
        """Whether the prompt agrees with all of it."""
        return self.chunk.stop - self.chunk.start == len(self.tokens)

    def without_it(self) -> dict[str, Entry]:
        """The index entry without this chunk, which is gone."""
        rest = {name: text for name, text in self.fields.items() if name != self.chunk.hash}
        return {self.key: Entry(self.key, rest, memoryview(b""))}


class Branch(NamedTuple):
    """Where a row's known chunks end.

    Attributes:
        parent: Hash of the last known chunk, `""` at the row's beginning.
        start: Position behind it.
        tokens: `[tokens]`, the row.
        stop: Position from which on all is computed.
    """

    parent: str
    start: int
    tokens: Tokens
    stop: int

    @classmethod
    def of(cls, plan: RowPlan, tokens: Tokens, stop: int) -> Branch:
        """That of a row `[tokens]` with this plan, of which all from `stop` on is computed."""
        number = next((n for n, c in enumerate(plan.chunks) if c.stop > plan.reach), None)
        if number is None:
            return cls("", stop, tokens, stop)
        parent = plan.chunks[number - 1].hash if number else ""
        start = plan.chunks[number].start
        return cls(parent, start, tokens, stop if stop > plan.reach else start)


def continuation_entry(
    keys: KeySpace, chunk: Chunk, parent: str, row: Tokens, created: str, pinned: bool = False
) -> Entry | None:
    """The entry by which a chunk is found behind another one; `None` for a chunk too short."""
    tokens = row[chunk.start : chunk.stop]
    if len(tokens) < WINDOW:
        return None
    key = _key(keys, parent, tokens)
    text = (_PINNED if pinned else "") + keys.codec.hide(as_text(tokens.tolist()), key)
    fields = {chunk.hash: f"0 {created} {text}"}
    return Entry(key, fields, memoryview(b""), merge=True, pinned=pinned)


def staying(entry: Entry) -> Entry:
    """The entry of a chunk that a longer one of the same text does not replace."""
    fields = {}
    for name, place in entry.metadata.items():
        offset, created, text = place.split(" ", 2)
        fields[name] = f"{offset} {created} {_PINNED}{text.removeprefix(_PINNED)}"
    return replace(entry, metadata=fields)


def find_continuations(
    store: ChunkStore, keys: KeySpace, branches: Sequence[Branch]
) -> tuple[list[list[Continuation]], dict[str, Entry]]:
    """Stored chunks that continue rows where their known chunks end, in one round trip.

    Returns:
        Of each row, those that go on like it, the longest match first; and entries that name
        too many chunks: by key, what shall replace them.

    Raises:
        StoreError: The store failed.
    """
    names = [
        _key(keys, branch.parent, branch.tokens[branch.start :])
        if branch.stop - branch.start >= WINDOW
        else ""
        for branch in branches
    ]
    asked = list(dict.fromkeys(filter(None, names)))
    answers = dict(zip(asked, store.read_metadata(asked), strict=True)) if asked else {}
    stale = {}
    for key, fields in answers.items():
        if fields and len(fields) > 2 * MOST:
            kept = {name: fields[name] for name in _newest(fields)}
            stale[key] = Entry(key, kept, memoryview(b""))
    found = [
        _compare(keys, key, branch, answers.get(key) or {})
        for key, branch in zip(names, branches, strict=True)
    ]
    return found, stale


def _key(keys: KeySpace, parent: str, tokens: Tokens) -> str:
    first = np.ascontiguousarray(tokens[:WINDOW], dtype="<i8").tobytes()
    name = keyed_hash(keys.salt, _NAME, parent.encode(), b"/", first).hex()
    return keys.key(name, INDEX_FORMAT)


def _newest(fields: Mapping[str, str]) -> list[str]:
    """Hashes of the newest chunks that an entry names."""
    return sorted(fields, key=lambda name: fields[name].partition(" ")[2])[-MOST:]


def _compare(
    keys: KeySpace, key: str, branch: Branch, fields: Mapping[str, str]
) -> list[Continuation]:
    """The chunks that an entry names, as far as each is like the row."""
    wanted = branch.tokens[branch.start :]
    found = []
    for name in _newest(fields):
        text = fields[name].split(" ", 2)[-1]
        pinned = text.startswith(_PINNED)
        try:
            text = keys.codec.reveal(text.removeprefix(_PINNED), key)
        except (SealedBlobError, BlobError):
            continue
        tokens = from_text(text)
        if tokens is None or not len(tokens):
            continue
        both = min(len(tokens), len(wanted))
        differs = np.flatnonzero(tokens[:both] != wanted[:both])
        alike = int(differs[0]) if len(differs) else both
        if alike:
            chunk = Chunk(branch.start, branch.start + alike, name)
            found.append(Continuation(chunk, tokens, pinned, key, fields))
    # Of those that are alike the longest: it may have replaced the others.
    return sorted(found, key=lambda each: (-each.chunk.stop, -len(each.tokens)))
