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
    url: str, timeout: float = 5.0, max_bytes: int = 1 << 30, in_parts: bool = False
) -> BulkReader:
    client = redis.Redis.from_url(url, protocol=2, socket_timeout=timeout)
    return BulkReader(client, timeout, max_bytes, lambda: in_parts)


def read_all(reader: BulkReader, names: Sequence[bytes]) -> list[bytes | None]:
    return [None if view is None else bytes(view) for view in reader.read(names)]


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
    for _ in range(2):  # the second time with the scratch memory of the first
        assert read_all(reader, names) == [value or None for value in values]


SIZES = st.integers(0, 4 * PART_BYTES) | st.sampled_from(
    [at * PART_BYTES + more for at in (1, 2, 3) for more in (-1, 0, 1)]
)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=4), views=st.integers(1, 9))
def test_values_in_parts_are_what_they_are_at_once(
    redis_server: Server, sizes: list[int], views: int
) -> None:
    names = [b"n%d" % at for at in range(len(sizes))]
    values = [blob(at, size) for at, size in enumerate(sizes)]
    with redis_server.client() as client:
        client.flushdb()
        for name, value in zip(names, values, strict=True):
            client.set(name, value)
    reader = reader_of(redis_server.unix_url, in_parts=True)
    assert read_all(reader, names) == [value or None for value in values]
    places = [place_of(bytearray(size), views) for size in sizes]
    assert list(reader.read_into(names, places)) == [True] * len(sizes)
    assert [b"".join(place) for place in places] == values
    told = [Told(place_of(bytearray(size), views)) for size in sizes]
    assert list(reader.read_into(names, told)) == [True] * len(sizes)
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


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("there", [None, 0, 5, PART_BYTES, 3 * PART_BYTES - 1, 3 * PART_BYTES + 1])
def test_a_value_of_another_length_is_not_taken(
    redis_server: Server, in_parts: bool, there: int | None
) -> None:
    with redis_server.client() as client:
        client.flushdb()
        client.set("other", b"x")
        if there is not None:
            client.set("a", bytes(there))
    reader = reader_of(redis_server.unix_url, in_parts=in_parts)
    places = [[memoryview(bytearray(3 * PART_BYTES))], [memoryview(bytearray(1))]]
    assert list(reader.read_into([b"a", b"other"], places)) == [False, True]
    assert bytes(places[1][0]) == b"x"


@pytest.mark.parametrize("now", [None, PART_BYTES, 3 * PART_BYTES - 1, 3 * PART_BYTES + 1])
def test_a_value_that_changed_since_its_size_was_asked_for_is_none(
    redis_server: Server, monkeypatch: pytest.MonkeyPatch, now: int | None
) -> None:
    with redis_server.client() as client:
        client.flushdb()
        client.mset({"a": bytes(3 * PART_BYTES), "b": b"x"})
        reader = reader_of(redis_server.unix_url, in_parts=True)
        sizes_of = reader._sizes

        def sizes_and_change(names: Sequence[bytes]) -> list[int]:
            sizes = sizes_of(names)
            client.delete("a") if now is None else client.set("a", bytes(now))
            return sizes

        monkeypatch.setattr(reader, "_sizes", sizes_and_change)
        assert read_all(reader, [b"a", b"b"]) == [None, b"x"]


def test_parts_of_values_arrive_in_the_order_asked_for(redis_server: Server, path: str) -> None:
    values = {name: blob(at, 300_000) for at, name in enumerate((b"a", b"b"))}
    with redis_server.client() as client:
        client.flushdb()
        client.mset(values)
    asked = [(b"a", 10, 7), (b"b", 0, 100_000), (b"none", 0, 5), (b"a", 299_990, 10),
             (b"a", 299_990, 11), (b"b", 7, 3)]  # fmt: skip
    parts = [(name, at, place_of(bytearray(size), 3)) for name, at, size in asked]
    found = list(reader_of(redis_server.unix_url).read_parts(parts))
    assert found == [True, True, False, True, False, True]
    for (name, at, place), arrived in zip(parts, found, strict=True):
        got = b"".join(place)
        assert not arrived or got == values[name][at : at + len(got)]


def test_an_absurd_length_is_refused_in_parts_too() -> None:
    def answer(command: list[bytes]) -> bytes:
        return b":%d\r\n" % (1 << 40)

    with FakeServer(answer) as fake, pytest.raises(redis.InvalidResponse, match="max_blob_bytes"):
        read_all(reader_of(fake.tcp_url, in_parts=True), [b"a"])


def test_missing_and_wrong_types_are_none(server: Server, server_url: str, path: str) -> None:
    with server.client() as client:
        client.set("a", b"first")
        client.hset("hash", "field", "x")
        client.set("z", b"last")
    names = [b"a", b"none", b"hash", b"z", b"none", b"a"]
    reader = reader_of(server_url)
    assert read_all(reader, names) == [b"first", None, None, b"last", None, b"first"]


def test_nothing_to_read_needs_no_server() -> None:
    assert read_all(reader_of("redis://127.0.0.1:1/0"), []) == []


def test_an_absurd_length_is_refused(path: str) -> None:
    def answer(command: list[bytes]) -> bytes:
        return b":1000\r\n" if command[0] == b"STRLEN" else b"$1000\r\n"

    with (
        FakeServer(answer) as fake,
        pytest.raises(redis.InvalidResponse, match="max_blob_bytes=999"),
    ):
        read_all(reader_of(fake.tcp_url, max_bytes=999), [b"a"])


def test_an_error_reply_is_raised(path: str) -> None:
    with (
        FakeServer(lambda command: b"-NOTODAY we are closed\r\n") as fake,
        pytest.raises(redis.ResponseError, match="we are closed"),
    ):
        read_all(reader_of(fake.tcp_url), [b"a", b"b"])


def test_a_connection_that_died_in_the_pool_is_replaced_once() -> None:
    replies = iter([b"", b"$2\r\nok\r\n"])
    with FakeServer(lambda command: next(replies)) as fake:
        assert read_all(reader_of(fake.tcp_url), [b"a"]) == [b"ok"]
    tries: list[bytes] = []

    def hang_up(command: list[bytes]) -> bytes:
        tries.append(command[0])
        return b""

    with FakeServer(hang_up) as fake, pytest.raises(redis.ConnectionError):
        read_all(reader_of(fake.tcp_url), [b"a"])
    assert len(tries) == 2


@pytest.mark.parametrize(("size", "in_parts"), [(50_000, False), (2_500_000, True)])
@pytest.mark.parametrize("taken", [0, 1, 3, MANY])
def test_an_iterator_closed_early_leaves_nothing_behind(
    redis_server: Server, path: str, taken: int, size: int, in_parts: bool
) -> None:
    names = [b"n%d" % at for at in range(MANY)]
    values = [blob(at, size) for at in range(MANY)]
    with redis_server.client() as client:
        for name, value in zip(names, values, strict=True):
            client.set(name, value)
    reader = reader_of(redis_server.unix_url + "?max_connections=1", in_parts=in_parts)
    for _ in range(3):
        views = reader.read(names)
        assert [bytes(next(views) or b"") for _ in range(taken)] == values[:taken]
        views.close()  # type: ignore[attr-defined]
        assert read_all(reader, names[5:8]) == values[5:8]


def test_iterators_do_not_share_memory(redis_server: Server, path: str) -> None:
    names = [b"n%d" % at for at in range(8)]
    values = [blob(at, 100_000 + at) for at in range(8)]
    with redis_server.client() as client:
        for name, value in zip(names, values, strict=True):
            client.set(name, value)
    reader = reader_of(redis_server.unix_url)
    read_all(reader, names)  # so that there is scratch memory to share
    forward, backward = reader.read(names), reader.read(names[::-1])
    for at in range(8):
        one, other = next(forward), next(backward)
        assert one is not None
        assert other is not None
        assert (bytes(one), bytes(other)) == (values[at], values[7 - at])


def test_memory_is_used_again(redis_server: Server) -> None:
    with redis_server.client() as client:
        client.set("a", bytes(1000))
    reader = reader_of(redis_server.unix_url)
    owners = [[view.obj for view in reader.read([b"a", b"a"]) if view] for _ in range(2)]
    assert all(owner is owners[0][0] for owner in owners[0] + owners[1])


def test_a_view_kept_too_long_fails_loudly(redis_server: Server) -> None:
    with redis_server.client() as client:
        client.mset({"a": b"first", "b": b"other"})
    views = reader_of(redis_server.unix_url).read([b"a", b"b"])
    first = next(views)
    next(views)
    with pytest.raises(ValueError, match="released"):
        bytes(first or b"")


def test_the_last_view_of_an_iterator_left_early_stays_valid(redis_server: Server) -> None:
    with redis_server.client() as client:
        client.mset({"a": b"first", "b": b"other"})
    reader = reader_of(redis_server.unix_url)
    read_all(reader, [b"a"])
    first = next(reader.read([b"a", b"b"]))  # the iterator is gone at once
    read_all(reader, [b"b", b"b"])
    assert bytes(first or b"") == b"first"


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
