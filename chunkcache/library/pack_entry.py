"""One chunk of a pack: its metadata as JSON, and what must be true of it and of its blob."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import xxhash

from chunkcache.anywhere.anchors import REACH
from chunkcache.errors import BlobError, SettingError
from chunkcache.keys import CODECS, SEALED, ZSTD, ChunkKey
from chunkcache.tokens.listed import from_text

FORMAT = "chunkcache-pack/1"
FORMATS = frozenset((*CODECS, *(name + SEALED for name in CODECS)))
MAX_METADATA = 1 << 20  # bytes of one chunk's JSON
MAX_HEADER = 1 << 20  # bytes of the header in one blob
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PLACE = re.compile(r"-?\d{1,7} [0-9T:+.Z-]{1,40}", re.ASCII)
_CLOCKS = timedelta(days=1)  # by so much may those of two machines differ
_CONTEXTS = ("exact", "approximate")


@dataclass(frozen=True, slots=True)
class PackEntry:
    """What a pack says of one chunk.

    Attributes:
        key: Its key.
        metadata: As in a store.
        checksum: xxh3-128 of its blob, 32 hexadecimal digits.
        mentions: For each anchor's hash, what its index entry says of the chunk.
    """

    key: str
    metadata: Mapping[str, str]
    checksum: str
    mentions: Mapping[str, str]

    def to_json(self) -> bytes:
        """As it stands in a pack."""
        told = {
            "metadata": dict(self.metadata),
            "checksum": self.checksum,
            "mentions": dict(self.mentions),
        }
        return json.dumps(told).encode()

    @classmethod
    def read(cls, key: str, raw: bytes) -> PackEntry:
        """Read what stands in a pack.

        Raises:
            BlobError: It is something else.
        """
        try:
            told = json.loads(raw)
        except (ValueError, RecursionError):
            raise BlobError("its metadata are damaged") from None
        if not isinstance(told, dict) or set(told) != {"metadata", "checksum", "mentions"}:
            raise BlobError("its metadata are damaged")
        metadata, mentions = told["metadata"], told["mentions"]
        if not _are_texts(metadata) or not _are_texts(mentions):
            raise BlobError("its metadata are damaged")
        if not all(is_mention(anchor, place) for anchor, place in mentions.items()):
            raise BlobError("its mentions in the index are damaged")
        return cls(key, metadata, str(told["checksum"]), mentions)


def is_mention(anchor: str, place: str) -> bool:
    """Whether this can be an anchor's hash and what its index entry says of a chunk.

    Of many chunks an entry keeps the newest, so one of the future would push out all others.
    """
    if not _HASH.fullmatch(anchor) or not _PLACE.fullmatch(place):
        return False
    return not _is_future(place.partition(" ")[2])


def most_mentions(tokens: int) -> int:
    """By how many anchors a chunk of so many tokens can be found."""
    return tokens + 2 * REACH


def check_metadata(entry: PackEntry) -> None:
    """Check that metadata and mentions agree with the key and with each other.

    Raises:
        BlobError: They do not.
    """
    try:
        key = ChunkKey.parse(entry.key)
    except SettingError:
        raise BlobError("its key is no chunk's") from None
    fields = entry.metadata
    if str(key) != entry.key or key.format not in FORMATS:
        raise BlobError("its key is no chunk's")
    same_model = key.model.rpartition("-")[2] == fields.get("identity", "")[:8]
    if fields.get("codec") != key.format or not same_model:
        raise BlobError("its metadata are of another key")
    count, bytes_, positions = (fields.get(n, "") for n in ("tokens", "bytes", "positions"))
    start, _, stop = positions.partition("-")
    if not all(text.isdecimal() and len(text) < 12 for text in (count, bytes_, start, stop)):
        raise BlobError("its metadata are damaged")
    if int(stop) - int(start) != int(count) or fields.get("context") not in _CONTEXTS:
        raise BlobError("its metadata are damaged")
    if fields.get("created") and _is_future(fields["created"]):
        raise BlobError("its metadata are of the future")
    if not key.format.endswith(SEALED):
        _check_tokens(fields)
    if len(entry.mentions) > most_mentions(int(count)):
        raise BlobError("its mentions in the index are more than its tokens allow")


def check(entry: PackEntry, blob: memoryview) -> None:
    """Check that a blob is whole, and of this very chunk, and its metadata sound.

    A blob that is neither compressed nor sealed is looked into. Others are compared with the pack's
    checksum alone, and looked into when they are used, as all blobs are.

    Raises:
        BlobError: It is not.
    """
    check_metadata(entry)
    key, fields = ChunkKey.parse(entry.key), entry.metadata
    if int(fields["bytes"]) != blob.nbytes or xxhash.xxh3_128_hexdigest(blob) != entry.checksum:
        raise BlobError("its blob is damaged")
    if not key.format.endswith((ZSTD, SEALED)):
        _look_into(blob, key.chunk_hash, fields)


def _check_tokens(fields: Mapping[str, str]) -> None:
    """Compare the token ids with their number."""
    ids = from_text(fields.get("token_ids", ""))
    if ids is None:
        raise BlobError("its metadata are damaged")
    if len(ids) != int(fields["tokens"]):
        raise BlobError("its metadata are damaged: they count other tokens than they name")


def _is_future(date: str) -> bool:
    """Whether a date lies ahead, or is none."""
    try:
        when = datetime.fromisoformat(date)
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return when > datetime.now(UTC) + _CLOCKS
    except (ValueError, OverflowError):
        return True


def _look_into(blob: memoryview, chunk_hash: str, fields: Mapping[str, str]) -> None:
    """Compare what a blob says of itself with what is said of it."""
    size = int.from_bytes(blob[:8], "little")
    if not 0 < size <= min(MAX_HEADER, blob.nbytes - 8):
        raise BlobError("its blob is damaged")
    try:
        told: Any = json.loads(bytes(blob[8 : 8 + size]))["__metadata__"]
        own = {name: told[name] for name in ("chunk_hash", "positions", "tokens", "checksum")}
        same_tokens = json.loads(own["tokens"]) == json.loads(fields["token_ids"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BlobError("its blob is damaged") from None
    if own["chunk_hash"] != chunk_hash or own["positions"] != fields["positions"]:
        raise BlobError("its blob is of another key")
    if not same_tokens:
        raise BlobError("its blob is of other tokens")
    if own["checksum"] != f"xxh3_128:{xxhash.xxh3_128_hexdigest(blob[8 + size :])}":
        raise BlobError("its blob is damaged")


def _are_texts(value: object) -> bool:
    """Whether this is a mapping of texts that every store can keep."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        return False
    try:
        "".join([*value, *value.values()]).encode()
    except UnicodeEncodeError:  # halves of a surrogate pair, which JSON can name
        return False
    return True
