"""Values read from a server to where they belong, and commands sent uncopied.

A reply's bytes are copied once, by the kernel, into the memory that the caller names.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.connection import DefaultParser

from chunkcache.stores.base import Part, Place, copy_part, nbytes_of
from chunkcache.stores.stream import (
    PART_BYTES,
    WINDOW_BYTES,
    GetStream,
    Request,
    Seen,
    check_length,
    is_miss,
)

SEND_BYTES = 1 << 20  # the time-out of a send holds for each piece of this size


class CommandPacker:
    """Packs commands without copying memoryviews: redis-py's default packer copies them twice."""

    def pack(self, *args: str | bytes | memoryview | float) -> list[bytes | memoryview]:
        """The command's pieces, to be sent one after the other."""
        name = args[0].encode() if isinstance(args[0], str) else args[0]
        words = bytes(name).split() if isinstance(name, bytes) else [name]  # "CONFIG GET" is two
        args = (*words, *args[1:])
        packed: list[bytes | memoryview] = []
        text = b"*%d\r\n" % len(args)
        for arg in args:
            if isinstance(arg, memoryview):
                body = arg.cast("B")  # len() of other formats counts items, not bytes
                packed.append(text + b"$%d\r\n" % len(body))
                packed += [body[at : at + SEND_BYTES] for at in range(0, len(body), SEND_BYTES)]
                text = b"\r\n"
            else:
                # surrogatepass: any str can be sent, and different ones stay different
                data = arg if isinstance(arg, bytes) else str(arg).encode(errors="surrogatepass")
                text += b"$%d\r\n%b\r\n" % (len(data), data)
        packed.append(text)
        return packed


class ReplyParser(DefaultParser):  # type: ignore[misc, valid-type]
    """redis-py's parser, for which every error has a class, whatever a server says.

    redis-py makes of `-MOVED` and `-ASK` more than a text, and raises where that fails; but hiredis
    is in the middle of a reply then, and raising there may end the process.
    """

    @classmethod
    def parse_error(cls, response: str) -> Exception:
        """The error that a server has sent."""
        try:
            error: Exception = super().parse_error(response)
        except Exception:
            return redis.ResponseError(response)
        return error


class BulkReader:
    """Reads parts of values with few replies in flight, through the connections of `client`.

    `timeout` (seconds) is how long the server may be silent. A value that claims more than
    `max_bytes` is an error. `copies` says whether the server copies a reply before it sends it, so
    that large ones are faster in pieces; it is called before the first of them is read. Safe to use
    from several threads.

    Attributes:
        window: Bytes of replies that may be under way together: a server may have to hold them.
    """

    def __init__(
        self,
        client: redis.Redis,
        timeout: float,
        max_bytes: int,
        copies: Callable[[], bool] = lambda: False,
    ) -> None:
        self._client = client
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._copies = copies
        self.window = WINDOW_BYTES

    def fetch(self, parts: Sequence[tuple[bytes, int, Sequence[memoryview]]]) -> Generator[bool]:
        """Read parts of values: of each its name, its first byte, and the views that it fills.

        Yields whether the value was there, and long enough. Raises redis.RedisError.
        """
        if not parts:
            return
        whole = self._whole(parts)
        requests: list[Request] = []
        for name, start, place in parts:
            stop = start + nbytes_of(place)
            check_length(stop, self._max_bytes)
            if name in whole:
                requests.append(Request(name, 0, stop, whole=True))
                continue
            requests += [
                Request(name, at, min(at + PART_BYTES, stop))
                for at in range(start, max(stop, start + 1), PART_BYTES)
            ]
        with self._stream(requests) as stream:
            for name, start, place in parts:
                if stream is None:
                    yield self._fetch_without_socket(name, start, place)
                    continue
                seen = place.filled if isinstance(place, Place) else None
                pieces = [place] if name in whole else _cut(place)
                # All of them, whatever became of the first.
                fits = [_read_one(stream, piece, seen) for piece in pieces]
                yield all(fits)

    def _whole(self, parts: Sequence[tuple[bytes, int, Sequence[memoryview]]]) -> Collection[bytes]:
        """Names of values that come fastest as a whole.

        Those are small ones, and any from a server that does not copy. What is asked for once, from
        its first byte, is most likely wanted to its last.
        """
        counts = Counter(name for name, _, _ in parts)
        sizes = {
            name: nbytes_of(place)
            for name, start, place in parts
            if not start and counts[name] == 1
        }
        if max(sizes.values(), default=0) <= PART_BYTES or not self._copies():
            return sizes.keys()
        return {name for name, size in sizes.items() if size <= PART_BYTES}

    @contextmanager
    def _stream(self, requests: Sequence[Request]) -> Iterator[GetStream | None]:
        connection, stream = self._begin(requests)
        if stream is None:
            self._client.connection_pool.release(connection)
            yield None
            return
        try:
            yield stream
        finally:
            if stream.unread:  # what still comes must not become the reply to another command
                connection.disconnect()
            self._client.connection_pool.release(connection)

    def _begin(self, requests: Sequence[Request]) -> tuple[Any, GetStream | None]:
        """A connection that has begun to answer; stale ones of the pool are replaced, once."""
        pool = self._client.connection_pool
        retried = False
        while True:
            connection: Any = pool.get_connection()
            try:
                sock = socket_of(connection)
                if sock is None:
                    return connection, None
                stream = GetStream(
                    connection, sock, requests, self._timeout, self._max_bytes, self.window
                )
                stream.start()
                return connection, stream
            except BaseException as error:
                connection.disconnect()
                pool.release(connection)
                if retried or not isinstance(error, redis.ConnectionError):
                    raise
                retried = True

    def _fetch_without_socket(self, name: bytes, start: int, place: Sequence[memoryview]) -> bool:
        """The same through redis-py alone, should a release of it hide the socket from us."""
        stop = start + nbytes_of(place)
        try:
            value: Any = self._client.getrange(name, start, max(stop - 1, start))
        except redis.ResponseError as error:
            if not is_miss(error):
                raise
            return False
        return copy_part(memoryview(value), Part("", 0, place))


def socket_of(connection: Any) -> socket.socket | None:
    """The socket of redis-py's connection, or None if this release keeps it elsewhere.

    `_sock` is the one private name of redis-py we rely on: it has no public way to read into
    memory of one's own.
    """
    sock: socket.socket | None = getattr(connection, "_sock", None)
    return sock if hasattr(sock, "recv_into") else None


def _read_one(stream: GetStream, place: Sequence[memoryview], seen: Seen | None) -> bool:
    """Read one reply. False unless it is as long as its place, or longer."""
    length = stream.next_length()
    if length is None:
        return False
    fits = length >= max(nbytes_of(place), 1)
    stream.read_body(place if fits else (), length, seen)
    return fits


def _cut(place: Sequence[memoryview]) -> list[list[memoryview]]:
    """The views of a place, cut every `PART_BYTES`."""
    parts: list[list[memoryview]] = [[]]
    room = PART_BYTES
    for view in place:
        while view.nbytes > room:
            parts[-1].append(view[:room])
            view, room = view[room:], PART_BYTES
            parts.append([])
        parts[-1].append(view)
        room -= view.nbytes
    return parts
