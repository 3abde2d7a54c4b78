"""Many parts of values of a server read from one socket, with few replies under way at a time.

redis-py's parsers copy a reply three to five times. Here a reply's bytes are copied once, by the
kernel, into the memory that the caller names.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import redis

from chunkcache.stores.base import nbytes_of

# Redis before 9 copies every pending reply before it sends it, so few bytes may be under way at
# once; small blobs still need some replies in flight to hide the round trips.
WINDOW_BYTES = 8 << 20
WINDOW_REPLIES = 8
# Parts of a value are small enough for the server's copy to stay in the processor's cache; with 2
# to 4 under way, it copies one while we take another.
PART_BYTES = 1 << 20
PARTS_WINDOW_BYTES = 3 << 20
# All replies together must come at this rate at least (bytes/s), on top of the time-out: below it,
# computing is faster than loading, and a server that trickles would hold us for ever.
SLOWEST_RATE = 4 << 20
HEADER_BYTES = 64  # enough for `$len`, so little of the body must be moved
LINE_LIMIT = 4096
SKIP_BYTES = 64 << 10  # read at once of what nobody wants
VIEWS_AT_ONCE = 64  # handed to the kernel in one call; it takes 1,024 at most


Seen = Callable[[Sequence[memoryview]], object]


class Request(NamedTuple):
    """What one reply is to hold: a value's bytes from `start` to `stop`, or `whole` values.

    Of a whole value, `stop` is how many bytes it is thought to have.
    """

    name: bytes
    start: int
    stop: int
    whole: bool = False

    def command(self) -> tuple[str | bytes | int, ...]:
        """As it is sent: for one byte at least, which shows whether the value is there."""
        if self.whole:
            return ("GET", self.name)
        return ("GETRANGE", self.name, self.start, max(self.stop - 1, self.start))


class GetStream:
    """Requests sent and replies read on one connection, with the window in between.

    `sock` is the connection's socket. `timeout` (seconds) is how long the server may be silent. A
    reply that claims more than `max_bytes` is an error. `window` is how many bytes of replies may
    be under way, if more than one is. Methods raise redis.RedisError.
    """

    def __init__(
        self,
        connection: Any,
        sock: socket.socket,
        requests: Sequence[Request],
        timeout: float,
        max_bytes: int,
        window: int = WINDOW_BYTES,
    ) -> None:
        self._connection = connection
        self._sock = sock
        self._requests = requests
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._sent = 0
        self._done = 0  # replies read to their end
        self._ahead = 0  # bytes of the replies asked for that have not begun
        is_copied = not all(request.whole for request in requests)
        self._window = min(window, PARTS_WINDOW_BYTES) if is_copied else window
        self._received = b""  # what was read beyond the last header
        self._patience = timeout  # seconds that all that was asked for may still be waited for
        # TLS sockets have recvmsg_into, but refuse it.
        self._scatters = hasattr(sock, "recvmsg_into") and not isinstance(sock, ssl.SSLSocket)

    @property
    def unread(self) -> int:
        """Replies asked for and not yet read to their end."""
        return self._sent - self._done

    def start(self) -> None:
        """Send the first request and wait for the first bytes of its reply."""
        self._send_ahead(0)
        self._receive_more()

    def next_length(self) -> int | None:
        """Bytes of the next reply's body, None where there is none. Raises for an error reply."""
        line = self._line()
        _, start, stop, _ = self._requests[self._done]
        self._ahead -= stop - start
        if line[:1] == b"$" and line != b"$-1":
            return self._announced(line)
        if line[:1] == b"-":
            text = line[1:].decode(errors="replace")
            if not text.startswith(("WRONGTYPE ", "MOVED ", "ASK ")):
                raise redis.ResponseError(text)
        elif line not in (b"$-1", b"_"):
            raise redis.InvalidResponse("the server's reply is not a bulk string")
        self._finish_reply()
        return None

    def read_body(
        self, target: Sequence[memoryview], length: int, seen: Seen | None = None
    ) -> None:
        """Read a body of `length` bytes, and the line end after it.

        It fills the views, one after the other; what goes beyond them is dropped. `seen` is told
        of views as they are full.
        """
        end = memoryview(bytearray(2))
        full = [view for view in target if view.nbytes]
        views = [*full, *_scratch(length - nbytes_of(target)), end]
        left = length + end.nbytes
        at = 0
        while left:
            count = self._receive_early(views[at]) or self._receive_into(
                views[at : at + VIEWS_AT_ONCE]
            )
            left -= count
            self._send_ahead(left)
            begin = at
            while at < len(views) and count >= views[at].nbytes:
                count -= views[at].nbytes
                at += 1
            if seen is not None and begin < min(at, len(full)):
                seen(full[begin : min(at, len(full))])
            if count:
                views[at] = views[at][count:]
        if bytes(end) != b"\r\n":
            raise redis.InvalidResponse("a reply is longer than the server announced")
        self._finish_reply()

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
        check_length(length, self._max_bytes)
        self._patience += length / SLOWEST_RATE
        self._send_ahead(length)
        return length

    def _finish_reply(self) -> None:
        self._done += 1
        self._send_ahead(0)  # the server works while the caller does

    def _send_ahead(self, coming: int) -> None:
        """Ask for as many replies as the window has room for beside `coming` bytes of this one."""
        first = self._sent
        while self._sent < len(self._requests):
            under_way = self._sent - self._done
            _, start, stop, _ = self._requests[self._sent]
            ahead = self._ahead + stop - start
            if under_way and (under_way == WINDOW_REPLIES or coming + ahead > self._window):
                break
            self._sent += 1
            self._ahead = ahead
        if self._sent > first:
            wanted = self._requests[first : self._sent]
            packed = self._connection.pack_commands([each.command() for each in wanted])
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
        if self._patience < 0:
            raise redis.TimeoutError("the server sends too slowly")
        begun = time.monotonic()
        try:
            if self._scatters:
                count = self._sock.recvmsg_into(views)[0]
            else:
                count = self._sock.recv_into(views[0])
        except TimeoutError:
            raise redis.TimeoutError(f"no reply within {self._timeout:g} s") from None
        except OSError as error:
            raise redis.ConnectionError(f"reading a reply failed: {error}") from None
        finally:
            self._patience -= time.monotonic() - begun
        if count == 0:
            raise redis.ConnectionError("the server closed the connection")
        return count


def _scratch(nbytes: int) -> list[memoryview]:
    """Room for bytes that nobody wants."""
    if not nbytes:
        return []
    room = memoryview(bytearray(min(nbytes, SKIP_BYTES)))
    views = [room] * (nbytes // SKIP_BYTES) + [room[: nbytes % SKIP_BYTES]]
    return [view for view in views if view.nbytes]


def is_miss(error: redis.ResponseError) -> bool:
    """Whether the reply to a GET says that nothing is there for us.

    The key holds another type; or, in a cluster, it is on another node by now, which the next
    lookup will find out.
    """
    return isinstance(error, redis.exceptions.AskError) or is_wrong_type(error)


def is_wrong_type(error: redis.ResponseError) -> bool:
    """Whether the error says that a key holds another type: for us, that nothing is there."""
    return str(error).startswith("WRONGTYPE")


def check_length(length: int, max_bytes: int) -> None:
    """Refuse a value that is too long. Raises redis.InvalidResponse."""
    if length > max_bytes:
        raise redis.InvalidResponse(
            f"a value of {length} bytes is longer than max_blob_bytes={max_bytes} allows for"
        )
