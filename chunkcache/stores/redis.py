"""Chunks in Redis, Valkey or whatever else speaks their protocol: TCP, TLS or a Unix socket."""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any, ClassVar

import redis

from chunkcache.errors import SettingError
from chunkcache.stores.address import SERVER, Address, read_url
from chunkcache.stores.base import (
    EXTRAS,
    KV_BYTES,
    METADATA,
    ChunkStore,
    Entry,
    Listed,
    Part,
    StaysHere,
)
from chunkcache.stores.room import Room
from chunkcache.stores.wire import BulkReader

CONNECT_TIMEOUT = 0.25
READ_TIMEOUT = 0.5
MAX_BLOB_BYTES = 1 << 30
MAX_TTL = 1e10  # seconds; the server counts milliseconds in 64 bits
SCAN_COUNT = 1000
GLOB = re.compile(rb"[\\*?\[\]]")  # what means something in a pattern
PIPELINED = 512  # entries without a blob that are written in one round trip


class RedisStore(StaysHere, Room, ChunkStore):
    """A store on one Redis-compatible server.

    `url` is `redis://`, `rediss://` (TLS) or `unix://`. `connect_timeout` and `read_timeout` are
    in seconds; the latter is how long the server may be silent. Both give way to
    `socket_connect_timeout` and `socket_timeout` in the URL. A value above `max_blob_bytes` on
    the server is an error.

    With a `ttl` (seconds, 0 for never), entries that are not pinned expire that long after they
    were written or, with `refresh_ttl`, last looked up. Renewing needs Redis 7 or Valkey.

    Nothing connects before the first use. Raises SettingError for a URL or number that cannot
    work.
    """

    schemes: ClassVar[tuple[str, ...]] = SERVER

    def __init__(
        self,
        url: str | Address,
        *,
        connect_timeout: float = CONNECT_TIMEOUT,
        read_timeout: float = READ_TIMEOUT,
        max_blob_bytes: int = MAX_BLOB_BYTES,
        ttl: float = 0.0,
        refresh_ttl: bool = True,
    ) -> None:
        if isinstance(url, str):
            url = read_url(url, self.schemes, connect_timeout, read_timeout)
        if not 0 <= ttl < MAX_TTL:
            raise SettingError(f"ttl must be 0 (never expire) or a number of seconds, not {ttl!r}")
        super().__init__(url)
        self._expire_ms = max(round(ttl * 1000), 1) if ttl else None
        self._renew_ms = self._expire_ms if refresh_ttl else None
        self._server_copies: bool | None = None
        self._reader = BulkReader(
            self._client, url.read_timeout, max_blob_bytes, self._copies_replies
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._address.label!r})"

    def connect(self) -> None:
        """Connect now, and stay connected, instead of at the first use. Raises StoreError."""
        with self._store_errors():
            self._client.ping()

    def server_info(self) -> list[dict[str, Any]]:
        with self._store_errors():
            info: dict[str, Any] = dict(self._client.info())
            with suppress(redis.ResponseError):  # not every account may ask
                config: Any = self._client.config_get("save")
                info |= config
        return [info]

    def sizes(self, keys: Sequence[str]) -> list[int]:
        def look(pipe: Any, key: str) -> None:
            metadata, blob = self._names(key)
            pipe.strlen(blob)
            pipe.touch(metadata)  # as recently used as the blob, so that none is evicted alone
            self._renew(pipe, metadata, blob)

        sizes = [size for size, *_ in self._pipelined(keys, look)]
        with self._store_errors():
            return [0 if isinstance(size, redis.ResponseError) else _count(size) for size in sizes]

    def fetch(self, parts: Sequence[Part]) -> Generator[bool]:
        with self._store_errors():
            yield from self._reader.fetch(
                [(self._names(part.key)[1], part.start, part.place) for part in parts]
            )

    @property
    def reads_parts(self) -> bool:
        return True

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        def look(pipe: Any, key: str) -> None:
            names = self._names(key)
            pipe.hgetall(names[0])
            self._renew(pipe, *names)

        found = [reply for reply, *_ in self._pipelined(keys, look)]
        with self._store_errors():
            return [
                _decoded(reply) if isinstance(reply, dict) and reply else None for reply in found
            ]

    def write(self, entries: Sequence[Entry]) -> int:
        """Keep the entries. Returns the bytes of blobs that are there now.

        A blob that is there already is not sent again: its key says what it is.
        """
        blobs = [entry for entry in entries if entry.nbytes]
        there = self._there([entry for entry in blobs if not entry.merge])
        self._use({key for entry in blobs for key in entry.before})
        refused = self._without_room([entry for entry in blobs if entry.key not in there])
        self._reader.window = self._window
        taken: list[Entry] = []
        for has_blob, group in groupby(entries, lambda entry: entry.nbytes > 0):
            if not has_blob:
                self._write_small(list(group))
                continue
            for entry in group:  # a pipeline of many would hold all of their blobs at the server
                if entry.key in refused:
                    continue
                if entry.key in there or self._write_blob(entry):
                    taken.append(entry)
        return self._took(taken)

    def delete(self, keys: Sequence[str]) -> int:
        replies = self._pipelined(keys, lambda pipe, key: pipe.unlink(*self._values(key)))
        with self._store_errors():
            for (reply,) in replies:
                self._check(reply)
        return sum(1 for (reply,) in replies if reply and not isinstance(reply, Exception))

    def scan(self, prefix: str = "") -> Iterator[list[Listed]]:
        """As in `ChunkStore`. Servers older than Redis 7.2 or Valkey count it as a use."""
        pattern = GLOB.sub(rb"\\\g<0>", prefix.encode(errors="surrogatepass")) + b"*@*"
        names: list[bytes] = []
        cursor = -1
        while cursor:
            with self._store_errors():
                page: Any = self._client.scan(max(cursor, 0), match=pattern, count=SCAN_COUNT)
                cursor, more = page
                names += more
                listed: list[Listed] = []
                if len(names) >= SCAN_COUNT or not cursor:
                    listed, names = self._list(names), []
            if listed:
                yield listed

    def close(self) -> None:
        self._client.close()
        self._client.connection_pool.disconnect()

    # ------------------------------------------------------------------ parts of the verbs

    def _copies_replies(self) -> bool:
        """Whether the server copies each reply before it sends it: all do but Valkey 9."""
        if self._server_copies is None:
            try:
                info: Any = self._client.info("server")
            except redis.ResponseError:  # some may not ask
                info = {}
            version = str(info.get("valkey_version", "")).partition(".")[0]
            self._server_copies = not version.isdigit() or int(version) < 9
        return self._server_copies

    def _renew(self, pipe: Any, *names: bytes) -> None:
        if self._renew_ms:
            for name in names:
                pipe.pexpire(name, self._renew_ms, xx=True)  # not those that are pinned

    def _use(self, keys: Collection[str]) -> None:
        """Note that these are used now."""
        if keys:
            self._ask([("TOUCH", *(name for key in keys for name in self._names(key)))])

    def _there(self, entries: Sequence[Entry]) -> set[str]:
        """Keys of the blobs that need not be written. Those to be pinned are, with their extras."""

        def look(pipe: Any, entry: Entry) -> None:
            metadata, blob = self._names(entry.key)
            pipe.strlen(blob)
            pipe.touch(metadata)

        there = [
            entry
            for entry, (size, described) in zip(
                entries, self._pipelined(entries, look), strict=True
            )
            if size == entry.nbytes and (described == 1 or not entry.metadata)
        ]
        pinned = [entry.key for entry in there if entry.pinned]
        self._pipelined(pinned, lambda pipe, key: [pipe.persist(n) for n in self._values(key)])
        return {entry.key for entry in there}

    def _list(self, names: Sequence[bytes]) -> list[Listed]:
        """The entries to which these halves belong. Those with metadata come with that half."""
        keys = [key for name in names if (key := self._key(name, METADATA))]
        halves = ((name, half) for name in names for half in (KV_BYTES, *EXTRAS))
        blobs = list(dict.fromkeys(key for half in halves if (key := self._key(*half))))
        described = self._ask([("EXISTS", self._names(key)[0]) for key in blobs])
        keys += [key for key, there in zip(blobs, described, strict=True) if there == 0]
        looks: list[tuple[str | bytes, ...]] = []
        for key in keys:
            metadata, *values = self._values(key)
            looks += [("HGETALL", metadata), *(("STRLEN", name) for name in values)]
        switch = ("CLIENT", "NO-TOUCH")  # older servers refuse it, and serve the rest
        replies = self._ask([(*switch, "ON"), *looks, (*switch, "OFF")])[1:-1]
        with self._store_errors():
            for reply in replies:
                self._check(reply)
        each = 2 + len(EXTRAS)
        found = zip(keys, *(replies[at::each] for at in range(each)), strict=True)
        listed = [
            Listed(key, _paired(fields), *(n if isinstance(n, int) else 0 for n in sizes))
            for key, fields, *sizes in found
        ]
        return [entry for entry in listed if entry.metadata or entry.total_bytes]

    def _write_small(self, entries: Sequence[Entry]) -> None:
        """Write entries without a blob, in two round trips for many."""
        for start in range(0, len(entries), PIPELINED):
            batch = entries[start : start + PIPELINED]
            lasting = self._lasting([entry for entry in batch if entry.merge])
            left = self._times_left([entry for entry in batch if not entry.merge])
            with self._store_errors(), self._client.pipeline(transaction=False) as pipe:
                for entry in batch:
                    metadata, blob = self._names(entry.key)
                    if not entry.merge:
                        pipe.unlink(metadata, blob)
                    if entry.metadata:
                        fields: dict[Any, Any] = dict(entry.metadata)
                        pipe.hset(metadata, mapping=fields)
                    if entry.pinned:
                        pipe.persist(metadata)
                    elif self._expire_ms and entry.key not in lasting:
                        pipe.pexpire(metadata, self._expire_ms)
                    elif entry.metadata and entry.key in left:
                        pipe.pexpire(metadata, left[entry.key])
                for reply in pipe.execute(raise_on_error=False):
                    self._check(reply)

    def _lasting(self, entries: Sequence[Entry]) -> set[str]:
        """Keys of entries that are there and do not expire: adding fields must not change that."""
        if not self._expire_ms:
            return set()
        keys = [entry.key for entry in entries]
        replies = self._pipelined(keys, lambda pipe, key: pipe.pttl(self._names(key)[0]))
        return {key for key, (left,) in zip(keys, replies, strict=True) if left == -1}

    def _times_left(self, entries: Sequence[Entry]) -> dict[str, int]:
        """Milliseconds to live of those that expire: what we replace stays as mortal as it was.

        Without a `ttl` of our own we would make eternal what others have written.
        """
        if self._expire_ms:
            return {}

        keys = [entry.key for entry in entries]
        replies = self._pipelined(keys, lambda pipe, key: pipe.pttl(self._names(key)[0]))
        return {
            key: left
            for key, (left,) in zip(keys, replies, strict=True)
            if isinstance(left, int) and left > 0
        }

    def _write_blob(self, entry: Entry) -> bool:
        """Replace what is there by this entry, both halves at once. False if it lies elsewhere."""
        metadata, blob = self._names(entry.key)
        expire_ms = None if entry.pinned else self._expire_ms
        lasts = entry.merge and bool(self._lasting([entry]))
        with self._store_errors(), self._client.pipeline(transaction=True) as pipe:
            if not entry.merge:
                pipe.delete(metadata, blob)
            if entry.metadata:
                fields: dict[Any, Any] = dict(entry.metadata)
                pipe.hset(metadata, mapping=fields)
                if expire_ms and not lasts:
                    pipe.pexpire(metadata, expire_ms)
            pipe.set(blob, entry.blob, px=expire_ms)
            try:
                pipe.execute()
            except redis.ResponseError as error:
                self._check(error)
                return False
        return True


def _count(reply: object) -> int:
    """A number that counts something. Raises redis.InvalidResponse for anything else."""
    if isinstance(reply, int) and reply >= 0:
        return reply
    raise redis.InvalidResponse(f"the server's reply is {reply!r:.80} instead of a number")


def _decoded(fields: dict[bytes, bytes]) -> dict[str, str]:
    """Metadata as they are read, whatever their bytes."""
    return {
        name.decode(errors="replace"): value.decode(errors="replace")
        for name, value in fields.items()
    }


def _paired(fields: object) -> dict[str, str] | None:
    """The same of a reply as it comes, names and values in turn."""
    if not isinstance(fields, list) or not fields:
        return None
    return _decoded(dict(zip(fields[::2], fields[1::2], strict=False)))
