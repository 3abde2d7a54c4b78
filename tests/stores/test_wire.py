from __future__ import annotations

from collections.abc import Sequence

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import FakeServer, Server, parse_commands

from chunkcache.stores import wire
from chunkcache.stores.address import SERVER, read_url
from chunkcache.stores.base import Place
from chunkcache.stores.stream import PART_BYTES
from chunkcache.stores.wire import BulkReader, CommandPacker, ReplyParser

MANY = 20


def reader_of(
    url: str, timeout: float = 5.0, max_bytes: int = 1 << 30, copies: bool = False
) -> BulkReader:
    client = redis.Redis.from_url(url, protocol=2, socket_timeout=timeout)
    return BulkReader(client, timeout, max_bytes, lambda: copies)


def read_all(
    reader: BulkReader, names: Sequence[bytes], sizes: Sequence[int]
) -> list[bytes | None]:
    """Values of these sizes, None for those that are not there or shorter."""
    places = [[memoryview(bytearray(size))] for size in sizes]
    parts = [(name, 0, place) for name, place in zip(names, places, strict=True)]
    answers = zip(places, reader.fetch(parts), strict=True)
    return [bytes(place[0]) if there else None for place, there in answers]


def blob(seed: int, size: int) -> bytes:
    """Bytes that differ for each seed, with line ends and dollars among them."""
    return (bytes([seed % 251, 13, 10, 36]) * (size // 4 + 1))[:size]


@pytest.fixture(params=["socket", "redis-py"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to read: past redis-py's parser, and through it when its socket is hidden."""
    if request.param == "redis-py":
        monkeypatch.setattr(wire, "socket_of", lambda connection: None)
    return str(request.param)


def test_values_of_every_size_arrive_in_order(server: Server, server_url: str, path: str) -> None:
    sizes = [0, 1, 2, 53, 62, 63, 64, 65, 4096, 300_000, 5_000_000, 3, 9_000_000, 7]
    names = [b"n%d" % at for at in range(len(sizes))]
    values = [blob(at, size) for at, size in enumerate(sizes)]
    with server.client() as client:
        for name, value in zip(names, values, strict=True):
            client.set(name, value)
    reader = reader_of(server_url)
    assert read_all(reader, names, sizes) == [value or None for value in values]


SIZES = st.integers(0, 4 * PART_BYTES) | st.sampled_from(
    [at * PART_BYTES + more for at in (1, 2, 3) for more in (-1, 0, 1)]
)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=4), views=st.integers(1, 9))
def test_values_copies_are_what_they_are_at_once(
    redis_server: Server, sizes: list[int], views: int
) -> None:
    names = [b"n%d" % at for at in range(len(sizes))]
    values = [blob(at, size) for at, size in enumerate(sizes)]
    with redis_server.client() as client:
        client.flushdb()
        for name, value in zip(names, values, strict=True):
            client.set(name, value)
    there = [size > 0 for size in sizes]
    for copies in (True, False):
        reader = reader_of(redis_server.unix_url, copies=copies)
        told = [Told(place_of(bytearray(size), views)) for size in sizes]
        parts = [(name, 0, place) for name, place in zip(names, told, strict=True)]
        assert list(reader.fetch(parts)) == there
        assert [b"".join(place) for place in told] == values
        assert [place.seen for place in told] == values


class Told(Place):
    """Keeps what it is told of."""

    seen = b""

    def filled(self, pieces: Sequence[memoryview]) -> None:
        self.seen += b"".join(pieces)


def place_of(memory: bytearray, views: int) -> list[memoryview]:
    """The memory as so many views, the last of them perhaps of another size."""
    step = max(1, len(memory) // views)
    return [memoryview(memory)[at : at + step] for at in range(0, len(memory), step)]


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("there", [None, 0, 5, PART_BYTES, 3 * PART_BYTES - 1, 3 * PART_BYTES + 1])
def test_a_value_that_is_too_short_is_not_taken(
    redis_server: Server, copies: bool, there: int | None
) -> None:
    with redis_server.client() as client:
        client.flushdb()
        client.set("other", b"x")
        if there is not None:
            client.set("a", bytes(there))
    reader = reader_of(redis_server.unix_url, copies=copies)
    found = read_all(reader, [b"a", b"other"], [3 * PART_BYTES, 1])
    assert found == [bytes(3 * PART_BYTES) if there and there > 3 * PART_BYTES else None, b"x"]


def test_parts_of_values_arrive_in_the_order_asked_for(redis_server: Server, path: str) -> None:
    values = {name: blob(at, 300_000) for at, name in enumerate((b"a", b"b"))}
    with redis_server.client() as client:
        client.flushdb()
        client.mset(values)
    asked = [(b"a", 10, 7), (b"b", 0, 100_000), (b"none", 0, 5), (b"a", 299_990, 10),
             (b"a", 299_990, 11), (b"b", 7, 3)]  # fmt: skip
    parts = [(name, at, place_of(bytearray(size), 3)) for name, at, size in asked]
    found = list(reader_of(redis_server.unix_url).fetch(parts))
    assert found == [True, True, False, True, False, True]
    for (name, at, place), arrived in zip(parts, found, strict=True):
        got = b"".join(place)
        assert not arrived or got == values[name][at : at + len(got)]


def test_missing_and_wrong_types_are_none(server: Server, server_url: str, path: str) -> None:
    with server.client() as client:
        client.set("a", b"first")
        client.hset("hash", "field", "x")
        client.set("z", b"last")
    names = [b"a", b"none", b"hash", b"z", b"none", b"a"]
    reader = reader_of(server_url)
    found = read_all(reader, names, [5, 1, 1, 4, 1, 5])
    assert found == [b"first", None, None, b"last", None, b"first"]


def test_nothing_to_read_needs_no_server() -> None:
    assert read_all(reader_of("redis://127.0.0.1:1/0"), [], []) == []


@pytest.mark.parametrize("copies", [True, False])
def test_whole_values_are_asked_for_as_such_where_that_is_faster(copies: bool) -> None:
    asked: list[tuple[bytes, ...]] = []

    def answer(command: list[bytes]) -> bytes:
        asked.append(tuple(command))
        return b"$0\r\n\r\n"

    place = [memoryview(bytearray(PART_BYTES)), memoryview(bytearray(1))]
    parts = [(b"small", 0, place[1:]), (b"large", 0, place), (b"pieces", 0, place[1:])]
    with FakeServer(answer) as fake:
        reader = reader_of(fake.tcp_url, copies=copies)
        assert not any(reader.fetch([*parts, (b"pieces", 1, place[1:]), (b"end", 9, place[1:])]))
    end = b"%d" % PART_BYTES
    in_pieces = [(b"GETRANGE", b"large", b"0", b"%d" % (PART_BYTES - 1)),
                 (b"GETRANGE", b"large", end, end)]  # fmt: skip
    assert asked == [
        (b"GET", b"small"),
        *(in_pieces if copies else [(b"GET", b"large")]),
        (b"GETRANGE", b"pieces", b"0", b"0"),
        (b"GETRANGE", b"pieces", b"1", b"1"),
        (b"GETRANGE", b"end", b"9", b"9"),
    ]


@pytest.mark.parametrize("asked", [1000, 10])
def test_an_absurd_length_is_refused(asked: int) -> None:
    with (
        FakeServer(lambda command: b"$1000\r\n") as fake,
        pytest.raises(redis.InvalidResponse, match="max_blob_bytes=999"),
    ):
        read_all(reader_of(fake.tcp_url, max_bytes=999), [b"a"], [asked])


def test_an_error_reply_is_raised(path: str) -> None:
    with (
        FakeServer(lambda command: b"-NOTODAY we are closed\r\n") as fake,
        pytest.raises(redis.ResponseError, match="we are closed"),
    ):
        read_all(reader_of(fake.tcp_url), [b"a", b"b"], [1, 1])


def test_a_connection_that_died_in_the_pool_is_replaced_once() -> None:
    replies = iter([b"", b"$2\r\nok\r\n"])
    with FakeServer(lambda command: next(replies)) as fake:
        assert read_all(reader_of(fake.tcp_url), [b"a"], [2]) == [b"ok"]
    tries: list[bytes] = []

    def hang_up(command: list[bytes]) -> bytes:
        tries.append(command[0])
        return b""

    with FakeServer(hang_up) as fake, pytest.raises(redis.ConnectionError):
        read_all(reader_of(fake.tcp_url), [b"a"], [2])
    assert len(tries) == 2


@pytest.mark.parametrize(
    ("size", "copies"), [(50_000, False), (2_500_000, True), (2_500_000, False)]
)
@pytest.mark.parametrize("taken", [0, 1, 3, MANY])
def test_an_iterator_closed_early_leaves_nothing_behind(
    redis_server: Server, path: str, taken: int, size: int, copies: bool
) -> None:
    names = [b"n%d" % at for at in range(MANY)]
    values = [blob(at, size) for at in range(MANY)]
    with redis_server.client() as client:
        for name, value in zip(names, values, strict=True):
            client.set(name, value)
    reader = reader_of(redis_server.unix_url + "?max_connections=1", copies=copies)
    for _ in range(3):
        rooms = [bytearray(size) for _ in names]
        answers = reader.fetch([(n, 0, [memoryview(r)]) for n, r in zip(names, rooms, strict=True)])
        assert all(next(answers) for _ in range(taken))
        answers.close()
        assert rooms[:taken] == values[:taken]
        assert read_all(reader, names[5:8], [size] * 3) == values[5:8]


WORDS = st.one_of(
    st.binary(max_size=50),
    st.binary(max_size=50).map(memoryview),
    st.integers(),
    st.text(max_size=20),
)


@given(words=st.lists(WORDS, max_size=8))
def test_commands_are_packed_as_the_protocol_says(
    words: list[bytes | memoryview | int | str],
) -> None:
    sent = b"".join(CommandPacker().pack("SET", *words))
    texts = [
        bytes(word)
        if isinstance(word, (bytes, memoryview))
        else str(word).encode(errors="surrogatepass")
        for word in words
    ]
    assert parse_commands(sent) == ([[b"SET", *texts]], b"")


@pytest.mark.parametrize("name", ["CONFIG GET", b"CONFIG GET"])
def test_a_command_of_two_words_is_two_words(name: str | bytes) -> None:
    sent = b"".join(CommandPacker().pack(name, "save"))
    assert parse_commands(sent) == ([[b"CONFIG", b"GET", b"save"]], b"")


def test_memoryviews_are_sent_without_a_copy_whatever_their_format() -> None:
    owner = bytearray(3 * wire.SEND_BYTES)
    pieces = CommandPacker().pack("SET", "a", memoryview(owner).cast("f"))
    views = [piece for piece in pieces if isinstance(piece, memoryview)]
    assert all(view.obj is owner for view in views)
    assert sum(view.nbytes for view in views) == len(owner)
    assert parse_commands(b"".join(pieces)) == ([[b"SET", b"a", bytes(owner)]], b"")


@pytest.mark.parametrize(
    "text", ["MOVED", "MOVED 1", "ASK 1 a", "ASK x y z", "ASK a b c d", "", " "]
)
def test_an_error_reply_of_any_text_has_a_class(text: str) -> None:
    assert isinstance(ReplyParser.parse_error(text), redis.ResponseError)


def test_errors_that_redis_py_knows_stay_what_they_are() -> None:
    moved = ReplyParser.parse_error("MOVED 5 host:7000")
    assert isinstance(moved, redis.exceptions.MovedError)
    assert (moved.host, moved.port) == ("host", 7000)
    assert isinstance(ReplyParser.parse_error("OOM full"), redis.OutOfMemoryError)


def test_connections_to_a_server_use_that_parser() -> None:
    """With redis-py's own one, an error amid an array ends the process now and then."""
    pool = read_url("redis://host", SERVER, 1.0, 1.0).pool()
    assert isinstance(pool.make_connection()._parser, ReplyParser)
