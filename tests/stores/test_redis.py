from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import FakeServer, Server, free_port, redis_binary

from chunkcache.errors import SettingError, StoreError
from chunkcache.stores import wire
from chunkcache.stores.base import Entry
from chunkcache.stores.redis import RedisStore

NOBODY = "redis://127.0.0.1:1/0"
PASSWORD = "pass/word#1@2"
ESCAPED = "pass%2Fword%231%402"


def entry(key: str, blob: bytes = b"", **metadata: str) -> Entry:
    return Entry(key, metadata, memoryview(blob))


def read(store: RedisStore, keys: Sequence[str]) -> list[bytes | None]:
    return [None if view is None else bytes(view) for view in store.read(keys)]


def use_every_verb(store: RedisStore) -> list[str]:
    """The messages of the StoreErrors that the verbs raise."""
    verbs = [
        lambda: store.sizes(["a"]),
        lambda: list(store.read(["a"])),
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


def test_an_entry_with_one_half_counts_once(redis_server: Server) -> None:
    store = RedisStore(redis_server.tcp_url)
    store.write([entry("blob", b"x"), entry("metadata", a="1"), entry("both", b"x", a="1")])
    assert store.delete(["blob", "metadata", "both", "none"]) == 3
    with redis_server.client() as client:
        assert client.dbsize() == 0


def test_nothing_to_do_needs_no_server() -> None:
    store = RedisStore(NOBODY)
    assert (store.sizes([]), list(store.read([])), store.read_metadata([])) == ([], [], [])
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
    views = store.read(keys)
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
            for key, view in zip(keys, store.read(keys), strict=True):
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
        next(store.read([f"k{at}" for at in range(10)]))
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


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("localhost:6379", "cannot be understood"),
        ("http://localhost", "cannot be understood"),
        ("redis://host:port/0", "cannot be understood"),
        ("redis://host:66666/0", "cannot be understood"),
        ("redis://[::1/0", "cannot be understood"),
        ("redis://host:6379/zero", "number of a database"),
        ("redis://host/0?protocol=3", "unknown parameter 'protocol'"),
        ("redis://host/0?ssl_ca_certs=x", "unknown parameter 'ssl_ca_certs'"),
        ("redis://host/0?decode_responses=yes", "known are client_name, db"),
        ("redis://host/0?socket_timeout=soon", "socket_timeout"),
        ("redis://host/0?socket_timeout=0", "more than 0 s"),
        ("redis://host/0?socket_connect_timeout=-1", "more than 0 s"),
        ("redis://host/0?db=one", "db"),
        ("redis://host/0?max_connections=-1", "max_connections"),
        ("rediss://host/0?ssl_cert_reqs=perhaps", "rediss://host:6379/0"),
        ("unix://relative/path", "three slashes"),
        ("unix://", "three slashes"),
    ],
)
def test_a_malformed_url_is_a_setting_error(url: str, hint: str) -> None:
    with pytest.raises(SettingError, match=hint):
        RedisStore(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:se/cret@host:6379/0",
        "redis://user:se#cret@host:6379/0",
        "redis://user:secret@host:six/0",
        "redis://user:se?cret@host:6379/0",
        "redis://user:1?secret@host:6379/0",
        "redis://user:1/secret@host:6379/0",
        "redis://user:1#secret@host:6379/0",
        "redis://user:secret@host/0?nonsense=1",
        "redis://user:secret@host/zero",
        "redis://user:secret@host/0?socket_timeout=soon",
        "unix://user:secret@host/path",
        "http://user:secret@host",
        "redis://host/0?password=secret&db=x",
    ],
)
def test_a_malformed_url_does_not_show_its_password(url: str) -> None:
    with pytest.raises(SettingError) as caught:
        RedisStore(url)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "label"),
    [
        ("redis://user:secret@host:1234/5", "redis://host:1234/5"),
        ("redis://", "redis://localhost:6379/0"),
        ("rediss://:secret@[::1]:7?ssl_cert_reqs=none&db=3", "rediss://[::1]:7/3"),
        ("unix:///a/b%20c?password=secret", "unix:///a/b c"),
    ],
)
def test_a_store_is_shown_without_its_secrets(url: str, label: str) -> None:
    assert repr(RedisStore(url)) == f"RedisStore('{label}')"


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
        next(store.read(["k1", "k2", "k3"]))
        assert store.sizes(["k0"]) == [300_000]
        with pytest.raises(StoreError, match="certificate"):
            RedisStore(url).sizes(["k0"])
