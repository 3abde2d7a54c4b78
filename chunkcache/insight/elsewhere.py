"""Elsewhere: a prompt's text in chunks that its keys cannot find, and what parts them from it.

Chunks of another model, namespace, codec or size have other hashes. Their metadata tell the text,
so going through all of them finds it; which takes as long as listing the store.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from chunkcache.errors import BlobError, SettingError
from chunkcache.inventory import catalog
from chunkcache.model.identity import ChunkKey, ModelIdentity
from chunkcache.model.state import PROOF_FORMAT
from chunkcache.repair import Mask
from chunkcache.reuse.index import Origin
from chunkcache.settings import Settings
from chunkcache.stores.base import ChunkStore, Listed
from chunkcache.tokens.chunking import Tokens
from chunkcache.tokens.token_text import shown

WINDOW = 32  # tokens that must be alike
EVICTED = "its K/V were evicted; their metadata are left"
OTHER_SECRET = "in the store under another secret"
ELSEWHERE = "in the store, computed at another position or behind other text"

# Parts of an identity as people call them; the others are named as they are.
_NAMES = {"config": "configuration", "rope": "RoPE", "layout": "version of Transformers"}


@dataclass(frozen=True, slots=True)
class Sighting:
    """Tokens of a row that some chunk holds, and why it does not serve.

    `distance` orders the reasons: of several chunks, the nearest says most.
    """

    start: int
    stop: int
    reason: str
    distance: int


def sightings(
    origin: Origin, settings: Settings, rows: Sequence[Tokens], wanted: Sequence[Mask]
) -> list[list[Sighting]]:
    """What chunks hold of these rows' wanted tokens; for each row, the nearest ones last.

    Args:
        origin: Where the prompt's chunks would be.
        settings: Those of the cache.
        rows: `[tokens]` ids of each row.
        wanted: `[tokens]` of each row, True where nothing is known.

    Raises:
        StoreError: The store failed.
    """
    found: list[list[Sighting]] = [[] for _ in rows]
    places = _windows(rows, wanted)
    if not places:
        return found
    differences: dict[str, str] = {}
    for entry in catalog.entries(origin.store):
        if (tokens := _tokens(origin, entry)) is None:
            continue
        for row, start, stop in _matches(tokens, rows, places):
            told = _reason(origin, settings, entry, start, tokens, differences)
            found[row].append(replace(told, start=start, stop=stop))
    return [sorted(row, key=lambda seen: -seen.distance) for row in found]


def _windows(rows: Sequence[Tokens], wanted: Sequence[Mask]) -> dict[bytes, list[tuple[int, int]]]:
    """Row and place of all windows of wanted tokens."""
    places = defaultdict(list)
    for number, (row, mask) in enumerate(zip(rows, wanted, strict=True)):
        ids = np.ascontiguousarray(row, dtype="<i8")
        whole = np.convolve(mask, np.ones(WINDOW), "valid") == WINDOW if len(row) >= WINDOW else []
        for start in np.flatnonzero(whole).tolist():
            places[ids[start : start + WINDOW].tobytes()].append((number, start))
    return places


def _tokens(origin: Origin, entry: Listed) -> Tokens | None:
    """`[tokens]`, the text of a chunk, if its metadata tell it."""
    text = (entry.metadata or {}).get("token_ids", "")
    try:
        if not text.startswith("["):  # it is sealed
            text = origin.codec.reveal(text, entry.key)
        tokens = np.array(json.loads(text), dtype="<i8")
    except (BlobError, ValueError, TypeError, OverflowError, RecursionError):
        return None
    return tokens if tokens.ndim == 1 and len(tokens) >= WINDOW else None


def _matches(
    tokens: Tokens, rows: Sequence[Tokens], places: Mapping[bytes, list[tuple[int, int]]]
) -> Iterator[tuple[int, int, int]]:
    """Row, start and stop of what is alike, each row once."""
    seen: set[int] = set()
    for begin in range(0, len(tokens) - WINDOW + 1, WINDOW):
        for number, place in places.get(tokens[begin : begin + WINDOW].tobytes(), ()):
            if number in seen:
                continue
            seen.add(number)
            here = rows[number][place:]
            length = min(len(here), len(tokens) - begin)
            differs = np.flatnonzero(here[:length] != tokens[begin : begin + length])
            yield number, place, place + (int(differs[0]) if len(differs) else length)


def _reason(
    origin: Origin,
    settings: Settings,
    entry: Listed,
    start: int,
    tokens: Tokens,
    differences: dict[str, str],
) -> Sighting:
    """Why a chunk that holds the text from `start` on does not serve."""
    fields = entry.metadata or {}
    key = ChunkKey.parse(entry.key)
    if fields.get("identity") != origin.identity.digest:
        other = fields.get("identity", "")
        if other not in differences:
            differences[other] = _difference(origin.store, origin.identity, key, fields)
        return Sighting(0, 0, f"in the store for another model: {differences[other]}", 4)
    if fields.get("namespace", "") != settings.namespace:
        name = fields.get("namespace", "")
        return Sighting(0, 0, f"in the store, in the namespace {name!r}", 3)
    if key.format != origin.codec.format:
        return Sighting(0, 0, f"in the store, with the codec {shown(key.format)}", 2)
    if not entry.nbytes:
        return Sighting(0, 0, EVICTED, 0)
    if len(tokens) != settings.chunk_size:
        return Sighting(0, 0, f"in the store, in a chunk of {len(tokens)} tokens", 1)
    if fields.get("positions") == f"0-{len(tokens)}" and start == 0:
        # Nothing stands before it, so only the secret is left.
        return Sighting(0, 0, OTHER_SECRET, 1)
    return Sighting(0, 0, ELSEWHERE, 1)


def _difference(
    store: ChunkStore, mine: ModelIdentity, key: ChunkKey, fields: Mapping[str, str]
) -> str:
    """What is another in the model of a chunk: its name, and the parts of its identity."""
    told = [shown(f"{key.model}, {fields.get('dtype', '?')}")]
    if key.world_size != mine.world_size:
        told.append(f"on {key.world_size} processes")
    try:
        proof = ChunkKey(
            PROOF_FORMAT, key.model, key.world_size, key.worker, fields.get("identity", "")
        )
        known = (store.read_metadata([str(proof)])[0] or {}).get("parts", "")
        parts = json.loads(known)
        names = [_NAMES.get(n, n) for n, value in mine.parts if parts.get(n) != value]
    except (SettingError, ValueError, AttributeError, RecursionError):
        return told[0]
    return ", ".join(told) + (f"; other {', '.join(names)}" if names else "")
