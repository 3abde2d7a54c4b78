"""Connections to a server, kept for the next command: none with a reply that nobody has read."""

from __future__ import annotations

import os
import sys
import weakref
from typing import TYPE_CHECKING, Any

import redis
from redis.sentinel import SentinelConnectionPool

if TYPE_CHECKING:
    _Base = redis.ConnectionPool
else:
    _Base = object


class _Sound(_Base):
    """redis-py's pool without its locks, sound whenever an exception lands in a command.

    An interrupt between a command and its reply would leave that reply for the next command, and
    one between getting a connection and using it would count that connection for ever.
    """

    def reset(self) -> None:
        """Begin without connections: at first, and in a forked child."""
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()  # those alive, used or not
        super().reset()

    def get_connection(self, *_: Any, **__: Any) -> Any:
        """A connection that is ready for a command. Raises redis.RedisError."""
        self._checkpid()
        try:
            connection: Any = self._available_connections.pop()
        except IndexError:
            self._created_connections = len(self._made)
            connection = self.make_connection()
            self._made.add(connection)
        try:
            connection.connect()
            if not _is_ready(connection):  # it was closed while idle, or has sent what nobody asked
                connection.disconnect()
                connection.connect()
                if connection.can_read():
                    raise redis.ConnectionError("the server sends what nobody has asked for")
        except BaseException:
            self._drop(connection)
            raise
        connection.error_before = id(sys.exception())
        return connection

    def release(self, connection: Any) -> None:
        """Take a connection back, unless an error has ended its use half-way."""
        self._checkpid()
        error = sys.exception()
        half_way = (
            error is not None
            and id(error) != connection.error_before
            # redis-py itself disconnects where that is needed, and so do our generators.
            and not isinstance(error, (redis.RedisError, GeneratorExit))
        )
        if half_way or not self.owns_connection(connection):
            self._drop(connection)
        elif connection not in self._available_connections:
            if connection.should_reconnect():
                connection.disconnect()
            self._available_connections.append(connection)

    def disconnect(self, inuse_connections: bool = True) -> None:
        """Close the connections; they can be connected again."""
        self._checkpid()
        some = self._made if inuse_connections else self._available_connections
        for connection in list(some):
            connection.disconnect()

    def _drop(self, connection: Any) -> None:
        connection.disconnect()
        self._made.discard(connection)

    def _checkpid(self) -> None:
        if self.pid != os.getpid():
            self.reset()


class SoundPool(_Sound, redis.ConnectionPool):
    """Connections to one server."""


class SoundSentinelPool(_Sound, SentinelConnectionPool):
    """Connections to the primary that Sentinel names."""


def _is_ready(connection: Any) -> bool:
    try:
        return not connection.can_read()
    except (redis.ConnectionError, redis.TimeoutError, OSError):
        return False
