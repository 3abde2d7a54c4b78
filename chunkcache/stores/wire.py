"""Values read from a server to where they belong, and commands sent uncopied.

A reply's bytes are copied once, by the kernel: into the memory that the caller names, or into a
scratch buffer that is kept warm and used again.
"""

from __future__ import annotations

import mmap
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import redis
from redis.connection import DefaultParser

from chunkcache.stores.base import Place, copy_into, nbytes_of
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
HUGE_PAGE = 2 << 20
SPARE_BUFFERS = 4
SPARE_BYTES = 64 << 20  # larger scratch buffers are given back to the system


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
    """Reads many values of a server with few in flight, through the connections of `client`.

    `timeout` (seconds) is how long the server may be silent. A reply that claims more than
    `max_bytes` is an error before any memory is taken. `in_parts` says whether the server is faster
    when large values are asked for in parts; it is called before the first of them is read. Safe to
    use from several threads.

    Attributes:
        window: Bytes of replies that may be under way together: a server may have to hold them.
    """

    def __init__(
        self,
        client: redis.Redis,
        timeout: float,
        max_bytes: int,
        in_parts: Callable[[], bool] = lambda: False,
    ) -> None:
        self._client = client
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._in_parts = in_parts
        self.window = WINDOW_BYTES
        self._spare: deque[memoryview] = deque(maxlen=SPARE_BUFFERS)  # its methods are atomic

    def read(self, names: Sequence[bytes]) -> Iterator[memoryview | None]:
        """Yield each name's value in order, None where it is missing, empty or not a string.

        A view is valid until the next one is asked for. Raises redis.RedisError.
        """
        if not names:
            return
        sizes = self._sizes(names)
        with self._stream(_requests(names, sizes)) as stream:
            if stream is None:
                yield from self._read_without_socket(names)
                return
            buffer = self._spare.pop() if self._spare else memoryview(b"")
            for size in sizes:
                length = size if size > PART_BYTES else stream.next_length()
                if length is None:
                    yield None
                    continue
                if length > len(buffer):
                    buffer = _warm_memory(length)
                view = buffer[:length]
                if size > PART_BYTES:
                    whole = _read_parts(stream, [view])
                else:
                    stream.read_body([view])
                    whole = length > 0
                yield view if whole else None
                _expire(view)
            # Not after an early end: whoever took one view and left may still be reading it.
            if len(buffer) <= SPARE_BYTES:
                self._spare.append(buffer)

    def read_into(
        self, names: Sequence[bytes], places: Sequence[Sequence[memoryview]]
    ) -> Generator[bool]:
        """Read each name's value into the views of its place; yield whether it was as long as they.

        Raises redis.RedisError.
        """
        if not names:
            return
        sizes = [nbytes_of(place) for place in places]
        if max(sizes) <= PART_BYTES or not self._in_parts():
            sizes = [0] * len(sizes)
        with self._stream(_requests(names, sizes)) as stream:
            if stream is None:
                for blob, place in zip(self._read_without_socket(names), places, strict=True):
                    yield copy_into(blob, place)
                return
            for place, size in zip(places, sizes, strict=True):
                if size > PART_BYTES:
                    yield _read_parts(stream, place)
                else:
                    yield _read_one(stream, place)

    def read_parts(
        self, parts: Sequence[tuple[bytes, int, Sequence[memoryview]]]
    ) -> Generator[bool]:
        """Read parts of values: of each its name, its first byte, and the views that it fills.

        Raises redis.RedisError.
        """
        if not parts:
            return
        requests = [Request(name, at, at + nbytes_of(place)) for name, at, place in parts]
        with self._stream(requests) as stream:
            for name, at, place in parts:
                if stream is not None:
                    yield _read_one(stream, place)
                else:
                    value: Any = self._client.getrange(name, at, at + nbytes_of(place) - 1)
                    yield copy_into(memoryview(value), place)

    def _sizes(self, names: Sequence[bytes]) -> list[int]:
        """Bytes of the values that must be asked for in parts; of others, anything small."""
        if not self._in_parts():
            return [0] * len(names)
        with self._client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.strlen(name)
            replies: list[Any] = pipe.execute(raise_on_error=False)
        sizes = [reply if isinstance(reply, int) else 0 for reply in replies]  # GET says what it is
        check_length(max(sizes), self._max_bytes)
        return sizes

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

    def _read_without_socket(self, names: Sequence[bytes]) -> Iterator[memoryview | None]:
        """The same through redis-py alone, should a release of it hide the socket from us."""
        for name in names:
            try:
                size: Any = self._client.strlen(name)
                check_length(size, self._max_bytes)
                value: Any = self._client.get(name)
            except redis.ResponseError as error:
                if not is_miss(error):
                    raise
                value = None
            yield memoryview(value) if value else None


def socket_of(connection: Any) -> socket.socket | None:
    """The socket of redis-py's connection, or None if this release keeps it elsewhere.

    `_sock` is the one private name of redis-py we rely on: it has no public way to read into
    memory of one's own.
    """
    sock: socket.socket | None = getattr(connection, "_sock", None)
    return sock if hasattr(sock, "recv_into") else None


def _requests(names: Sequence[bytes], sizes: Sequence[int]) -> list[Request]:
    """What to ask for: values whose size is large, in parts.

    The last part is asked for with one byte more: that a value is longer than thought must be seen.
    """
    requests = []
    for name, size in zip(names, sizes, strict=True):
        starts = range(0, size, PART_BYTES)
        if len(starts) > 1:
            requests += [Request(name, at, at + PART_BYTES) for at in starts[:-1]]
            requests.append(Request(name, starts[-1], size + 1))
        else:
            requests.append(Request(name))
    return requests


def _read_parts(stream: GetStream, place: Sequence[memoryview]) -> bool:
    """Read a value that was asked for in parts. False unless each was as long as it must be."""
    seen = _seen(place)
    # All of them, whatever became of the first.
    fits = [_read_one(stream, part, seen) for part in _cut(place)]
    return all(fits)


def _read_one(stream: GetStream, place: Sequence[memoryview], seen: Seen | None = None) -> bool:
    """Read one reply. False unless it was as long as its place."""
    length = stream.next_length()
    fits = length == nbytes_of(place)
    if fits:
        stream.read_body(place, seen or _seen(place))
    elif length is not None:
        stream.skip_body(length)
    return fits


def _seen(place: Sequence[memoryview]) -> Seen | None:
    return place.filled if isinstance(place, Place) else None


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


def _expire(view: memoryview) -> None:
    """Make a view that is kept too long fail loudly instead of showing the next blob."""
    with suppress(BufferError):  # an array over it still exists; by contract nobody reads it
        view.release()


def _warm_memory(nbytes: int) -> memoryview:
    """At least `nbytes` of memory, in huge pages where the system has them."""
    size = -(-nbytes // HUGE_PAGE) * HUGE_PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(bytearray(size))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: correct, only slower at first
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
