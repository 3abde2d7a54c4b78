"""Chunks in Redis, Valkey or whatever else speaks their protocol: TCP, TLS or a Unix socket."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from chunkcache.errors import SettingError, StoreError
from chunkcache.stores.base import KV_BYTES, METADATA, ChunkStore, Entry
from chunkcache.stores.wire import BulkReader, CommandPacker, is_wrong_type

CONNECT_TIMEOUT = 0.25
READ_TIMEOUT = 2.0
MAX_BLOB_BYTES = 1 << 30

SCHEMES = ("redis", "rediss", "unix")
# What a URL may set. The rest of redis-py's options would change how replies are read.
PARAMETERS = frozenset(
    {
        "client_name",
        "db",
        "health_check_interval",
        "max_connections",
        "password",
        "socket_connect_timeout",
        "socket_keepalive",
        "socket_read_size",
        "socket_timeout",
        "username",
    }
)
TLS_PARAMETERS = frozenset(
    {
        "ssl_ca_certs",
        "ssl_ca_path",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_keyfile",
        "ssl_min_version",
        "ssl_password",
    }
)

# The first that fits; subclasses stand before their bases.
MENDS: tuple[tuple[type[Exception], str], ...] = (
    (redis.AuthenticationError, "check the user and the password in the store's URL"),
    (redis.ConnectionError, "check that the server runs and that the store's URL is right"),
    (redis.TimeoutError, "check the network, or raise connect_timeout or read_timeout"),
    (redis.OutOfMemoryError, "raise the server's maxmemory, or let it evict (allkeys-lru)"),
    (redis.ReadOnlyError, "use the URL of the primary, not of a replica"),
)


class RedisStore(ChunkStore):
    """A store on one Redis-compatible server.

    `url` is `redis://`, `rediss://` (TLS) or `unix://`. `connect_timeout` and `read_timeout` are
    in seconds; the latter is how long the server may be silent. Both give way to
    `socket_connect_timeout` and `socket_timeout` in the URL. A value above `max_blob_bytes` on
    the server is an error.

    Nothing connects before the first use. Raises SettingError for a URL or number that cannot
    work.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout: float = CONNECT_TIMEOUT,
        read_timeout: float = READ_TIMEOUT,
        max_blob_bytes: int = MAX_BLOB_BYTES,
    ) -> None:
        self._label = _check_url(url)
        try:
            pool = redis.ConnectionPool.from_url(
                url,
                protocol=2,  # no push messages, which could stand before a reply
                socket_connect_timeout=connect_timeout,
                socket_timeout=read_timeout,
                # Once and at once, for a pooled connection that died while idle. Time-outs are
                # not repeated: a silent server costs one.
                retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
                command_packer=CommandPacker(),
            )
            pool.connection_class(**pool.connection_kwargs)  # checks the options, connects nowhere
        except (ValueError, TypeError, redis.RedisError) as error:
            raise SettingError(f"store URL {self._label}: {error}") from None
        options: dict[str, Any] = pool.connection_kwargs
        for name in ("socket_connect_timeout", "socket_timeout"):
            if not options[name] > 0:
                raise SettingError(
                    f"store URL {self._label}: {name} (connect_timeout, read_timeout) must be "
                    f"more than 0 s, not {options[name]}"
                )
        self._secrets = [options[name] for name in ("password", "ssl_password") if name in options]
        self._client = redis.Redis(connection_pool=pool)
        self._reader = BulkReader(self._client, options["socket_timeout"], max_blob_bytes)

    def __repr__(self) -> str:
        return f"RedisStore({self._label!r})"

    def connect(self) -> None:
        """Connect now, and stay connected, instead of at the first use. Raises StoreError."""
        with self._store_errors():
            self._client.ping()

    def sizes(self, keys: Sequence[str]) -> list[int]:
        replies = self._pipelined(keys, lambda pipe, key: pipe.strlen(key + KV_BYTES))
        return [0 if isinstance(reply, redis.ResponseError) else reply for reply in replies]

    def read(self, keys: Sequence[str]) -> Iterator[memoryview | None]:
        names = [(key + KV_BYTES).encode(errors="surrogatepass") for key in keys]
        with self._store_errors():
            yield from self._reader.read(names)

    def read_into(
        self, keys: Sequence[str], places: Sequence[Sequence[memoryview]]
    ) -> Generator[bool]:
        names = [(key + KV_BYTES).encode(errors="surrogatepass") for key in keys]
        with self._store_errors():
            yield from self._reader.read_into(names, places)

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        replies = self._pipelined(keys, lambda pipe, key: pipe.hgetall(key + METADATA))
        return [_decoded(reply) if isinstance(reply, dict) and reply else None for reply in replies]

    def write(self, entries: Sequence[Entry]) -> int:
        written = 0
        for entry in entries:  # a pipeline of many would hold all of their blobs at the server
            with self._store_errors(), self._client.pipeline(transaction=True) as pipe:
                if not entry.merge:
                    pipe.delete(entry.key + METADATA, entry.key + KV_BYTES)
                if entry.metadata:
                    fields: dict[Any, Any] = dict(entry.metadata)
                    pipe.hset(entry.key + METADATA, mapping=fields)
                if entry.nbytes:
                    pipe.set(entry.key + KV_BYTES, entry.blob)
                pipe.execute()
            written += entry.nbytes
        return written

    def delete(self, keys: Sequence[str]) -> int:
        replies = self._pipelined(
            keys, lambda pipe, key: pipe.unlink(key + METADATA, key + KV_BYTES)
        )
        for reply in replies:
            if isinstance(reply, redis.ResponseError):
                with self._store_errors():
                    raise reply
        return sum(1 for reply in replies if reply)

    def close(self) -> None:
        self._client.close()
        self._client.connection_pool.disconnect()

    def _pipelined(self, keys: Sequence[str], command: Callable[[Any, str], Any]) -> list[Any]:
        """The reply to `command` for each key, in one round trip; errors stand in their place.

        When every key gives an error, and not for its type, the server is at fault: StoreError.
        """
        if not keys:
            return []
        with self._store_errors(), self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                command(pipe, key)
            replies: list[Any] = pipe.execute(raise_on_error=False)
            if all(isinstance(r, redis.ResponseError) and not is_wrong_type(r) for r in replies):
                raise replies[0]
            return replies

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        """Turn redis-py's errors into StoreError, without the password that a server may echo."""
        try:
            yield
        except (redis.RedisError, OSError, UnicodeError) as error:
            text = str(error).rstrip(".")
            for secret in filter(None, self._secrets):
                text = text.replace(secret, "***")
            mends = [mend for kind, mend in MENDS if isinstance(error, kind)]
            advice = f"; {mends[0]}" if mends else ""
            raise StoreError(f"store {self._label}: {text}{advice}") from None


def _decoded(fields: dict[bytes, bytes]) -> dict[str, str]:
    return {
        name.decode(errors="replace"): value.decode(errors="replace")
        for name, value in fields.items()
    }


def _check_url(url: str) -> str:
    """The URL without user, password and query, for messages. Raises SettingError.

    Messages about a malformed URL quote nothing of it: a password may stand anywhere in it.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        query = parse_qs(parts.query, keep_blank_values=True)
    except ValueError:
        host, port, query = None, None, {}
        parts = urlsplit("")
    if parts.scheme not in SCHEMES or parts.fragment:
        raise SettingError(
            "the store's URL cannot be understood: write redis://user:password@host:6379/0, "
            "rediss://... or unix:///path/of/socket, with %-escapes for special characters "
            "in the password (# is %23, / is %2F, @ is %40)"
        )
    known = PARAMETERS | TLS_PARAMETERS if parts.scheme == "rediss" else PARAMETERS
    if unknown := sorted(query.keys() - known):
        # what is no name may be the rest of a password with a ? in it
        name = repr(unknown[0]) if unknown[0].isidentifier() else "after the ?"
        raise SettingError(
            f"{parts.scheme}:// store URL: unknown parameter {name}; "
            f"known are {', '.join(sorted(known))}"
        )
    if parts.scheme == "unix":
        if host or not parts.path:
            raise SettingError("unix:// store URL: write three slashes, unix:///path/of/socket")
        return f"unix://{unquote(parts.path)}"
    database = unquote(parts.path).strip("/")
    if database and not database.isdecimal():
        raise SettingError(
            f"{parts.scheme}:// store URL: the path must be the number of a database, such as /0"
        )
    name = f"[{host}]" if host and ":" in host else host or "localhost"
    return f"{parts.scheme}://{name}:{port or 6379}/{query.get('db', [database or '0'])[0]}"
