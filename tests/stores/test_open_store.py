from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scripted import blobs, fetch
from servers import Server, free_port

from chunkcache.errors import SettingError, StoreError
from chunkcache.stores import (
    OPENERS,
    URL_VARIABLE,
    ChunkStore,
    Entry,
    embedded,
    open_store,
    parse_bytes,
)
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.writer import WriteBehind


def round_trip(store: ChunkStore) -> None:
    """Write, flush, read, delete: the store works, and what it holds was really taken away."""
    with store:
        assert store.write([Entry("a", {"model": "m"}, memoryview(b"blob"))]) == 4
        assert store.flush(10.0)
        assert store.sizes(["a", "none"]) == [4, 0]
        assert blobs(store, "a") == [b"blob"]
        assert store.read_metadata(["a"]) == [{"model": "m"}]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, valkey_server: Server) -> list[tuple[object, ...]]:
    """The arguments with which embedded servers were asked for; `valkey_server` plays them all."""
    calls: list[tuple[object, ...]] = []

    def start_embedded(folder: Path | None = None, max_bytes: int | None = None) -> str:
        calls.append((folder, max_bytes))
        return valkey_server.unix_url

    monkeypatch.setattr(embedded, "start_embedded", start_embedded)
    return calls


@pytest.fixture
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's cache folder, in a machine where no embedded server can run."""

    def start_embedded(folder: Path | None = None, max_bytes: int | None = None) -> str:
        raise StoreError("no server here")

    monkeypatch.setattr(embedded, "start_embedded", start_embedded)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path / "chunkcache"


def test_a_server_by_its_url(server_url: str, server: Server) -> None:
    round_trip(open_store(server_url))
    with server.client() as client:
        assert client.get("a@kv_bytes") == b"blob"


def test_valkey_is_another_name_for_redis(valkey_server: Server) -> None:
    round_trip(open_store(valkey_server.tcp_url.replace("redis://", "valkey://")))
    hosts = "user:secret@one:1,two:2"
    for url in (f"valkey+cluster://{hosts}", f"valkeys+sentinel://{hosts}/service/0"):
        assert repr(open_store(url)) == repr(open_store(url.replace("valkey", "redis")))
    with pytest.raises(SettingError, match="unknown parameter 'bytes'"):
        open_store("valkeys://localhost?bytes=2GB")


def test_a_folder_by_its_url(tmp_path: Path) -> None:
    folder = tmp_path / "two words"
    round_trip(open_store(f"file://{tmp_path}/two%20words?bytes=1GB"))
    assert any(folder.rglob("*.safetensors"))
    assert open_store(f"file://localhost{folder}".replace(" ", "%20")).sizes(["a"]) == [4]


def test_memory_by_its_url() -> None:
    store = open_store("memory://")
    assert isinstance(store, MemoryStore)
    round_trip(store)
    small = open_store("memory://?bytes=1KB")
    assert small.write([Entry("a", {}, memoryview(bytes(999)))]) == 999
    assert small.write([Entry("a", {}, memoryview(bytes(1000)))]) == 0


def test_embedded_by_its_url(started: list[tuple[object, ...]], tmp_path: Path) -> None:
    round_trip(open_store("embedded://"))
    round_trip(open_store(f"embedded://{tmp_path}?bytes=2MiB"))
    assert started == [(None, None), (tmp_path, 2 << 20)]


def test_an_embedded_server_is_held_from_the_start(
    started: list[tuple[object, ...]], valkey_server: Server
) -> None:
    with valkey_server.client() as client:
        before = len(client.client_list())
        store = open_store("embedded://")
        assert len(client.client_list()) == before + 1
    store.close()


def test_without_a_url_the_environment_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: list[tuple[object, ...]]
) -> None:
    monkeypatch.setenv(URL_VARIABLE, f"file://{tmp_path}")
    round_trip(open_store())
    assert any(tmp_path.rglob("*.safetensors"))
    assert isinstance(open_store("memory://"), MemoryStore)
    assert started == []


def test_without_a_url_and_environment_it_is_the_embedded_server(
    monkeypatch: pytest.MonkeyPatch, started: list[tuple[object, ...]]
) -> None:
    monkeypatch.setenv(URL_VARIABLE, "")
    round_trip(open_store())
    assert len(started) == 1


def test_where_no_embedded_server_runs_it_is_the_cache_folder(
    cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="chunkcache")
    round_trip(open_store())
    assert any(cache_folder.rglob("*.safetensors"))
    (message,) = caplog.messages
    assert "no server here" in message
    assert str(cache_folder) in message
    assert URL_VARIABLE in message


def test_an_embedded_server_that_was_asked_for_is_not_replaced(cache_folder: Path) -> None:
    with pytest.raises(SettingError, match=r"no server here.*file:///"):
        open_store("embedded://")


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_a_dead_server_is_no_error_but_each_call_is(scheme: str) -> None:
    with open_store(f"{scheme}://127.0.0.1:{free_port()}/0") as store:
        assert isinstance(store, WriteBehind)
        with pytest.raises(StoreError, match="check that the server runs"):
            store.sizes(["a"])
        with pytest.raises(StoreError, match="not asked until"):
            list(fetch(store, ["a"]))
        with pytest.raises(StoreError, match="not asked until"):
            store.write([Entry("a", {}, memoryview(b"x"))])


def test_a_dead_embedded_server_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "start_embedded", lambda *args: "unix:///nowhere/at/all")
    with open_store() as store, pytest.raises(StoreError):
        store.sizes(["a"])


def test_time_outs_and_queue_reach_the_store(server: Server) -> None:
    with open_store(server.tcp_url, read_timeout=0.1, write_queue_bytes=10) as store:
        assert store.write([Entry("big", {}, memoryview(bytes(11)))]) == 0
        with server.client() as client:
            client.execute_command("CLIENT", "PAUSE", "60000", "ALL")
        with pytest.raises(StoreError, match=r"no reply within|read_timeout"):
            store.sizes(["a"])
    server.stop()


def test_the_registry_lists_what_is_documented() -> None:
    assert list(OPENERS) == [
        "redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster",
        "rediss+cluster", "embedded", "file", "memory",
    ]  # fmt: skip
    assert all(f"{scheme}://" in (open_store.__doc__ or "") for scheme in OPENERS)


@pytest.mark.parametrize(
    "url", ["http://x", "localhost:6379", "/a/path", "s3://b", "redis", "[://"]
)
def test_an_unknown_scheme_lists_those_known(url: str) -> None:
    with pytest.raises(SettingError) as caught:
        open_store(url)
    assert all(f"{scheme}://" in str(caught.value) for scheme in OPENERS)


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("memory://?size=2GB", "unknown parameter 'size'; known are bytes"),
        ("memory://?bytes=2GB&x=", "unknown parameter 'x'; known are bytes"),
        ("memory://?bytes=many", "'many'"),
        ("memory://?bytes=", "size ''"),
        ("memory://?bytes=0", "above 0"),
        ("memory:///path", "memory://.bytes=2GB"),
        ("file://relative/path", "file:///path"),
        ("file://~/path", f"file://{Path.home()}/"),
        ("file:///~/path", f"file://{Path.home()}/"),
        ("embedded:///~/path", f"embedded://{Path.home()}/"),
        ("file:relative", "not absolute"),
        ("file://", "names no folder"),
        ("file:///", "names no folder"),
        ("file:///a#b", "%23"),
        ("file:///a?max_bytes=1", "unknown parameter 'max_bytes'; known are bytes"),
        ("embedded://relative/path", "embedded:///path"),
        ("embedded://?idle=1", "unknown parameter 'idle'; known are bytes"),
        ("redis://localhost/0?bytes=2GB", "unknown parameter 'bytes'; known are client_name"),
        ("redis://localhost/zero", "number of a database"),
        ("unix://relative", "unix:///path"),
    ],
)
def test_a_url_that_cannot_work_is_a_setting_error(url: str, hint: str) -> None:
    with pytest.raises(SettingError, match=hint):
        open_store(url)


def test_a_folder_that_cannot_be_used_is_a_setting_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(SettingError, match="folder"):
        open_store(f"file://{file}")


@pytest.mark.parametrize(
    ("open_it", "name"),
    [
        (lambda url: open_store(url, read_timeout=0.0), "read_timeout"),
        (lambda url: open_store(url, connect_timeout=-1.0), "connect_timeout"),
    ],
)
def test_a_time_out_must_be_positive(open_it: Callable[[str], ChunkStore], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        open_it("redis://localhost/0")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("7B", 7),
        ("2KB", 2000),
        ("2MB", 2_000_000),
        ("2GB", 2_000_000_000),
        ("3TB", 3_000_000_000_000),
        ("2KiB", 2048),
        ("2MiB", 2 << 20),
        ("2GiB", 2 << 30),
        ("1TiB", 1 << 40),
        ("1.5 gib", 3 << 29),
        (" 10mb ", 10_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "0", "0.1", "1 2", "1XB", "1e9", "2G B", "٣GB", "inf", "1_000"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(SettingError, match="such as 2GB"):
        parse_bytes(text)


@given(number=st.integers(1, 10**15), unit=st.sampled_from(["", "B", "KB", "MiB", " GiB"]))
@example(number=999_999_999_999_999, unit="KB")  # a float would round it
def test_whole_numbers_are_exact(number: int, unit: str) -> None:
    factor = {"": 1, "B": 1, "KB": 1000, "MiB": 1 << 20, " GiB": 1 << 30}[unit]
    assert parse_bytes(f"{number}{unit}") == number * factor
