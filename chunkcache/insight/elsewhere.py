"""Elsewhere: a prompt's text in chunks that its keys cannot find, and what parts them from it.

Chunks of another model, namespace, codec or size have other hashes. Their metadata tell the text,
so going through all of them finds it; which takes as long as listing the store.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chunkcache.errors import SettingError
from chunkcache.insight.alike import Match, matches, text_of, windows
from chunkcache.inventory import catalog
from chunkcache.keys import ChunkKey
from chunkcache.model.identity import ModelIdentity
from chunkcache.model.state import SELF_TEST_FORMAT
from chunkcache.repair import Mask
from chunkcache.reuse.context import CacheContext
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.stores.base import ChunkStore
from chunkcache.tokens.chunking import Chunk, Grid, Tokens, cut
from chunkcache.tokens.token_text import shown

EVICTED = "its K/V were evicted; only the metadata are left"
OTHER_SECRET = "in the store under another secret"
OTHER_CONTEXT = "in the store, behind other text or under another secret"
OTHER_POSITION = ", at another position"
OTHER_CUT = ", cut into other chunks"
PART = ", but only part of a chunk matches"
PERHAPS = ", perhaps behind other text"
# Chunks of this very cache's world that the index does not know: stored with reuse="prefix", or
# their entries were evicted.
NOT_INDEXED = ", and not indexed: only what is stored with reuse='anywhere' can be moved"

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
    context: CacheContext,
    keys: KeySpace,
    rows: Sequence[Tokens],
    cuts: Sequence[Sequence[Chunk]],
    wanted: Sequence[Mask],
) -> list[list[Sighting]]:
    """What chunks hold of these rows' wanted tokens; for each row, the nearest ones last.

    Args:
        context: Store and settings of the cache.
        keys: Where the prompt's chunks would be.
        rows: `[tokens]` ids of each row.
        cuts: The chunks of each row.
        wanted: `[tokens]` of each row, True where nothing is known.

    Raises:
        StoreError: The store failed.
    """
    found: list[list[Sighting]] = [[] for _ in rows]
    places = windows(rows, wanted)
    if not places:
        return found
    own: defaultdict[str, list[tuple[int, Chunk]]] = defaultdict(list)
    for row, chunks in enumerate(cuts):
        for chunk in chunks:
            own[keys.key(chunk.hash)].append((row, chunk))
    alike: list[Match] = []
    evicted: set[str] = set()  # their metadata still tell what stood before others
    for entry in catalog.entries(context.store):
        if not entry.nbytes:
            evicted.add(entry.key)
            for row, chunk in own.get(entry.key, ()):
                found[row].append(Sighting(chunk.start, chunk.stop, EVICTED, 0))
        if (tokens := text_of(keys, entry)) is not None:
            alike += matches(entry, tokens, rows, places)
    reasons = _Reasons(context, keys, rows, cuts)
    # What stood before a chunk comes before it.
    for match in sorted(alike, key=lambda match: match.at):
        told = reasons.of(match)
        if told and str(match.key) not in evicted and str(match.key) not in own:
            found[match.row].append(Sighting(match.start, match.stop, *told))
    return [sorted(row, key=lambda seen: -seen.distance) for row in found]


class _Reasons:
    """Why chunks that hold a prompt's text do not serve; asked by their old positions, in order."""

    def __init__(
        self,
        context: CacheContext,
        keys: KeySpace,
        rows: Sequence[Tokens],
        cuts: Sequence[Sequence[Chunk]],
    ) -> None:
        self._keys, self._rows = keys, rows
        self._store, self._settings = context.store, context.settings
        self._spans = [{(chunk.start, chunk.stop) for chunk in chunks} for chunks in cuts]
        self._cuts: dict[tuple[int, ...], set[str]] = {}  # hashes, by row, size and overlap
        self._differences: dict[tuple[str, ...], str] = {}
        # Row and key of chunks that were computed behind the very text that stands there.
        self._rooted: set[tuple[int, str]] = set()

    def of(self, match: Match) -> tuple[str, int] | None:
        """The reason and its distance; None for another process's part of this model's K/V."""
        rooted = self._is_rooted(match)
        mine, key = self._keys.identity, match.key
        if key.world_size == mine.world_size and key.worker != mine.worker:
            return None
        where, far = self._where(match)
        index = "" if where else NOT_INDEXED
        if not match.whole:
            return f"in the store{where}{PART}{index}", 30 + far
        if not match.stands:
            return f"in the store{where}{OTHER_POSITION}{index}", 20 + far
        if (match.at, match.at + match.size) not in self._spans[match.row]:
            return self._other_cut(match, where), 10 + far
        if rooted:  # of this very prompt: so if nothing else differs, the secret does
            return f"in the store{where}" if where else OTHER_SECRET, 1 + far
        return f"in the store{where}{PERHAPS}" if where else OTHER_CONTEXT + NOT_INDEXED, 10 + far

    def _is_rooted(self, match: Match) -> bool:
        """Whether a chunk is known to have stood behind the text that stands before it here."""
        key, fields = str(match.key), match.fields
        if not match.whole or not match.stands or fields.get("context") != "exact":
            return False
        before = key.removesuffix(match.key.chunk_hash) + fields.get("parent", "")
        if match.at == 0 or (match.row, before) in self._rooted:
            self._rooted.add((match.row, key))
            return True
        return False

    def _where(self, match: Match) -> tuple[str, int]:
        """For which other model, in which other namespace and codec a chunk is, and how far off."""
        key, fields = match.key, match.fields
        mine, other = self._keys.identity, fields.get("identity", "")
        where, far = "", 0
        if other != mine.digest or key.world_size != mine.world_size:
            name = fields.get("model", key.model)
            parts = (other, name, str(key.world_size), fields.get("dtype", ""))
            if parts not in self._differences:
                self._differences[parts] = _difference(self._store, mine, key, fields)
            where, far = f" for another model ({self._differences[parts]})", 3
        if (name := fields.get("namespace", "")) != self._settings.namespace:
            where, far = f"{where}, in the namespace {name!r}", far or 2
        if key.format != self._keys.codec.format:
            where, far = f"{where}, with the codec {shown(key.format)}", far or 1
        return where, far

    def _other_cut(self, match: Match, where: str) -> str:
        """Of a chunk where this prompt has none: whether its size would give it here."""
        grid = match.size, self._settings.chunk_overlap
        if where or grid[0] <= grid[1]:
            return f"in the store{where}{OTHER_CUT}{'' if where else NOT_INDEXED}"
        if (match.row, *grid) not in self._cuts:
            chunks = cut(self._rows[match.row], Grid(*grid), self._keys.salt)
            self._cuts[match.row, *grid] = {chunk.hash for chunk in chunks}
        if match.key.chunk_hash in self._cuts[match.row, *grid]:
            index = NOT_INDEXED if self._settings.reuse == "anywhere" else ""
            return f"in the store, in a chunk of {match.size} tokens{index}"
        return f"in the store{OTHER_CUT}{NOT_INDEXED}"


def _difference(
    store: ChunkStore, mine: ModelIdentity, key: ChunkKey, fields: Mapping[str, str]
) -> str:
    """What is another in the model of a chunk: its name, and the parts of its identity."""
    told = [shown(f"{fields.get('model', key.model)}, {fields.get('dtype', '?')}")]
    if key.world_size != mine.world_size:
        told.append(f"on {key.world_size} processes")
    try:
        verdict = ChunkKey(
            SELF_TEST_FORMAT, key.model, key.world_size, key.worker, fields.get("identity", "")
        )
        known = (store.read_metadata([str(verdict)])[0] or {}).get("parts", "")
        parts = json.loads(known)
        names = [_NAMES.get(n, n) for n, value in mine.parts if parts.get(n) != value]
    except (SettingError, ValueError, AttributeError, RecursionError):
        return told[0]
    return ", ".join(told) + (f"; other {', '.join(names)}" if names else "")
