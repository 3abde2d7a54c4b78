from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import FakeServer

from chunkcache.stores.stream import WINDOW_REPLIES
from chunkcache.stores.wire import BulkReader


def reader_of(url: str, timeout: float = 5.0, copies: bool = True) -> BulkReader:
    client = redis.Redis.from_url(url, protocol=2, socket_timeout=timeout)
    return BulkReader(client, timeout, 1 << 30, lambda: copies)


def fetch(reader: BulkReader, *sizes: int) -> Iterator[bytes | None]:
    """So many bytes of values, named by their numbers."""
    places = [[memoryview(bytearray(size))] for size in sizes]
    answers = reader.fetch([(b"%d" % at, 0, place) for at, place in enumerate(places)])
    for place, there in zip(places, answers, strict=True):
        yield bytes(place[0]) if there else None


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.one_of(st.none(), st.binary(max_size=300)), max_size=30),
    piece=st.integers(1, 200),
)
def test_replies_may_arrive_in_any_pieces(values: list[bytes | None], piece: int) -> None:
    def answer(command: list[bytes]) -> bytes:
        value = values[int(command[1])]
        return b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value)

    with FakeServer(answer, piece=piece) as fake:
        found = list(fetch(reader_of(fake.tcp_url), *(len(value or b"") for value in values)))
    assert found == [value or None for value in values]


@pytest.mark.parametrize(
    ("size", "copies", "least", "most"),
    [(100, True, 4, WINDOW_REPLIES), (3_000_000, False, 1, 2), (9_000_000, False, 1, 1),
     (9_000_000, True, 2, 4)],
)  # fmt: skip
def test_few_bytes_are_in_flight(size: int, copies: bool, least: int, most: int) -> None:
    def answer(command: list[bytes]) -> bytes:
        nbytes = size if command[0] == b"GET" else int(command[3]) + 1 - int(command[2])
        return b"$%d\r\n%b\r\n" % (nbytes, bytes(nbytes))

    with FakeServer(answer) as fake:
        assert (
            list(fetch(reader_of(fake.tcp_url, copies=copies), *[size] * 12)) == [bytes(size)] * 12
        )
    assert least <= fake.peak <= most


@pytest.mark.parametrize(
    "reply",
    [
        b"$12x\r\n",
        b"$\r\n",
        b"$-2\r\n",
        b":5\r\n",
        b"+OK\r\n",
        b"*1\r\n$1\r\na\r\n",
        b"$2\r\nabc\r\n",
    ],
)
def test_what_is_no_bulk_reply_is_an_error(reply: bytes) -> None:
    with FakeServer(lambda command: reply) as fake, pytest.raises(redis.InvalidResponse):
        list(fetch(reader_of(fake.tcp_url), 2))


def test_a_line_without_end_is_an_error() -> None:
    with (
        FakeServer(lambda command: b"$" + b"1" * 100_000) as fake,
        pytest.raises(redis.InvalidResponse, match="end of line"),
    ):
        list(fetch(reader_of(fake.tcp_url), 2))


def test_a_short_reply_is_an_error() -> None:
    replies = iter([b"$5\r\nhello\r\n", b"$1000\r\nhel", b""])
    with FakeServer(lambda command: next(replies, b"")) as fake:
        found = fetch(reader_of(fake.tcp_url), 5, 1000, 1)
        assert next(found) == b"hello"
        with pytest.raises(redis.ConnectionError):
            next(found)


def test_a_reply_that_trickles_is_given_up() -> None:
    with (
        FakeServer(lambda command: b"$500\r\n" + bytes(500), piece=1, pause=0.02) as fake,
        pytest.raises(redis.TimeoutError, match="too slowly"),
    ):
        list(fetch(reader_of(fake.tcp_url, timeout=0.2), 500))


def test_many_replies_that_are_each_just_in_time_are_given_up() -> None:
    replies = []

    def answer(command: list[bytes]) -> bytes:
        time.sleep(0.15)
        replies.append(command)
        return b"$5\r\nhello\r\n"

    with FakeServer(answer) as fake, pytest.raises(redis.TimeoutError, match="too slowly"):
        list(fetch(reader_of(fake.tcp_url, timeout=0.4), *[5] * 100))
    assert len(replies) < 20


def test_what_the_reader_takes_is_its_own_time() -> None:
    with FakeServer(lambda command: b"$5\r\nhello\r\n") as fake:
        for view in fetch(reader_of(fake.tcp_url, timeout=0.2), *[5] * 4):
            assert view is not None
            time.sleep(0.15)


def test_keys_that_are_elsewhere_in_a_cluster_are_none() -> None:
    replies = iter([b"$1\r\na\r\n", b"-MOVED 7 host:1\r\n", b"-ASK 7 host:1\r\n", b"$1\r\nb\r\n"])
    with FakeServer(lambda command: next(replies)) as fake:
        assert list(fetch(reader_of(fake.tcp_url), 1, 1, 1, 1)) == [b"a", None, None, b"b"]
