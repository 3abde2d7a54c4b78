from __future__ import annotations

import multiprocessing
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import blobs, fetch
from servers import FakeServer, Server, free_port, redis_binary, wait_until

from chunkcache import catalog
from chunkcache.errors import SettingError, StoreError
from chunkcache.stores import wire
from chunkcache.stores.base import Entry, read_blobs
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.stream import PART_BYTES

FORK = multiprocessing.get_context("fork")
NOBODY = "redis://127.0.0.1:1/0"
PASSWORD = "pass/word#1@2"
ESCAPED = "pass%2Fword%231%402"


def entry(key: str, blob: bytes | memoryview = b"", **metadata: str) -> Entry:
    return Entry(key, metadata, memoryview(blob))


def read(store: RedisStore, keys: Sequence[str]) -> list[bytes | None]:
    return blobs(store, *keys)


def pipelines(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Commands in each pipeline that is sent from now on."""
    sent: list[int] = []
    execute = redis.client.Pipeline.execute
    monkeypatch.setattr(
        redis.client.Pipeline,
        "execute",
        lambda pipe, **options: (sent.append(len(pipe)), execute(pipe, **options))[1],
    )
    return sent


def test_the_client_does_not_introduce_itself(valkey_server: Server) -> None:
    """It would cost each connection two round trips."""
    store = RedisStore(valkey_server.tcp_url.replace("/0", "/3"))
    with valkey_server.client() as client:
        client.config_resetstat()
        store.connect()
        names = client.info("commandstats")
        (ours,) = [each for each in client.client_list() if each["db"] == "3"]
    assert "cmdstat_client|setinfo" not in names
    assert ours["lib-name"] == ""
    store.close()


def use_every_verb(store: RedisStore) -> list[str]:
    """The messages of the StoreErrors that the verbs raise."""
    verbs = [
        lambda: store.sizes(["a"]),
        lambda: list(fetch(store, ["a"])),
        lambda: store.read_metadata(["a"]),
        lambda: store.write([entry("a", b"x")]),
        lambda: store.delete(["a"]),
    ]
    messages = []
    for verb in verbs:
        with pytest.raises(StoreError) as caught:
            verb()
        messages.append(str(caught.value))
    return messages


def test_every_verb(server: Server, server_url: str) -> None:
    store = RedisStore(server_url)
    assert store.write([entry("a", b"one", model="m"), entry("b", b"three", model="n")]) == 8
    keys = ["b", "none", "a"]
    assert store.sizes(keys) == [5, 0, 3]
    assert read(store, keys) == [b"three", None, b"one"]
    assert store.read_metadata(keys) == [{"model": "n"}, None, {"model": "m"}]
    assert store.flush()
    assert store.delete(["a", "none"]) == 1
    assert store.sizes(keys) == [5, 0, 0]
    assert read(store, ["a"]) == [None]
    store.close()


def test_the_keys_on_the_server_are_those_people_look_for(redis_server: Server) -> None:
    with RedisStore(redis_server.tcp_url) as store, redis_server.client() as client:
        store.write([entry("f@m@1@0@cafe", b"blob", model="m", dtype="bf16")])
        assert client.get("f@m@1@0@cafe@kv_bytes") == b"blob"
        assert client.hgetall("f@m@1@0@cafe@metadata") == {b"model": b"m", b"dtype": b"bf16"}
        assert client.dbsize() == 2


def test_writing_again_replaces_both_halves(server: Server, server_url: str) -> None:
    store = RedisStore(server_url)
    store.write([entry("a", b"one", old="1", both="2")])
    store.write([entry("a", b"two2", both="3")])
    assert (read(store, ["a"]), store.read_metadata(["a"])) == ([b"two2"], [{"both": "3"}])
    store.write([entry("a", b"", only="metadata")])
    assert store.sizes(["a"]) == [0]
    assert (read(store, ["a"]), store.read_metadata(["a"])) == ([None], [{"only": "metadata"}])
    store.write([entry("a", b"only blob")])
    assert (read(store, ["a"]), store.read_metadata(["a"])) == ([b"only blob"], [None])
    store.write([entry("a")])
    assert store.delete(["a"]) == 0


def test_many_entries_without_a_blob_cost_two_round_trips(
    redis_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = pipelines(monkeypatch)
    store = RedisStore(redis_server.unix_url)
    small = [Entry(f"k{i}", {f"f{i}": "1"}, memoryview(b""), merge=i % 2 == 0) for i in range(300)]
    store.write([entry("k0", b"blob", f="0"), *small, *small, entry("k1", b"blob")])
    # First whether both blobs are there, and of what is replaced how long it would have lived.
    assert sent == [2 * 2, 3, *[256, 512 + 256], *[44, 88 + 44], 2]
    assert store.sizes(["k0", "k1", "k2"]) == [4, 4, 0]
    assert store.read_metadata(["k0", "k1", "k2", "k3"]) == [
        {"f": "0", "f0": "1"}, None, {"f2": "1"}, {"f3": "1"}
    ]  # fmt: skip


def test_an_entry_with_one_half_counts_once(redis_server: Server) -> None:
    store = RedisStore(redis_server.tcp_url)
    store.write([entry("blob", b"x"), entry("metadata", a="1"), entry("both", b"x", a="1")])
    assert store.delete(["blob", "metadata", "both", "none"]) == 3
    with redis_server.client() as client:
        assert client.dbsize() == 0


def test_nothing_to_do_needs_no_server() -> None:
    store = RedisStore(NOBODY)
    assert (store.sizes([]), blobs(store), store.read_metadata([])) == ([], [], [])
    assert (store.write([]), store.delete([])) == (0, 0)


TEXT = st.text(max_size=20)
METADATA = st.dictionaries(TEXT, TEXT, max_size=3)


@settings(max_examples=40, deadline=None)
@given(entries=st.dictionaries(TEXT, st.tuples(METADATA, st.binary(max_size=200)), max_size=6))
def test_whatever_is_written_is_read(
    redis_server: Server, entries: dict[str, tuple[dict[str, str], bytes]]
) -> None:
    with RedisStore(redis_server.unix_url) as store:
        store.write([Entry(key, data, memoryview(blob)) for key, (data, blob) in entries.items()])
        keys = list(entries)
        assert read(store, keys) == [blob or None for _, blob in entries.values()]
        assert store.sizes(keys) == [len(blob) for _, blob in entries.values()]
        assert store.read_metadata(keys) == [data or None for data, _ in entries.values()]
        assert store.delete(keys) == sum(1 for data, blob in entries.values() if data or blob)


def test_text_that_is_no_valid_unicode_neither_raises_nor_collides(redis_server: Server) -> None:
    store = RedisStore(redis_server.tcp_url)
    store.write([entry("\ud800", b"one", preview="\udfff"), entry("\ud801", b"two")])
    assert read(store, ["\ud800", "\ud801"]) == [b"one", b"two"]
    assert store.sizes(["\ud800", "\ud802"]) == [3, 0]
    assert store.read_metadata(["\ud800"]) == [{"preview": "\ufffd" * 3}]


def test_large_blobs_of_any_format(server: Server, server_url: str) -> None:
    store = RedisStore(server_url)
    blob = bytes(range(256)) * 40_000
    assert store.write([Entry("a", {}, memoryview(blob).cast("f"))]) == len(blob)
    assert store.sizes(["a"]) == [len(blob)]
    assert read(store, ["a"]) == [blob]


def test_other_types_under_our_keys_are_misses(server: Server, server_url: str) -> None:
    store = RedisStore(server_url)
    store.write([entry("good", b"x", a="1")])
    with server.client() as client:
        client.rpush("bad@kv_bytes", "list")
        client.set("bad@metadata", "string")
        client.hset("odd@metadata", mapping={b"\xff": b"\xfe", b"ok": b"fine"})
    assert store.sizes(["bad", "good"]) == [0, 1]
    assert store.sizes(["bad"]) == [0]
    assert read(store, ["bad", "good"]) == [None, b"x"]
    assert store.read_metadata(["bad", "good"]) == [None, {"a": "1"}]
    assert store.read_metadata(["odd"]) == [{"\ufffd": "\ufffd", "ok": "fine"}]
    assert store.write([entry("bad", b"now good")]) == 8
    assert read(store, ["bad"]) == [b"now good"]


def test_a_full_server_is_a_store_error(server: Server, server_url: str) -> None:
    store = RedisStore(server_url)
    store.write([entry("old", b"x")])
    with server.client() as client:
        client.config_set("maxmemory", 1)
    with pytest.raises(StoreError, match="maxmemory"):
        store.write([entry("new", b"x" * 100_000)])
    assert read(store, ["old", "new"]) == [b"x", None]
    with server.client() as client:
        client.config_set("maxmemory", 0)
    assert store.write([entry("new", b"y")]) == 1


def test_a_read_only_server_is_a_store_error_for_writes(server: Server, server_url: str) -> None:
    store = RedisStore(server_url)
    store.write([entry("old", b"x")])
    with server.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
    with pytest.raises(StoreError, match="replica"):
        store.write([entry("new", b"x")])
    with pytest.raises(StoreError, match="replica"):
        store.delete(["old"])
    assert read(store, ["old"]) == [b"x"]


def test_a_server_that_refuses_every_key_is_at_fault() -> None:
    with FakeServer(lambda command: b"-NOPERM not for you\r\n") as fake:
        messages = use_every_verb(RedisStore(fake.tcp_url))
    assert all("not for you" in message for message in messages)


def test_a_dead_server_is_a_store_error_at_use() -> None:
    assert all("check that the server runs" in m for m in use_every_verb(RedisStore(NOBODY)))
    missing = RedisStore("unix:///nowhere/at/all")
    assert all("unix:///nowhere/at/all" in message for message in use_every_verb(missing))
    with pytest.raises(StoreError):
        missing.connect()


def test_a_restarted_server_is_no_error(server: Server, server_url: str) -> None:
    store = RedisStore(server_url)
    for verb in (
        lambda: store.sizes(["a"]),
        lambda: read(store, ["a"]),
        lambda: store.read_metadata(["a"]),
        lambda: store.write([entry("a", b"x")]),
        lambda: store.delete(["a"]),
    ):
        store.write([entry("a", b"x")])
        server.stop()
        server.start()
        verb()


def test_a_server_killed_in_the_middle_of_a_read(server: Server, server_url: str) -> None:
    store = RedisStore(server_url)
    blobs = [bytes([at]) * 3_000_000 for at in range(8)]
    keys = [f"k{at}" for at in range(8)]
    entries = [entry(key, blob) for key, blob in zip(keys, blobs, strict=True)]
    store.write(entries)
    views = read_blobs(store, keys)
    assert bytes(next(views) or b"") == blobs[0]
    server.stop()
    rest: list[bytes] = []
    with pytest.raises(StoreError):
        rest.extend(bytes(view or b"") for view in views)
    assert rest == blobs[1 : len(rest) + 1]
    use_every_verb(store)
    server.start()
    store.write(entries)
    assert read(store, keys) == blobs


def test_a_silent_server_costs_the_read_timeout() -> None:
    with FakeServer(lambda command: None) as fake:
        messages = use_every_verb(RedisStore(fake.tcp_url, read_timeout=0.1))
    assert all("read_timeout" in message for message in messages)


def test_a_listener_that_never_answers_costs_the_read_timeout(redis_server: Server) -> None:
    # the url's own time-out wins over the argument, which would hang for an hour
    port = redis_server.tcp_url.rpartition(":")[2].partition("/")[0]
    url = f"redis://127.0.0.1:{port}/0?socket_timeout=0.1"
    store = RedisStore(url, read_timeout=3600.0)
    store.write([entry("a", b"x")])
    with redis_server.client() as client:
        client.execute_command("CLIENT", "PAUSE", "60000", "ALL")
    try:
        assert all("read_timeout" in message for message in use_every_verb(store))
    finally:
        redis_server.stop()


def test_a_value_above_the_cap_is_a_store_error(redis_server: Server) -> None:
    store = RedisStore(redis_server.tcp_url, max_blob_bytes=10)
    store.write([entry("a", b"x" * 11), entry("b", b"x" * 10)])
    with pytest.raises(StoreError, match="max_blob_bytes=10"):
        read(store, ["a"])
    assert read(store, ["b"]) == [b"x" * 10]


def test_readers_in_many_threads_get_their_own_bytes(server: Server, server_url: str) -> None:
    store = RedisStore(server_url)
    blobs = {f"k{at}": bytes([at]) * (1000 + 77_777 * at) for at in range(12)}
    store.write([entry(key, blob) for key, blob in blobs.items()])
    wrong: list[str] = []

    def work(first: int) -> None:
        keys = [f"k{(first + at * 5) % 12}" for at in range(12)]
        for _ in range(5):
            for key, view in zip(keys, read_blobs(store, keys), strict=True):
                if view is None or bytes(view) != blobs[key]:
                    wrong.append(key)
            if store.sizes(keys) != [len(blobs[key]) for key in keys]:
                wrong.append("sizes")

    threads = [threading.Thread(target=work, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_iterator_closed_early_does_not_spoil_the_next_command(redis_server: Server) -> None:
    store = RedisStore(redis_server.unix_url + "?max_connections=1")
    store.write([entry(f"k{at}", bytes([at]) * 200_000) for at in range(10)])
    for _ in range(3):
        next(fetch(store, [f"k{at}" for at in range(10)]))
        assert store.sizes(["k1", "none"]) == [200_000, 0]
        assert read(store, ["k9"]) == [bytes([9]) * 200_000]


def test_without_the_socket_results_are_the_same(
    server: Server, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RedisStore(server_url)
    store.write([entry("a", b"one"), entry("b", b"x" * 3_000_000), entry("empty", a="1")])
    keys = ["a", "none", "b", "empty"]
    found = read(store, keys)
    monkeypatch.setattr(wire, "socket_of", lambda connection: None)
    assert read(store, keys) == found == [b"one", None, b"x" * 3_000_000, None]
    server.stop()
    with pytest.raises(StoreError):
        read(store, keys)


def test_the_number_in_the_url_chooses_the_database(redis_server: Server) -> None:
    one = RedisStore(redis_server.tcp_url.removesuffix("/0") + "/1")
    one.write([entry("a", b"x")])
    assert one.sizes(["a"]) == [1]
    assert RedisStore(redis_server.tcp_url).sizes(["a"]) == [0]
    assert RedisStore(redis_server.unix_url + "?db=1").sizes(["a"]) == [1]


def test_connections_speak_the_protocol_without_push_messages(server: Server) -> None:
    with (
        RedisStore(f"{server.tcp_url}?client_name=probe") as store,
        server.client() as client,
    ):
        store.connect()
        found = [each["resp"] for each in client.client_list() if each["name"] == "probe"]
    assert found == ["2"]


def test_a_password_opens_the_server_and_is_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    with Server(redis_binary(), password=PASSWORD) as server:
        address = server.tcp_url.removeprefix("redis://")
        store = RedisStore(f"redis://:{ESCAPED}@{address}")
        store.write([entry("a", b"x")])
        assert read(store, ["a"]) == [b"x"]
        with pytest.raises(StoreError, match="password in the store's URL"):
            RedisStore(f"redis://{address}").sizes(["a"])
        wrong = RedisStore(f"redis://user:{ESCAPED}9@{address}")
        shown = [*use_every_verb(wrong), repr(store), repr(wrong), str(wrong), caplog.text]
    assert not any("pass/word" in text or "pass%2F" in text for text in shown)


def test_a_password_that_a_server_echoes_is_not_shown() -> None:
    echo = b"-ERR unknown command 'AUTH', with args beginning with: '%b'\r\n" % PASSWORD.encode()
    with FakeServer(lambda command: echo) as fake:
        address = fake.tcp_url.removeprefix("redis://")
        messages = use_every_verb(RedisStore(f"redis://:{ESCAPED}@{address}"))
    assert all("'***'" in message and PASSWORD not in message for message in messages)


def test_tls(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    assert openssl, "openssl is not on PATH: install it (apt-get install openssl)"
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=localhost"]
    command += ["-days", "2", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    port = free_port()
    options = ["--tls-port", str(port), "--tls-cert-file", certificate, "--tls-key-file", key]
    options += ["--tls-auth-clients", "no"]
    with Server(redis_binary(), *options):
        url = f"rediss://127.0.0.1:{port}/0"
        store = RedisStore(f"{url}?ssl_ca_certs={certificate}")
        blobs = [bytes([at]) * (at * 300_000) for at in range(1, 9)]
        store.write([entry(f"k{at}", blob) for at, blob in enumerate(blobs)])
        for _ in range(2):
            assert read(store, [f"k{at}" for at in range(8)]) == blobs
        next(fetch(store, ["k1", "k2", "k3"]))
        assert store.sizes(["k0"]) == [300_000]
        with pytest.raises(StoreError, match="certificate"):
            RedisStore(url).sizes(["k0"])


# ---------------------------------------------------------------------- several writers


def test_a_blob_that_is_there_is_not_sent_again(server: Server) -> None:
    store, other = RedisStore(server.tcp_url), RedisStore(server.tcp_url)
    assert store.write([entry("a", b"x" * 1_000_000, by="one")]) == 1_000_000
    with server.client() as client:
        before = client.info("stats")["total_net_input_bytes"]
        assert other.write([entry("a", b"x" * 1_000_000, by="two")]) == 1_000_000
        assert client.info("stats")["total_net_input_bytes"] - before < 10_000
        assert store.read_metadata(["a"]) == [{"by": "one"}]
        client.delete("a@metadata")  # evicted
    other.write([entry("a", b"x" * 1_000_000, by="two")])
    assert store.read_metadata(["a"]) == [{"by": "two"}]
    assert store.write([entry("a", b"shorter", by="three")]) == 7
    assert store.read_metadata(["a"]) == [{"by": "three"}]


def write_many(store: RedisStore) -> None:
    """What a process does."""
    for number in range(10**6):
        assert store.write([entry(f"k{number}", bytes(1_000_000), by="victim")]) == 1_000_000


def test_what_a_process_killed_amid_a_write_leaves_is_whole_and_the_next_goes_on(
    redis_server: Server,
) -> None:
    store = RedisStore(redis_server.unix_url, read_timeout=20.0)
    writer = FORK.Process(target=write_many, args=(store,))
    writer.start()
    keys = [f"k{number}" for number in range(100)]
    wait_until(lambda: store.sizes(["k20"]) == [1_000_000])
    with redis_server.client() as client:
        before = len(client.client_list())
        writer.kill()
        writer.join()
        wait_until(lambda: len(client.client_list()) < before)
    described = [fields is not None for fields in store.read_metadata(keys)]
    assert described == [size > 0 for size in store.sizes(keys)]
    store.write([entry(key, bytes(1_000_000), by="next") for key in keys])
    assert store.flush(0)
    assert store.sizes(keys) == [1_000_000] * 100


# ---------------------------------------------------------------------- expiry and pins


def left_ms(server: Server, *keys: str) -> list[int]:
    """Milliseconds until each half expires: -1 for never, -2 for what is not there."""
    with server.client() as client:
        return [client.pttl(f"{key}@{half}") for key in keys for half in ("metadata", "kv_bytes")]


def pinned(key: str, blob: bytes = b"", merge: bool = False, **metadata: str) -> Entry:
    return Entry(key, metadata, memoryview(blob), merge=merge, pinned=True)


def test_without_a_ttl_nothing_expires(server: Server) -> None:
    store = RedisStore(server.tcp_url)
    store.write([entry("a", b"x", m="1"), entry("index", m="1"), pinned("b", b"x", m="1")])
    store.sizes(["a"])
    assert left_ms(server, "a", "b", "index") == [-1, -1, -1, -1, -1, -2]


def test_with_a_ttl_all_but_what_is_pinned_expires(server: Server) -> None:
    store = RedisStore(server.tcp_url, ttl=100)
    store.write([entry("a", b"x", m="1"), entry("index", m="1")])
    store.write([pinned("b", b"x", m="1"), pinned("held", m="1")])
    metadata, blob, index, _ = left_ms(server, "a", "index")
    assert all(90_000 < left <= 100_000 for left in (metadata, blob, index))
    assert left_ms(server, "b", "held") == [-1, -1, -1, -2]
    short = RedisStore(server.tcp_url, ttl=0.05)
    short.write([entry("gone", b"x", m="1")])
    wait_until(lambda: left_ms(server, "gone") == [-2, -2])
    assert short.sizes(["gone", "a"]) == [0, 1]


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("look", ["sizes", "read_metadata"])
def test_a_hit_renews_both_halves_if_asked_to(server: Server, refresh: bool, look: str) -> None:
    RedisStore(server.tcp_url, ttl=100).write([entry("a", b"x", m="1"), pinned("b", b"x", m="1")])
    store = RedisStore(server.tcp_url, ttl=1000, refresh_ttl=refresh)
    getattr(store, look)(["a", "b", "none"])
    least, most = (900_000, 1_000_000) if refresh else (1, 100_000)
    *expiring, one, other, none, nothing = left_ms(server, "a", "b", "none")
    assert all(least < left <= most for left in expiring)
    assert (one, other, none, nothing) == (-1, -1, -2, -2)


def test_renewing_costs_no_round_trip(
    redis_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    trips = pipelines(monkeypatch)
    RedisStore(redis_server.tcp_url, ttl=9).sizes(["a", "b", "c"])
    assert len(trips) == 1


def test_a_server_that_cannot_renew_still_finds() -> None:
    """Redis 6 has no XX for PEXPIRE; a reader may not be allowed it."""

    def answer(command: list[bytes]) -> bytes:
        replies = {b"STRLEN": b":5\r\n", b"HGETALL": b"*2\r\n$1\r\nm\r\n$1\r\n1\r\n"}
        return replies.get(command[0], b"-ERR wrong number of arguments\r\n")

    with FakeServer(answer) as fake:
        store = RedisStore(fake.tcp_url, ttl=100)
        assert store.sizes(["a", "b"]) == [5, 5]
        assert store.read_metadata(["a"]) == [{"m": "1"}]


def test_fields_added_later_neither_shorten_nor_lose_a_pin(server: Server) -> None:
    store = RedisStore(server.tcp_url, ttl=100)
    more = Entry("index", {"b": "1"}, memoryview(b""), merge=True)
    store.write([more])
    assert 0 < left_ms(server, "index")[0] <= 100_000
    store.write([pinned("index", merge=True, a="1")])
    assert left_ms(server, "index")[0] == -1
    store.write([more])
    assert left_ms(server, "index")[0] == -1
    assert store.read_metadata(["index"]) == [{"a": "1", "b": "1"}]


def test_pinning_what_is_there_lets_it_stay(server: Server) -> None:
    store = RedisStore(server.tcp_url, ttl=100)
    store.write([entry("a", b"x", m="1")])
    store.write([pinned("a", b"x", m="1")])
    assert left_ms(server, "a") == [-1, -1]


@pytest.mark.parametrize("ttl", [-1.0, float("nan"), float("inf"), 1e12])
def test_a_ttl_that_cannot_work_is_a_setting_error(ttl: float) -> None:
    with pytest.raises(SettingError, match="ttl must be 0"):
        RedisStore(NOBODY, ttl=ttl)


# ---------------------------------------------------------------------- full servers

POLICIES = [
    "noeviction",
    "allkeys-lru",
    "allkeys-lfu",
    "allkeys-random",
    "volatile-lru",
    "volatile-lfu",
    "volatile-random",
    "volatile-ttl",
]


@pytest.mark.parametrize("ttl", [0, 1000])
@pytest.mark.parametrize("policy", POLICIES)
def test_under_each_policy_a_full_server_holds_whole_entries_after_a_sweep(
    server: Server, policy: str, ttl: float
) -> None:
    """What is found is whole and right; what was evicted in part is a miss, and can be removed."""
    store = RedisStore(server.tcp_url, ttl=ttl)
    with server.client() as client:
        while client.info("memory")["lazyfree_pending_objects"]:  # which would be room later
            time.sleep(0.01)
        client.config_set("maxmemory-policy", policy)
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 1_500_000)
        keys = [f"safetensors@m@1@0@{number:064x}" for number in range(60)]
        blobs = {key: key.encode() * 600 for key in keys}
        refused = 0
        for key, blob in blobs.items():
            try:
                store.write([entry(key, blob, bytes=str(len(blob)), pad="x" * 9000)])
                store.write([entry(f"anchor{key}", chunk=key)])
            except StoreError as error:
                refused += "raise the server's maxmemory" in str(error)
        assert (refused > 0) == (policy == "noeviction" or (policy[:3] == "vol" and not ttl))
        sizes = dict(zip(keys, store.sizes(keys), strict=True))
        assert any(sizes.values())
        assert not all(sizes.values())
        assert all(size in (0, len(blobs[key])) for key, size in sizes.items())
        for key, view in zip(
            keys, read_blobs(store, keys), strict=True
        ):  # more may have gone since
            assert view is None or (sizes[key] and bytes(view) == blobs[key])
        client.config_set("maxmemory", 0)  # full as it was, the listing itself would evict
        catalog.sweep(store)
        blob_keys, data_keys = (
            {name.rpartition(b"@")[0] for name in client.scan_iter(f"safe*@{half}", _type=kind)}
            for half, kind in (("kv_bytes", "string"), ("metadata", "hash"))
        )
        assert blob_keys == data_keys
    missing = [key for key in keys if not store.sizes([key])[0]]
    store.write([entry(key, blobs[key], bytes="1") for key in missing])
    assert read(store, keys) == list(blobs.values())


def test_pinned_entries_outlive_others_under_volatile_policies(server: Server) -> None:
    store = RedisStore(server.tcp_url, ttl=1000)
    with server.client() as client:
        client.config_set("maxmemory-policy", "volatile-lru")
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 1_500_000)
    store.write([pinned("held", b"x" * 100_000, m="1")])
    for number in range(60):
        store.write([entry(f"k{number}", b"x" * 50_000, m="1")])
    held, *others = store.sizes(["held", *(f"k{number}" for number in range(60))])
    assert held == 100_000
    assert set(others) == {0, 50_000}


def test_a_lookup_keeps_both_halves_as_young(server: Server) -> None:
    store = RedisStore(server.tcp_url)
    with server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 30_000_000)
        store.write([entry("a", b"x", m="1")])
        wait_until(lambda: client.object("IDLETIME", "a@metadata") > 0)
        store.sizes(["a"])
        assert client.object("IDLETIME", "a@metadata") == 0
        assert client.object("IDLETIME", "a@kv_bytes") == 0


def test_a_full_server_is_not_sent_the_blob(redis_server: Server) -> None:
    store = RedisStore(redis_server.tcp_url)
    with redis_server.client() as client:
        client.config_set("maxmemory", 1)
        before = client.info("stats")["total_net_input_bytes"]
        for _ in range(3):
            with pytest.raises(StoreError, match="maxmemory"):
                store.write([entry("a", b"x" * 1_000_000)])
        assert client.info("stats")["total_net_input_bytes"] - before < 10_000


def test_the_users_of_the_documentation_may_do_what_they_must(server: Server) -> None:
    page = (Path(__file__).parents[2] / "docs" / "redis.md").read_text()
    large = bytes(PART_BYTES + 1)
    rules = {name: rest.split() for name, rest in re.findall(r"(?m)^user (\w+) (on .+)$", page)}
    with server.client() as client:
        client.acl_log_reset()
        for name, words in rules.items():
            client.execute_command("ACL", "SETUSER", name, *words)
        address = server.tcp_url.removeprefix("redis://")
        writer = RedisStore(f"redis://chunkcache:a-long-password@{address}", ttl=100)
        writer.write([entry("a", b"x", m="1"), Entry("i", {"m": "1"}, memoryview(b""), merge=True)])
        writer.write([pinned("a", b"x", m="1"), pinned("b", b"x", m="1"), entry("c", m="1")])
        writer.write([entry("large", large)])
        reader = RedisStore(f"redis://reader:another-password@{address}")
        for store in (writer, reader):
            store.connect()
            assert store.sizes(["a", "b"]) == [1, 1]
            assert store.read_metadata(["a", "i"]) == [{"m": "1"}, {"m": "1"}]
            assert read(store, ["a", "none", "large"]) == [b"x", None, large]
        with pytest.raises(StoreError, match="no permissions"):
            reader.write([entry("d", b"x")])
        assert writer.delete(["a", "b", "c", "i", "large"]) == 5
        key = f"f@m@1@0@{0:064x}"
        writer.write([entry(key, large, positions="0-1")])
        wait_until(lambda: client.object("IDLETIME", f"{key}@kv_bytes") > 0)
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", used + len(large) // 2)
        writer._known_until = 0.0
        client.config_resetstat()
        writer.write([entry(f"f@m@1@0@{1:064x}", large, positions="0-1")])
        assert client.info("commandstats")["cmdstat_randomkey"]["calls"] > 0
        assert writer.sizes([key]) == [0]  # the writer may look, and has made room
        client.config_set("maxmemory", 0)
        refused = {(each["username"], each["object"]) for each in client.acl_log()}
        assert {each for each in refused if "client" not in each[1]} == {
            ("reader", "multi"), ("reader", "del"), ("reader", "set"), ("reader", "exec")
        }  # fmt: skip
        for name in rules:
            client.execute_command("ACL", "DELUSER", name)
    assert sorted(rules) == ["chunkcache", "reader"]
