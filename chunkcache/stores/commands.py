"""Commands to one server: many in one round trip, and what its errors mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import redis

from chunkcache.errors import StoreError
from chunkcache.stores.address import Address
from chunkcache.stores.base import KV_BYTES, METADATA
from chunkcache.stores.stream import is_wrong_type

T = TypeVar("T")

# What an error means: a word for it, and the mend. The first that fits; subclasses stand before
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
        """Names of both halves on the server: metadata and blob."""
        name = key.encode(errors="surrogatepass")
        return name + METADATA.encode(), name + KV_BYTES.encode()

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
            text = self._address.without_secrets(text)
            cause, mend = next(rest for kind, *rest in MEANINGS if isinstance(error, kind))
            raise StoreError(f"store {self._address.label}: {text}{mend}", cause) from None
