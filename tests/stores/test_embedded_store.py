"""However the embedded server goes, it comes back for whoever misses it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from users import NOBODY, ROOT

from chunkcache.errors import StoreError
from chunkcache.stores import ChunkStore, Entry, embedded, embedded_store, open_store
from chunkcache.stores.embedded import stop_embedded
from chunkcache.stores.embedded_store import EmbeddedStore
from chunkcache.stores.supervisor import LOCK, take_lock

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="finds processes through /proc"
)
PATIENCE = 120.0  # for what takes a fraction of a second on an idle machine


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a short path, whose server is gone after the test."""
    monkeypatch.setattr(embedded, "START_SECONDS", PATIENCE)
    path = Path(tempfile.mkdtemp(prefix="cc-", dir="/tmp")).resolve()
    yield path / "e"
    stop_embedded(path / "e", PATIENCE)
    shutil.rmtree(path, ignore_errors=True)


def entry(key: str) -> Entry:
    return Entry(key, {"model": "m"}, memoryview(b"blob"))


def server_of(folder: Path) -> int:
    said = embedded.supervisor.ask(folder / "chunkcache.sock", "INFO server", PATIENCE)
    return int(next(line for line in said.splitlines() if line.startswith("process_id:"))[11:])


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def found(store: ChunkStore, *keys: str) -> list[int] | None:
    with contextlib.suppress(StoreError):
        return store.sizes(keys)
    return None


def kill_both(folder: Path) -> None:
    server = server_of(folder)
    os.kill(parent_of(server), signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(server, signal.SIGKILL)


WAYS: dict[str, Callable[[Path], None]] = {
    "server killed": lambda folder: os.kill(server_of(folder), signal.SIGKILL),
    "server terminated": lambda folder: os.kill(server_of(folder), signal.SIGTERM),
    "supervisor killed": lambda folder: os.kill(parent_of(server_of(folder)), signal.SIGKILL),
    "both killed": kill_both,
    "stopped": lambda folder: stop_embedded(folder, PATIENCE),
    "no socket": lambda folder: (folder / "chunkcache.sock").unlink(),
    "no folder": lambda folder: shutil.rmtree(folder),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_comes_back_with_its_snapshot_and_says_so(
    folder: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(f"embedded://{folder}?bytes=16MiB") as store:
        store.write([entry("a")])
        assert store.flush(PATIENCE)
        stop_embedded(folder, PATIENCE)  # the snapshot
        until(lambda: found(store, "a") == [4])
        caplog.clear()
        before = server_of(folder)
        WAYS[way](folder)
        until(lambda: not Path(f"/proc/{before}").exists())
        until(lambda: found(store, "a") == ([0] if way == "no folder" else [4]))
        store.write([entry("b")])
        assert store.flush(PATIENCE)
        until(lambda: found(store, "b") == [4])
        until(lambda: "runs again" in caplog.text)
    assert str(folder) in caplog.text
    assert str(folder / "server.log") in caplog.text
    assert "check that the server runs" not in caplog.text
    assert server_of(folder) != before


def test_the_bound_of_the_url_holds_after_it_too(folder: Path) -> None:
    store = EmbeddedStore(folder, 16 << 20)
    stop_embedded(folder, PATIENCE)
    until(lambda: found(store, "a") == [0])
    assert store.server_info()[0]["maxmemory"] == 16 << 20
    store.close()


def test_a_call_waits_for_the_start_no_longer_than_for_a_connection(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All calls together, however long the start takes; what comes of it serves later ones."""
    store = EmbeddedStore(folder, connect_timeout=0.25)
    stop_embedded(folder, PATIENCE)
    go_on = threading.Event()
    start = embedded.start_embedded

    def slowly(*args: object) -> str:
        assert go_on.wait(PATIENCE)
        return start(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(embedded, "start_embedded", slowly)
    waits: list[float] = []
    join = threading.Thread.join
    monkeypatch.setattr(
        threading.Thread,
        "join",
        lambda self, timeout=None: (waits.append(timeout or 0.0), join(self, timeout))[1],
    )
    for _ in range(3):
        with pytest.raises(StoreError, match="is being started again") as caught:
            store.sizes(["a"])
        assert caught.value.cause == "connection"
    assert 0 < max(waits) <= 0.25
    assert waits[1:] == pytest.approx([0.0] * (len(waits) - 1), abs=0.01)
    go_on.set()
    until(lambda: found(store, "a") == [0])
    store.close()


def test_a_start_that_fails_is_said_and_not_tried_all_the_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EmbeddedStore(folder)
    stop_embedded(folder, PATIENCE)
    tries: list[float] = []

    def in_vain(*args: object) -> str:
        tries.append(time.monotonic())
        raise StoreError("no such luck")

    with monkeypatch.context() as patched:
        patched.setattr(embedded, "start_embedded", in_vain)
        with pytest.raises(StoreError, match="could not be started again: no such luck"):
            until(lambda: store.sizes(["a"]))
        for _ in range(10):
            assert found(store, "a") is None
        assert len(tries) == 1
    monkeypatch.setattr(store._keeper, "_not_before", 0.0)
    until(lambda: found(store, "a") == [0])
    store.close()


def test_a_loading_server_is_not_called_gone(folder: Path) -> None:
    """Played: a real one loads too fast to be caught at it."""
    store = EmbeddedStore(folder)
    stop_embedded(folder, PATIENCE)
    lock = take_lock(folder / LOCK)
    assert lock is not None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "chunkcache.sock"))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        while connection.recv(1000):
                            connection.sendall(b"-LOADING the dataset in memory\r\n" * 2)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(StoreError, match="is loading its snapshot"):
            store.connect()
        listener.shutdown(socket.SHUT_RDWR)
    (folder / "chunkcache.sock").unlink()
    os.close(lock)
    store.close()


def test_many_who_miss_it_at_once_get_one_server(folder: Path) -> None:
    """Threads, and children forked with the store at hand."""
    store = EmbeddedStore(folder)
    store.sizes(["a"])
    os.kill(server_of(folder), signal.SIGKILL)
    fork = multiprocessing.get_context("fork")
    seen = fork.SimpleQueue()

    def miss() -> None:
        until(lambda: found(store, "a") == [0])
        seen.put(store.server_info()[0]["process_id"])

    everybody = [fork.Process(target=miss) for _ in range(3)]
    everybody += [threading.Thread(target=miss) for _ in range(3)]  # type: ignore[list-item]
    for each in everybody:
        each.start()
    for each in everybody:
        each.join()
    assert len({seen.get() for _ in range(6)}) == 1
    store.close()


def test_at_the_end_of_the_interpreter_nothing_is_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EmbeddedStore(folder)
    stop_embedded(folder, PATIENCE)
    ended = threading.Thread()
    monkeypatch.setattr(embedded_store.threading, "main_thread", lambda: ended)
    assert found(store, "a") is None
    assert store._keeper._starter is None
    store.close()


@ROOT
def test_a_server_of_another_user_is_not_talked_to(folder: Path) -> None:
    """One who may rename folders can put a server of theirs where ours has been."""
    store = EmbeddedStore(folder)
    stop_embedded(folder, PATIENCE)
    folder.parent.chmod(0o777)
    folder.chmod(0o777)
    reader, writer = os.pipe()

    def impersonate() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "chunkcache.sock"))
            listener.listen()
            os.write(writer, b"1")
            time.sleep(PATIENCE)

    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            impersonate()
        os._exit(0)
    try:
        os.read(reader, 1)
        with pytest.raises(StoreError, match=f"another user's .uid {NOBODY}"):
            store.sizes(["a"])
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
        (folder / "chunkcache.sock").unlink()
        folder.chmod(0o700)
        store.close()
