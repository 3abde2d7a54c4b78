"""Fuzz targets: readers of what others wrote, and inputs that nobody would write.

A target makes an input by chance (`random.Random`, hypothesis' or atheris'), and feeds it to the
reader: what comes back must be the truth or one of our errors. `tests/test_fuzz.py` tries a hundred
inputs of each, `benchmarks/fuzz.py` as many as one likes.
"""

from __future__ import annotations

import os
import socket
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import numpy as np
import redis
import torch
from redis.connection import AbstractConnection

from chunkcache.anywhere.index import Passage, index_entries, search
from chunkcache.errors import BlobError, SettingError, StoreError
from chunkcache.keys import CODECS, ChunkKey
from chunkcache.kv.codec import Codec
from chunkcache.kv.layers import GrowingLayer, allocate_all, peek_all
from chunkcache.kv.layout import KVLayout, LayerKV, LayerShape
from chunkcache.kv.seal import Seal
from chunkcache.reuse.blobs import BlobReader
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.reuse.load import ChunkLoader
from chunkcache.settings import Settings
from chunkcache.stores import OPENERS, _bytes_parameter, _folder, open_store
from chunkcache.stores.base import Entry, Part
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.redis import RedisStore
from chunkcache.tokens.chunking import Grid, cut
from chunkcache.tokens.plan import plan_row

SEAL = Seal((bytes(range(32)),))
NOTHING = memoryview(b"")


@dataclass(frozen=True)
class Target:
    """A reader, and inputs for it.

    `feed` raises where the reader does what it must not. It may allocate `factor` bytes per byte of
    input and `constant` bytes more; a `factor` of 0 says that this cannot be told.
    """

    make: Callable[[Random], Any]
    feed: Callable[[Any], None]
    factor: int = 1
    constant: int = 1 << 18

    def check(self, given: Any) -> int:
        """Feed an input while tracemalloc is on. Returns the bytes allocated beyond its share."""
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        self.feed(given)
        taken = tracemalloc.get_traced_memory()[1] - before
        beyond = taken - self.factor * weight(given) if self.factor else 0
        assert beyond <= self.constant, f"{taken} bytes allocated for {weight(given)} of input"
        return beyond


def weight(value: Any) -> int:
    """Bytes or characters of an input."""
    if isinstance(value, Mapping):
        return sum(len(name) + weight(each) for name, each in value.items())
    return sum(map(weight, value)) if isinstance(value, tuple) else len(value)


# ------------------------------------------------------------------ chance


LENGTHS = [0, 1, 7, 8, 63, 64, 65, 300, 5000]
HEADER_LENGTHS = [0, 1, 2**31 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


def damaged(source: Random, good: bytes, others: Sequence[bytes]) -> bytes:
    """Bytes that were good once, or nearly so."""
    data = bytearray(good)
    for _ in range(source.randint(1, 3)):
        at = source.randrange(len(data) + 1)
        end = min(len(data), at + source.choice(LENGTHS))
        other = source.choice(others)
        match source.randrange(10):
            case 0 if at < len(data):
                data[at] ^= 1 << source.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data += source.randbytes(source.choice(LENGTHS))
            case 3:
                data[at:end] = source.randbytes(end - at)
            case 4:
                del data[at:end]
            case 5:
                data[at:at] = data[at:end]
            case 6:
                data[: min(at, len(other))] = other[:at]
            case 7:
                data[:8] = source.choice(HEADER_LENGTHS).to_bytes(8, "little")
            case 8:
                data = bytearray(other)
            case 9:
                deep = source.choice([b"[", b'{"a":', b'{"__metadata__":']) * (end - at)
                data[8 : 8 + len(deep)] = deep
    return bytes(data)


def spoken(source: Random, words: Sequence[str], most: int = 12) -> str:
    """Text of words that mean something, of single characters of them, and of any others."""
    parts = source.choices(words, k=source.randint(0, most))
    for at in range(len(parts)):
        match source.randrange(8):
            case 0:
                parts[at] = chr(source.choice([source.randrange(128), source.randrange(0x110000)]))
            case 1 if parts[at]:
                parts[at] = source.choice(parts[at])
            case 2:
                parts[at] *= source.choice([0, 2, 30])
    return "".join(parts)


# ------------------------------------------------------------------ blobs

LAYOUT = KVLayout(torch.float32, (LayerShape(2, 4, 2, 4), None, LayerShape(1, 6, 1, 2)))
TOKENS = [7, 100_000, 0, 3]


@dataclass(frozen=True)
class Named:
    """Names keys as a model's identity does."""

    def key(self, chunk_hash: str, format: str) -> str:
        return str(ChunkKey(format, "m", 1, 0, chunk_hash))


def keys_of(codec: Codec) -> KeySpace:
    named: Any = Named()
    return KeySpace(named, LAYOUT, b"salt", codec)


def numbers(seed: int) -> list[LayerKV | None]:
    source = torch.Generator().manual_seed(seed)
    return [
        shape
        and (
            torch.randn(shape.key_heads, len(TOKENS), shape.key_dim, generator=source),
            torch.randn(shape.value_heads, len(TOKENS), shape.value_dim, generator=source),
        )
        for shape in LAYOUT.layers
    ]


def equal(mine: Sequence[LayerKV | None], its: Sequence[LayerKV | None]) -> bool:
    pairs = zip(mine, its, strict=True)
    return all(a is None or b is None or all(map(torch.equal, a, b)) for a, b in pairs)


class Blobs:
    """One chunk in a store, its blob, and those of other chunks and codecs."""

    def __init__(self, codec: Codec) -> None:
        self.keys, self.store = keys_of(codec), MemoryStore()
        self.chunk = cut(TOKENS, Grid(len(TOKENS)), b"salt")[0]
        form = self.keys.form(TOKENS, 0, self.chunk.hash)
        self.key = form.key
        self.good = bytes(form.encode(numbers(0)))
        # Nobody can tell which of a chunk's two sound blobs is right; a mixture of them is neither.
        self.twin = bytes(form.encode(numbers(1)))
        self.truths = [form.decode(memoryview(blob)) for blob in (self.good, self.twin)]
        other = self.keys.form(TOKENS, 4, "ab" * 32)
        self.others = [self.good, self.twin, bytes(other.encode(numbers(0)))]

    def feed(self, blob: bytes) -> None:
        """Read a blob into layers, as a prompt does."""
        self.store.write([Entry(self.key, {}, memoryview(blob))])
        layers: list[Any] = [GrowingLayer() if shape else object() for shape in LAYOUT.layers]
        allocate_all(layers, LAYOUT, 1, len(TOKENS), torch.device("cpu"))
        name, troubles = self.chunk.hash, list[Exception]()
        (size,) = self.store.sizes([self.key])
        known = {name: size} if size else {}
        plans = [plan_row([self.chunk], len(TOKENS), 0, known, "not there")]
        forms = {name: self.keys.form(TOKENS, 0, name)}
        if not forms[name].may_have(size):
            return  # as a prompt's plan finds out
        loader = ChunkLoader(BlobReader(self.store, troubles.append), layers, [0], True)
        loader.load(plans, [plans[0].reach], known, forms)
        if plans[0].reach == 0:
            assert all(isinstance(error, BlobError) for error in troubles), troubles
            return
        assert not troubles
        found = peek_all(layers, 0, 0, len(TOKENS))
        assert any(equal(found, truth) for truth in self.truths), "other K/V"


CODINGS = {
    codec.format: Blobs(codec) for name in CODECS for codec in (Codec(name), Codec(name, SEAL))
}
FRAMES = [
    b"\x28\xb5\x2f\xfd\xa0" + (2**32 - 1).to_bytes(4, "little") + bytes(8),  # claims 4 GiB
    b"\x28\xb5\x2f\xfd\x00\xf8" + b"\x02\x00\x00\x01\x00\x00\x00",  # a window of 2 TiB, no size
    b"\x50\x2a\x4d\x18" + (2**32 - 1).to_bytes(4, "little"),  # to be skipped
]
FOREIGN = [blobs.good for blobs in CODINGS.values()] + FRAMES


def make_blob(source: Random) -> tuple[str, bytes]:
    name = source.choice(list(CODINGS))
    blobs = CODINGS[name]
    others = blobs.others if source.random() < 0.7 else FOREIGN
    return name, damaged(source, source.choice(blobs.others), others)


def feed_blob(given: tuple[str, bytes]) -> None:
    CODINGS[given[0]].feed(given[1])


# ------------------------------------------------------------------ metadata and index entries

ROW = np.random.default_rng(0).integers(0, 50_000, 96)
HASHES = [chunk.hash for chunk in cut(ROW, Grid(48), b"salt")]
JSON_WORDS = [
    "[", "]", "{", "}", ",", ":", '"', "-", "0", "1", "17", "4999", "1e9", "1e999", "NaN", "null",
    "true", "Infinity", '"12"', "\\ud800", "9" * 40, "9" * 5000, "[" * 2000, '{"a":' * 2000, " ",
]  # fmt: skip
OFFSET_WORDS = ["-", "+", "0", "7", "16", "99999999", " ", "1", "2031-01-01", "²", "٣", "\x00"]


class Answers:
    """A store that knows metadata only."""

    def __init__(self, fields: Mapping[str, dict[str, str]]) -> None:
        self.fields = fields

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        return [self.fields.get(key) for key in keys]


def kept(codec: Codec) -> dict[str, dict[str, str]]:
    """What a prompt leaves in the store: metadata of its chunks, and index entries."""
    keys, fields = keys_of(codec), dict[str, dict[str, str]]()
    for chunk in cut(ROW, Grid(48), b"salt"):
        key = keys.key(chunk.hash)
        text = codec.hide(str(ROW[chunk.start : chunk.stop].tolist()), key)
        positions = f"{chunk.start}-{chunk.stop}"
        fields[key] = {"token_ids": text, "positions": positions, "context": "exact"}
        for entry in index_entries(keys, chunk, ROW, "1"):
            fields.setdefault(entry.key, {}).update(entry.metadata)
    return fields


INDEXED = {codec.format: (codec, kept(codec)) for codec in (Codec(), Codec(seal=SEAL))}


def make_metadata(source: Random) -> tuple[str, dict[str, dict[str, str]]]:
    name = source.choice(list(INDEXED))
    fields = {key: dict(each) for key, each in INDEXED[name][1].items()}
    for _ in range(source.randint(1, 4)):
        mine = fields[source.choice(list(fields))]
        words = JSON_WORDS if "token_ids" in mine else OFFSET_WORDS
        field = source.choice([*mine, "token_ids", "positions", source.choice(HASHES), "ab" * 32])
        old = mine.get(field, "")
        at = source.randrange(len(old) + 1)
        match source.randrange(4):
            case 0:
                mine[field] = spoken(source, words)
            case 1:
                mine[field] = old[:at] + spoken(source, words, 2) + old[at + source.randrange(3) :]
            case 2:
                mine[field] = source.choice(list(source.choice(list(fields.values())).values()))
            case 3:
                mine.pop(field, None)
                mine.setdefault("parent", spoken(source, words))
    return name, fields


def feed_metadata(given: tuple[str, dict[str, dict[str, str]]]) -> None:
    codec, good = INDEXED[given[0]]
    found = search(Answers(given[1]), keys_of(codec), [Passage(ROW, 0, len(ROW))])
    for piece in found.matches[0]:
        its = piece.chunk.tokens[piece.offset : piece.offset + piece.stop - piece.start]
        assert np.array_equal(ROW[piece.start : piece.stop], its), "another text"
    for key, entry in found.stale.items():
        assert key in good
        assert entry.metadata.items() <= given[1][key].items(), "an index entry nobody wrote"


# ------------------------------------------------------------------ keys, URLs, settings

KEY_WORDS = [
    "safetensors", "safetensors-int8+zstd", "@", "@", "1", "0", "007", "²", "ab" * 32, "AB" * 32,
    "{" + "ab" * 32 + "}", "@metadata", "@kv_bytes", "%40", "%4", "%ff", "%ed%a0%80", "%E4", "meta",
    "/", "\n", "\x00", "ä", "\ud800", "",
]  # fmt: skip


def make_key(source: Random) -> tuple[str, str]:
    model = spoken(source, KEY_WORDS, 4)
    form, world, worker = source.choice(CODECS), source.randrange(3), source.randrange(3)
    key = str(ChunkKey(form, model, world, worker, "ab" * 32)) + source.choice(KEY_WORDS)
    at = source.randrange(len(key))
    spoilt = key[:at] + spoken(source, KEY_WORDS, 2) + key[at + source.randrange(3) :]
    return model, source.choice([spoilt, spoken(source, KEY_WORDS)])


def feed_key(given: tuple[str, str]) -> None:
    model, text = given
    key = ChunkKey("safetensors", model, 1, 0, "ab" * 32)
    assert str(key).count("@") == 4
    assert ChunkKey.parse(f"{key}@metadata") == key
    with suppress(SettingError):
        written = text.removesuffix("@metadata").removesuffix("@kv_bytes")
        assert str(ChunkKey.parse(text)) in (written, written.replace("{", "").replace("}", ""))


URL_WORDS = [
    *(f"{scheme}://" for scheme in OPENERS), "://", ":", "//", "/", "/", "@", ",", "?", "&", "=",
    "#", "[", "]", "[::1]", "%", "%00", "%2F", "%ff", "host", "127.0.0.1", "user", "6379", "65536",
    "-1", "0", "1e9", "mymaster", "?bytes=", "2GB", "0MB", "9" * 5000, "/0?db=", "none", "nan",
    "/0?socket_timeout=", "&max_connections=", "&ssl_cert_reqs=", "&ssl_min_version=", "inf", "yes",
    "/0?socket_keepalive=", "&client_name=", "&health_check_interval=", "tmp", "..", " ", "\n",
    "\x00", "ä", "²", "\ud800",
]  # fmt: skip


def make_url(source: Random) -> str:
    scheme = source.choice([*(f"{scheme}://" for scheme in OPENERS), ""])
    return scheme + spoken(source, URL_WORDS, 16)


def feed_url(url: str) -> None:
    """Open a store, but make no folder and start no server for it."""
    with suppress(SettingError):
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme in ("file", "embedded"):
            _folder(parts)
            _bytes_parameter(parts)
        else:
            open_store(url or "redis:").close()


SETTING_WORDS = [
    "true", "false", "yes", "0", "1", "-1", "1.5", "nan", "inf", "1e999", "9" * 5000, "prefix",
    "anywhere", "head:4", "head", ":", "+", "full", "r", "safetensors", "+zstd", "-int8", "=", ",",
    "\n", '"', "'", "[", "]", "{", "}", "[" * 2000, "#", "ttl", "pin", "metadata", "temperature",
    "chunk_size", "ab" * 32, "ä", "\udce4", " ", "1979-05-27",
]  # fmt: skip
SETTINGS = list(Settings.__dataclass_fields__)
FOLDER = tempfile.TemporaryDirectory(prefix="chunkcache-fuzz-")


def make_settings(source: Random) -> tuple[str, str]:
    """A line of a TOML file for the name CONFIG, else a variable's value."""
    name = source.choice([*SETTINGS, "config"])
    text = spoken(source, SETTING_WORDS).replace("\x00", "")
    return name, f"{source.choice(SETTINGS)} = {text}" if name == "config" else text


def feed_settings(given: tuple[str, str]) -> None:
    name, text = given
    data = text.encode(errors="surrogateescape" if text.isascii() else "surrogatepass")
    if name == "config":
        path = Path(FOLDER.name) / "settings.toml"
        path.write_bytes(data)
        text = str(path)
    else:
        text = os.fsdecode(data)
    with patch.dict(os.environ, {f"CHUNKCACHE_{name.upper()}": text}), suppress(SettingError):
        Settings.load()


# ------------------------------------------------------------------ replies of a server

REPLIES = [
    b"$5\r\nhello\r\n", b"$-1\r\n", b"$0\r\n\r\n", b"*0\r\n", b"*-1\r\n", b":1\r\n", b":-5\r\n",
    b"+OK\r\n", b"+QUEUED\r\n", b"-\r\n", b"-ERR no\r\n", b"-WRONGTYPE x\r\n", b"-OOM x\r\n",
    b"-MOVED 1 a:1\r\n", b"-MOVED\r\n", b"-ASK 1 b\r\n", b"-NOAUTH\r\n", b"-EXECABORT x\r\n",
    b"*2\r\n", b"*4\r\n", b"*1\r\n" * 20, b"*3\r\n:1\r\n$-1\r\n:0\r\n", b"*2\r\n$1\r\n0\r\n*0\r\n",
    b"*2\r\n$1\r\n0\r\n*1\r\n$10\r\na@kv_bytes\r\n", b"*2\r\n$1\r\nk\r\n$1\r\nv\r\n", b"$3\r\nab",
    b"$2\r\nabc\r\n", b"$1048576\r\n", b"$1048577\r\n", b"$99999999999\r\n", b"$12x\r\n",
    b"$" + b"1" * 5000, b"\r\n", b"\r", b"\n", b"_\r\n", b"#t\r\n", b",1.5\r\n", b"(123\r\n",
    b"%1\r\n+a\r\n:1\r\n", b">1\r\n+x\r\n", b"!3\r\nERR\r\n", b"\xff\xfe\x00",
]  # fmt: skip
MOST_BYTES = 1 << 20


class Canned(AbstractConnection):
    """A connection to nobody: the first command gets all replies there are, and then the end."""

    def __init__(self, replies: list[bytes], **options: Any) -> None:
        super().__init__(**options)
        self.replies = replies
        self.far: socket.socket | None = None

    def repr_pieces(self) -> list[tuple[str, str]]:
        return []

    def _connect(self) -> socket.socket:
        near, self.far = socket.socketpair()
        near.settimeout(5)
        return near

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        super().send_packed_command(command, check_health)
        if self.replies and self.far:
            self.far.sendall(self.replies.pop())
        if self.far:
            self.far.shutdown(socket.SHUT_WR)

    def disconnect(self, *args: Any, **options: Any) -> None:
        super().disconnect(*args, **options)
        if self.far:
            self.far.close()

    def _host_error(self) -> str:
        return "nobody"


class CannedStore(RedisStore):
    """A store on a server that says what it was told to say."""

    def __init__(self, replies: bytes, ttl: float) -> None:
        self.replies = [replies]
        super().__init__("redis://nobody", ttl=ttl, max_blob_bytes=MOST_BYTES)

    def _pool(self, address: Any) -> redis.ConnectionPool:
        options = {**address.options, "connection_class": Canned, "replies": self.replies}
        return redis.ConnectionPool(**options)


def fetch(store: RedisStore) -> bool:
    place = [memoryview(bytearray(size)) for size in (2, 3)]
    parts = [Part("a", 0, place), Part("b", 0, place), Part("b", 7, place)]
    return all(isinstance(arrived, bool) for arrived in store.fetch(parts))


def write(store: RedisStore) -> bool:
    blob, note = Entry("a", {"b": "c"}, memoryview(b"xyz")), Entry("a", {"b": "c"}, NOTHING, True)
    return store.write([blob, note, replace(blob, pinned=True)]) <= 6


def strings(fields: dict[str, str] | None) -> bool:
    return fields is None or all(isinstance(each, str) for each in (*fields, *fields.values()))


# Each says whether the answer is of the kind that it must be.
READING: dict[str, Callable[[RedisStore], bool]] = {
    "fetch": fetch,
}
OTHERS: dict[str, Callable[[RedisStore], bool]] = {
    "sizes": lambda store: all(isinstance(n, int) and n >= 0 for n in store.sizes(["a", "b"])),
    "read_metadata": lambda store: all(map(strings, store.read_metadata(["a", "b"]))),
    "write": write,
    "delete": lambda store: 0 <= store.delete(["a", "b"]) <= 2,
    "scan": lambda store: all(strings(e.metadata) for page in store.scan() for e in page),
    "connect": lambda store: store.connect() is None,
}


def replies_to(verbs: Mapping[str, Callable[[RedisStore], bool]]) -> Callable[[Random], Any]:
    def make(source: Random) -> tuple[str, bytes]:
        which = source.choices(REPLIES, k=source.randint(0, 12)) + [source.choice(REPLIES)] * 12
        said = b"".join(which[source.choice([0, 0, len(which) - 12]) :])
        if source.random() < 0.3:
            said = damaged(source, said, REPLIES)
        return source.choice(list(verbs)), said

    return make


@contextmanager
def store_that_hears(replies: bytes, ttl: float) -> Iterator[CannedStore]:
    store = CannedStore(replies, ttl)
    with store, suppress(StoreError):
        yield store


def feed_replies(given: tuple[str, bytes]) -> None:
    verb, replies = given
    with store_that_hears(replies, 5.0 * (len(replies) % 2)) as store:
        assert (READING | OTHERS)[verb](store), "an answer of another kind"


TARGETS = {
    "blob": Target(make_blob, feed_blob),
    # A list of numbers in JSON takes many times its text, for a moment; a number in TOML, too.
    "metadata": Target(make_metadata, feed_metadata, factor=64, constant=1 << 20),
    "key": Target(make_key, feed_key, factor=32),
    "url": Target(make_url, feed_url, factor=32, constant=1 << 20),
    "settings": Target(make_settings, feed_settings, factor=256, constant=1 << 20),
    "blobs of a server": Target(replies_to(READING), feed_replies, constant=3 * MOST_BYTES),
    # hiredis makes room for as many replies as are announced, though pages only as they come.
    "replies of a server": Target(replies_to(OTHERS), feed_replies, factor=0),
}
