"""Commands to one server: many in one round trip, and what its errors mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import redis

from chunkcache.errors import StoreError
from chunkcache.stores.address import Address
from chunkcache.stores.base import KV_BYTES, METADATA, chunk_of, with_extras
from chunkcache.stores.stream import is_wrong_type

T = TypeVar("T")

# What an error means: a word for it, and the remedy. The first that fits; subclasses stand before
# their bases.
MEANINGS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, str], ...] = (
    (
        redis.AuthenticationError,
        "authentication",
        "; check the user and the password in the store's URL",
    ),
    (
        redis.ConnectionError,
        "connection",
        "; check that the server runs and that the store's URL is right",
    ),
    (
        redis.TimeoutError,
        "timeout",
        "; check the network, or raise connect_timeout or read_timeout",
    ),
    (
        redis.OutOfMemoryError,
        "full",
        "; raise the server's maxmemory, or let it evict (allkeys-lru)",
    ),
    (redis.ReadOnlyError, "read_only", "; use the URL of the primary, not of a replica"),
    (
        (redis.exceptions.MovedError, redis.exceptions.ClusterCrossSlotError),
        "wrong_url",
        "; the server is one of a cluster: use a redis+cluster:// URL",
    ),
    (Exception, "server", ""),
)
# What some say in words alone.
SAID = {
    "Too many connections": "; raise max_connections in the store's URL above the number of "
    "threads that use the store at once",
    "max number of clients reached": "; raise the server's maxclients, or lower max_connections "
    "in the store's URL",
    "no permissions": "; ACL SETUSER gives the user in the store's URL that permission",
    "EXEC without MULTI": " (this user has no permissions to run the 'multi' command); ACL SETUSER "
    "gives the user in the store's URL that permission",
}
USUAL_BULK = 512 << 20  # bytes: proto-max-bulk-len unless it was set


class Commands:
    """Commands to the server at `address`, through a pool of connections.

    Deployments of several servers change where connections come from, how keys are named, and
    which errors are misses.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._client = redis.Redis(connection_pool=self._pool(address))

    def _pool(self, address: Address) -> redis.ConnectionPool:
        return address.pool()

    def _names(self, key: str) -> tuple[bytes, bytes]:
        """Names of both halves on the server: metadata (of extra values, the chunk's), blob."""
        chunk = chunk_of(key)
        name = chunk.encode(errors="surrogatepass")
        return name + METADATA.encode(), name + (key.removeprefix(chunk) or KV_BYTES).encode()

    def _values(self, key: str) -> list[bytes]:
        """Names of all that goes with an entry."""
        blobs = [self._names(each)[1] for each in with_extras([key])]
        return blobs if key != chunk_of(key) else [self._names(key)[0], *blobs]

    def _key(self, name: bytes, half: str) -> str | None:
        """The key whose half has this name on the server; None if it is no such name."""
        key = name.removesuffix(half.encode())
        if key == name:
            return None
        try:
            return key.decode(errors="surrogatepass")
        except UnicodeDecodeError:
            return None

    def _is_miss(self, error: redis.ResponseError) -> bool:
        """Whether an error says no more than that there is nothing of ours under a key."""
        return is_wrong_type(error)

    def _pipelined(
        self, items: Sequence[T], commands: Callable[[Any, T], object]
    ) -> list[list[Any]]:
        """The replies to the commands for each item, in one round trip; errors among them.

        When the first command of every item fails, and not for what is under the key, the server
        is at fault: StoreError.
        """
        if not items:
            return []
        with self._store_errors(), self._client.pipeline(transaction=False) as pipe:
            for item in items:
                commands(pipe, item)
            replies: list[Any] = pipe.execute(raise_on_error=False)
            each = len(replies) // len(items)
            found = [replies[at : at + each] for at in range(0, len(replies), each)]
            errors = [first for first, *_ in found if isinstance(first, redis.ResponseError)]
            # All are looked at, though one that is no miss would tell.
            if [self._is_miss(error) for error in errors].count(False) == len(items):
                raise errors[0]
            return found

    def _ask(self, commands: Sequence[tuple[str | bytes, ...]]) -> list[Any]:
        """The replies to many commands in one round trip, as they come, errors among them.

        For thousands: it takes a third of the time of redis-py's pipeline.
        """
        if not commands:
            return []
        pool = self._client.connection_pool
        with self._store_errors():
            connection: Any = pool.get_connection()
            try:
                connection.send_packed_command(connection.pack_commands(commands))
                return [_reply(connection) for _ in commands]
            except BaseException:
                connection.disconnect()  # what still comes must not answer another command
                raise
            finally:
                pool.release(connection)

    def _check(self, reply: object) -> None:
        """Raise an error reply, unless it is a miss."""
        if isinstance(reply, redis.ResponseError) and not self._is_miss(reply):
            raise reply

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        """Turn any error into StoreError, without the password that a server may echo."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            text = str(error).rstrip(".")
            if not isinstance(error, (redis.RedisError, OSError, UnicodeError)):
                # redis-py believes that replies are of the type they should be. The rest of this
                # one must not become the reply to another command.
                self._client.connection_pool.disconnect(inuse_connections=False)
                text = f"the reply makes no sense ({type(error).__name__}: {text})"
            cause, remedy = next(rest for kind, *rest in MEANINGS if isinstance(error, kind))
            remedy = next((better for said, better in SAID.items() if said in text), remedy)
            if cause == "connection" and "connecting to" not in text and text not in SAID:
                remedy = why_closed(self._client.connection_pool) or remedy
            text = self._address.without_secrets(f"{text}{remedy}")
            raise StoreError(f"store {self._address.label}: {text}", cause) from None


def why_closed(pool: redis.ConnectionPool) -> str:
    """Why a server has closed a connection and what to do, if it answers on a new one, or `""`."""
    connection = pool.connection_class(**pool.connection_kwargs)
    limits: dict[str, str] = {}
    try:
        connection.connect()
        if not connection.can_read(timeout=0.02):  # what it says before it turns a client away
            connection.send_command("PING")
        connection.read_response()
        for name in ("proto-max-bulk-len", "client-output-buffer-limit"):
            connection.send_command("CONFIG", "GET", name)
            with suppress(redis.ResponseError):  # not every account may ask
                limits[name] = connection.read_response()[1].decode()
    except (redis.RedisError, OSError) as error:
        said = str(error).rstrip(".")
        return next((f": {said}{better}" for text, better in SAID.items() if text in said), "")
    except (TypeError, ValueError, LookupError, AttributeError):
        pass  # an answer that is none
    finally:
        connection.disconnect()
    bounds = []
    bulk = re.fullmatch("[0-9]+", limits.get("proto-max-bulk-len", ""))
    if bulk and int(bulk[0]) < USUAL_BULK:
        bounds.append(f"values above its proto-max-bulk-len of {bulk[0]} bytes")
    answer = re.search("normal ([1-9][0-9]*)", limits.get("client-output-buffer-limit", ""))
    if answer:
        bounds.append(f"answers above its client-output-buffer-limit of {answer[1]} bytes")
    if not bounds:
        return "; it answers on a new one: its log may say why it closed this one"
    return f"; it closes connections for {' and '.join(bounds)}: raise that with CONFIG SET"


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error
