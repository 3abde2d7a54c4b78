"""Bulk replies read straight from the socket to where they belong, and commands sent uncopied.

redis-py's parsers copy a reply three to five times. Here a reply's bytes are copied once, by the
kernel: into the memory that the caller names, or into a scratch buffer that is kept warm and used
again.
"""

from __future__ import annotations

import mmap
import socket
import ssl
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import redis

from chunkcache.stores.base import copy_into

# Redis before 9 copies every pending reply before it sends it, so few bytes may be under way at
# once; small blobs still need some replies in flight to hide the round trips.
WINDOW_BYTES = 8 << 20
WINDOW_REPLIES = 8
# A reply must arrive at this rate at least (bytes/s), on top of the time-out: below it, computing
# a chunk is faster than loading it, and a server that trickles would hold us for ever.
SLOWEST_RATE = 4 << 20
SEND_BYTES = 1 << 20  # the time-out of a send holds for each piece of this size
HEADER_BYTES = 64  # enough for `$len`, so little of the body must be moved
LINE_LIMIT = 4096
HUGE_PAGE = 2 << 20
SPARE_BUFFERS = 4
SPARE_BYTES = 64 << 20  # larger scratch buffers are given back to the system
SKIP_BYTES = 64 << 10  # read at once of what nobody wants
VIEWS_AT_ONCE = 64  # handed to the kernel in one call; it takes 1,024 at most


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


class BulkReader:
    """Reads many values of a server with few in flight, through the connections of `client`.

    `timeout` (seconds) is how long the server may be silent. A reply that claims more than
    `max_bytes` is an error before any memory is taken. Safe to use from several threads.
    """

    def __init__(self, client: redis.Redis, timeout: float, max_bytes: int) -> None:
        self._client = client
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._spare: deque[memoryview] = deque(maxlen=SPARE_BUFFERS)  # its methods are atomic

    def read(self, names: Sequence[bytes]) -> Iterator[memoryview | None]:
        """Yield each name's value in order, None where it is missing, empty or not a string.

        A view is valid until the next one is asked for. Raises redis.RedisError.
        """
        if not names:
            return
        with self._stream(names) as stream:
            if stream is None:
                yield from self._read_without_socket(names)
                return
            buffer = self._spare.pop() if self._spare else memoryview(b"")
            for _ in names:
                length = stream.next_length()
                if length is None:
                    yield None
                    continue
                if length > len(buffer):
                    buffer = _warm_memory(length)
                view = buffer[:length]
                stream.read_body([view])
                yield view if length else None
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
        with self._stream(names) as stream:
            if stream is None:
                for blob, place in zip(self._read_without_socket(names), places, strict=True):
                    yield copy_into(blob, place)
                return
            for place in places:
                length = stream.next_length()
                fits = length == sum(view.nbytes for view in place)
                if fits:
                    stream.read_body(place)
                elif length is not None:
                    stream.skip_body(length)
                yield fits

    @contextmanager
    def _stream(self, names: Sequence[bytes]) -> Iterator[_Stream | None]:
        connection, stream = self._begin(names)
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

    def _begin(self, names: Sequence[bytes]) -> tuple[Any, _Stream | None]:
        """A connection that has begun to answer; stale ones of the pool are replaced, once."""
        pool = self._client.connection_pool
        retried = False
        while True:
            connection: Any = pool.get_connection()
            try:
                sock = socket_of(connection)
                if sock is None:
                    return connection, None
                stream = _Stream(connection, sock, names, self._timeout, self._max_bytes)
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
                _check_length(size, self._max_bytes)
                value: Any = self._client.get(name)
            except redis.ResponseError as error:
                if not is_wrong_type(error):
                    raise
                value = None
            yield memoryview(value) if value else None


class _Stream:
    """GETs sent and replies read on one connection, with the window in between."""

    def __init__(
        self,
        connection: Any,
        sock: socket.socket,
        names: Sequence[bytes],
        timeout: float,
        max_bytes: int,
    ) -> None:
        self._connection = connection
        self._sock = sock
        self._names = names
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._sent = 0
        self._done = 0  # replies read to their end
        self._largest = WINDOW_BYTES  # of the replies so far: our guess of those to come
        self._guessed = True
        self._received = b""  # what was read beyond the last header
        self._deadline = 0.0
        # TLS sockets have recvmsg_into, but refuse it.
        self._scatters = hasattr(sock, "recvmsg_into") and not isinstance(sock, ssl.SSLSocket)

    @property
    def unread(self) -> int:
        """Replies asked for and not yet read to their end."""
        return self._sent - self._done

    def start(self) -> None:
        """Send the first GET and wait for the first bytes of its reply."""
        self._send_ahead(0)
        self._deadline = time.monotonic() + self._timeout
        self._receive_more()

    def next_length(self) -> int | None:
        """Bytes of the next reply's body, None where there is none. Raises for an error reply."""
        self._deadline = time.monotonic() + self._timeout
        line = self._line()
        if line[:1] == b"$" and line != b"$-1":
            return self._announced(line)
        if line[:1] == b"-":
            error = redis.ResponseError(line[1:].decode(errors="replace"))
            if not is_wrong_type(error):
                raise error
        elif line not in (b"$-1", b"_"):
            raise redis.InvalidResponse("the server's reply to GET is not a bulk string")
        self._finish_reply()
        return None

    def read_body(self, target: Sequence[memoryview]) -> None:
        """Fill the views, one after the other, with the body; read the line end after it."""
        end = memoryview(bytearray(2))
        views = [view for view in (*target, end) if view.nbytes]
        left = sum(view.nbytes for view in views)
        at = 0
        while left:
            count = self._receive_early(views[at]) or self._receive_into(
                views[at : at + VIEWS_AT_ONCE]
            )
            left -= count
            self._send_ahead(left)
            while at < len(views) and count >= views[at].nbytes:
                count -= views[at].nbytes
                at += 1
            if count:
                views[at] = views[at][count:]
        if bytes(end) != b"\r\n":
            raise redis.InvalidResponse("a reply to GET is longer than the server announced")
        self._finish_reply()

    def skip_body(self, length: int) -> None:
        """Read a body that nobody wants."""
        scratch = memoryview(bytearray(min(length, SKIP_BYTES)))
        pieces = [scratch] * (length // SKIP_BYTES)
        self.read_body([*pieces, scratch[: length % SKIP_BYTES]])

    def _receive_early(self, target: memoryview) -> int:
        """Take what came along with the header."""
        count = min(len(self._received), target.nbytes)
        target[:count] = self._received[:count]
        self._received = self._received[count:]
        return count

    def _announced(self, line: bytes) -> int:
        if not line[1:].isdigit():
            raise redis.InvalidResponse("the server announced a reply of no valid length")
        length = int(line[1:])
        _check_length(length, self._max_bytes)
        if length:
            self._largest = length if self._guessed else max(self._largest, length)
            self._guessed = False
        self._deadline += length / SLOWEST_RATE
        self._send_ahead(length)
        return length

    def _finish_reply(self) -> None:
        self._done += 1
        self._send_ahead(0)  # the server works while the caller does

    def _send_ahead(self, coming: int) -> None:
        """Ask for as many replies as the window has room for beside `coming` bytes of this one."""
        if self._sent == len(self._names):
            return
        current = 1 if coming else 0
        ahead = self._sent - self._done - current
        room = min((WINDOW_BYTES - coming) // self._largest, WINDOW_REPLIES - current)
        count = max(room, 1 - current) - ahead
        if count > 0:
            names = self._names[self._sent : self._sent + count]
            self._sent += len(names)
            packed = self._connection.pack_commands([("GET", name) for name in names])
            # no health check: its PING would be answered after the replies under way
            self._connection.send_packed_command(packed, check_health=False)

    def _line(self) -> bytes:
        while b"\r\n" not in self._received:
            if len(self._received) > LINE_LIMIT:
                raise redis.InvalidResponse("the server's reply has no end of line")
            self._receive_more()
        line, _, self._received = self._received.partition(b"\r\n")
        return line

    def _receive_more(self) -> None:
        header = bytearray(HEADER_BYTES)
        count = self._receive_into([memoryview(header)])
        self._received += header[:count]

    def _receive_into(self, views: list[memoryview]) -> int:
        if time.monotonic() > self._deadline:
            raise redis.TimeoutError("the server sends too slowly")
        try:
            if self._scatters:
                count = self._sock.recvmsg_into(views)[0]
            else:
                count = self._sock.recv_into(views[0])
        except TimeoutError:
            raise redis.TimeoutError(f"no reply within {self._timeout:g} s") from None
        except OSError as error:
            raise redis.ConnectionError(f"reading a reply failed: {error}") from None
        if count == 0:
            raise redis.ConnectionError("the server closed the connection")
        return count


def socket_of(connection: Any) -> socket.socket | None:
    """The socket of redis-py's connection, or None if this release keeps it elsewhere.

    `_sock` is the one private name of redis-py we rely on: it has no public way to read into
    memory of one's own.
    """
    sock: socket.socket | None = getattr(connection, "_sock", None)
    return sock if hasattr(sock, "recv_into") else None


def is_wrong_type(error: redis.ResponseError) -> bool:
    """Whether the error says that a key holds another type: for us, that nothing is there."""
    return str(error).startswith("WRONGTYPE")


def _check_length(length: int, max_bytes: int) -> None:
    if length > max_bytes:
        raise redis.InvalidResponse(
            f"the server announced a value of {length} bytes, more than max_blob_bytes={max_bytes}"
        )


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
