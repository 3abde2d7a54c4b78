"""Index: which stored chunks hold a text, wherever it stood when they were computed.

Two round trips more than an exact lookup, for all rows of a batch together: one asks for the
anchors of the unknown part of the prompt, one for the tokens of the chunks that hold them. Entries
are hints: tokens are compared here, and blobs are checked when they are read. A prompt that meets
an entry with too many chunks, or with chunks that are gone, writes it anew without them. Chunks
that `add_documents` computed are marked in their metadata and in the entries, and counted apart:
prompts, however many, do not crowd them out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from chunkcache.anywhere.anchors import REACH, WINDOW, anchors
from chunkcache.anywhere.matching import Match, StoredChunk, laid, long_enough
from chunkcache.errors import BlobError, SealedBlobError
from chunkcache.keys import INDEX_FORMAT
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.stores.base import ChunkStore, Entry, first_position
from chunkcache.tokens.chunking import Chunk, Grid, Tokens, cut, from_text

# Texts that every prompt has (a system prompt) collect variants; the newest are enough: so many of
# those that were prepared, and so many others.
MOST_VARIANTS = 8
# And some texts are one window over and over again.
MOST_PLACES = 32
# The metadata field of such chunks, and the last word of a place in an entry.
_PREPARED = "prepared"


@dataclass(frozen=True, slots=True)
class Passage:
    """Equal rows of a batch, and the part of them that is not known exactly.

    Attributes:
        tokens: `[tokens]`, a row's token ids without padding.
        start: Position where the exact beginning ends.
        stop: Position where the tokens begin whose outputs are wanted.
        rows: Numbers of the rows.
        pad: Columns of left padding before each.
    """

    tokens: Tokens
    start: int
    stop: int
    rows: tuple[int, ...] = (0,)
    pad: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        matches: Parts of each passage that the store has K/V for, in order.
        short: Others, in runs that are too short to be moved.
        stale: Index entries that name chunks which are gone, or too many: by key, what shall
            replace them.
    """

    matches: list[list[Match]]
    short: list[list[Match]]
    stale: dict[str, Entry]


def index_entries(
    keys: KeySpace, chunk: Chunk, row: Tokens, created: str, pinned: bool = False
) -> list[Entry]:
    """The anchor entries by which a chunk of a row of tokens will be found.

    Windows beside it count too: a text may begin with the chunk's last tokens, or end with its
    first ones, which are too few to have an anchor of their own.
    """
    begin, size = max(chunk.start - REACH, 0), chunk.stop - chunk.start
    offsets: defaultdict[str, list[int]] = defaultdict(list)
    for anchor in anchors(row[begin : chunk.stop + REACH], keys.salt):
        offsets[anchor.hash].append(begin + anchor.start - chunk.start)

    def outside(offset: int) -> int:
        return max(-offset, offset + WINDOW - size)

    return [
        Entry(
            _key(keys, name),
            {chunk.hash: f"{min(found, key=outside)} {created}"},
            memoryview(b""),
            merge=True,
            pinned=pinned,
        )
        for name, found in offsets.items()
    ]


def _key(keys: KeySpace, anchor_hash: str) -> str:
    """The store's key of an anchor's entry."""
    return keys.key(anchor_hash, INDEX_FORMAT)


def prepared_chunk(entry: Entry) -> Entry:
    """A chunk's entry, marked as computed by `add_documents`. No setting gives it this field."""
    return replace(entry, metadata={**entry.metadata, _PREPARED: "yes"})


def prepared_places(entry: Entry) -> Entry:
    """An index entry, its chunks marked so."""
    places = {name: f"{place} {_PREPARED}" for name, place in entry.metadata.items()}
    return replace(entry, metadata=places)


def is_prepared(fields: Mapping[str, str]) -> bool:
    """Whether a chunk with these metadata was computed by `add_documents`."""
    return fields.get(_PREPARED) == "yes"


def prepared_variants(fields: Mapping[str, str]) -> set[str]:
    """Hashes of the chunks that an index entry names as such."""
    return {name for name, place in fields.items() if _is_marked(place)}


def _is_marked(place: str) -> bool:
    return place.endswith(f" {_PREPARED}")


def search(
    store: ChunkStore, keys: KeySpace, passages: Sequence[Passage], prepared: bool = False
) -> Found:
    """Which parts of the passages the store has K/V for, computed anywhere.

    Args:
        store: Where to look.
        keys: Those of the chunks.
        passages: What to look for.
        prepared: Find only what `add_documents` has computed.

    Raises:
        StoreError: The store failed.
    """
    places = _anchor_places(keys, passages)
    if not places:
        return Found([[] for _ in passages], [[] for _ in passages], {})
    entries = store.read_metadata([_key(keys, anchor) for anchor in places])
    answers = [fields or {} for fields in entries]
    newest = [_newest(fields) for fields in answers]
    hashes = list(
        dict.fromkeys(
            name
            for fields, variants in zip(answers, newest, strict=True)
            for name in variants
            if not prepared or _is_marked(fields[name])
        )
    )
    asked = set(hashes)
    records = store.read_metadata([keys.key(name) for name in hashes]) if hashes else []
    chunks: dict[str, StoredChunk] = {}
    sealed: set[str] = set()  # with another key: not for us, but good for others
    for name, fields in zip(hashes, records, strict=True):
        try:
            if fields and (chunk := _read_record(keys, name, fields)):
                chunks[name] = chunk
        except SealedBlobError:
            sealed.add(name)
    shifts: list[set[tuple[str, int]]] = [set() for _ in passages]
    stale = {}
    for anchor, fields, variants in zip(places, answers, newest, strict=True):
        good = {name: offset for name, offset in variants.items() if name in chunks}
        kept = [name for name in variants if name in good or name in sealed]
        marked = sum(map(_is_marked, fields.values()))
        enough = sum(min(some, MOST_VARIANTS) for some in (marked, len(fields) - marked))
        crowded = len(kept) < enough or len(fields) > enough + MOST_VARIANTS
        if crowded and all(name in asked for name in variants):
            key = _key(keys, anchor)
            rest = {name: fields[name] for name in kept}
            pinned = any(chunks[name].pinned for name in good)
            stale[key] = Entry(key, rest, memoryview(b""), pinned=pinned)
        for number, start in places[anchor]:
            shifts[number] |= {(name, start - offset) for name, offset in good.items()}
    matches, short = [], []
    for passage, found in zip(passages, shifts, strict=True):
        candidates = [
            (chunks[name], shift)
            for name, shift in sorted(found)
            if chunks[name].prepared or not prepared
        ]
        every = laid(passage.tokens, candidates, passage.start, passage.stop)
        matches.append(long_enough(every))
        # Less than a window is alike by chance, and seldom seen.
        short.append([p for p in long_enough(every, WINDOW) if p not in matches[-1]])
    return Found(matches, short, stale)


def is_exact(match: Match, tokens: Tokens, grid: Grid, salt: bytes) -> bool:
    """Whether a match's K/V are exact here: at the same position, behind the same tokens.

    A part of a chunk may be so where the rest of it is not, or where a chunk before it is missing.
    Its hash tells, since it covers all that stood before.
    """
    if match.start != match.old_start:
        return False
    then = np.concatenate([tokens[: match.start], match.chunk.tokens[match.offset :]])
    chunks = cut(then, grid, salt, tail=True)
    return bool(chunks) and chunks[-1].hash == match.chunk.hash


def _anchor_places(keys: KeySpace, passages: Sequence[Passage]) -> dict[str, list[tuple[int, int]]]:
    """Each anchor's hash, and where it stands: numbers of passages, and positions."""
    places: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, passage in enumerate(passages):
        if passage.start >= passage.stop:
            continue
        for anchor in anchors(passage.tokens[passage.start : passage.stop], keys.salt):
            there = places[anchor.hash]
            if len(there) < MOST_PLACES or there[-MOST_PLACES][0] != number:
                there.append((number, passage.start + anchor.start))
    return dict(places)


def _newest(fields: Mapping[str, str]) -> dict[str, int]:
    """The newest variants that an anchor's entry names: their hashes, and where it is in them."""
    newest = sorted(fields.items(), key=lambda item: item[1].partition(" ")[2])
    marked = [item for item in newest if _is_marked(item[1])]
    others = [item for item in newest if not _is_marked(item[1])]
    variants = {}
    for name, place in (*marked[-MOST_VARIANTS:], *others[-MOST_VARIANTS:]):
        offset = place.partition(" ")[0]
        if offset.removeprefix("-").isdecimal() and len(offset) < 8:
            variants[name] = int(offset)
    return variants


def _read_record(keys: KeySpace, chunk_hash: str, fields: dict[str, str]) -> StoredChunk | None:
    """A chunk's metadata as a candidate. Only a hint: the blob is checked against it later.

    Raises SealedBlobError if its tokens are sealed with another key.
    """
    try:
        ids = from_text(keys.codec.reveal(fields["token_ids"], keys.key(chunk_hash)))
        start = first_position(fields["positions"])
    except SealedBlobError:
        raise
    except (BlobError, KeyError):
        return None
    if ids is None or start is None:
        return None
    return StoredChunk(
        chunk_hash,
        start,
        ids,
        parent=fields.get("parent", ""),
        clean=fields.get("context") == "exact",
        created=fields.get("created", ""),
        pinned=fields.get("pinned") == "yes",
        prepared=is_prepared(fields),
    )
