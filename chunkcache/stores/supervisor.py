"""Keeps one user's embedded Valkey server: starts it, watches it, and ends it when nobody is there.

Run by path, in a process of its own: `python -I -S supervisor.py FOLDER SOCKET BINARY MAX_BYTES
IDLE_SECONDS`. It imports the standard library only, and nothing of its own package, so that it is
up in tens of milliseconds and stays small.

Whoever holds the lock on `server.lock` is the folder's one server. The server process inherits the
lock, so that it stays taken while either of the two lives: no second server can load the snapshot
that a first one is still writing.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import sys
import time
from pathlib import Path

LOCK = "server.lock"
LOG = "server.log"
SNAPSHOT = "dump.rdb"
LOCKED = 75  # exit status: another process holds the lock (EX_TEMPFAIL)
LOG_BYTES = 1 << 20
BIND_SECONDS = 10.0  # by then a starting server has made its socket
PR_SET_PDEATHSIG = 1

# A snapshot rewrites everything, gigabytes: for a cache, seldom is enough. `stop-writes…` and
# `force`: a full disk must neither stop the cache nor keep the server from leaving.
SERVER_CONFIG = """\
port 0
unixsocket {socket}
unixsocketperm 700
dir {folder}
dbfilename {snapshot}
maxmemory {max_bytes}
maxmemory-policy allkeys-lru
save 900 1
rdbcompression no
stop-writes-on-bgsave-error no
shutdown-on-sigterm save force
shutdown-on-sigint nosave force
appendonly no
daemonize no
crash-memcheck-enabled no
"""


def private_folder(path: Path) -> Path:
    """Make `path` a folder that only this user can enter, unless it is one, and return it.

    Folders on the way to it that are missing are made likewise. What is there is left as it is:
    raises `NotADirectoryError` if it is a link or a file, `PermissionError` if it belongs to
    somebody else or is open to others. In a shared folder all of these may be traps.
    """
    for folder in reversed([path, *path.parents]):
        if not folder.exists():
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{path} is not a folder")
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user (uid {found.st_uid})")
    if found.st_mode & 0o077:
        raise PermissionError(f"{path} is open to other users; close it with chmod 700 {path}")
    return path


def ask(socket_path: Path, command: str, timeout: float = 1.0) -> str:
    """Send one inline command and return the reply's text; errors begin with `-`, as on the wire.

    Raises `OSError` if nobody answers there within `timeout` s; `ConnectionError` if the server
    hangs up before it has answered.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(str(socket_path))
        connection.sendall(command.encode() + b"\r\n")
        with connection.makefile("rb") as reply:
            head = reply.readline()
            if not head.endswith(b"\r\n"):
                raise ConnectionError(f"{socket_path} hung up")
            if head.startswith(b"$"):
                return reply.read(int(head[1:])).decode(errors="replace")
            return head.rstrip().decode(errors="replace").removeprefix("+")


def quoted(path: Path) -> str:
    """A path as the server's configuration file wants it: any byte may occur in it."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in os.fsencode(path)) + '"'


def take_lock(path: Path) -> int | None:
    """The descriptor of the locked file, or None if another process has it."""
    import fcntl  # not on Windows, where this module can still be imported

    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    for _ in range(10):  # a client that looks whether the lock is free holds it for an instant
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        else:
            return lock
    return None


def end_with_parent() -> None:
    """Ask Linux to send SIGTERM to this process when its parent dies, even by `kill -9`."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Supervisor:
    """One server process and what is known of its use."""

    def __init__(self, folder: Path, socket_path: Path, lock: int) -> None:
        self.folder = folder
        self.socket_path = socket_path
        self.hidden_path = socket_path.with_suffix(".gone")  # no longer than it
        self.lock = lock
        self.server = 0
        self.status: int | None = None
        self.told_to_end = False
        self.connections = 0
        self.unsaved = True
        # A signal only wakes the wait below: no work is done inside a handler.
        self.wake, wake_writer = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(wake_writer, False)
        signal.set_wakeup_fd(wake_writer)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.end_soon)

    def end_soon(self, number: int, frame: object) -> None:
        self.told_to_end = True

    def start(self, binary: str, max_bytes: int) -> None:
        config = SERVER_CONFIG.format(
            socket=quoted(self.socket_path),
            folder=quoted(self.folder),
            snapshot=SNAPSHOT,
            max_bytes=max_bytes,
        )
        for leftover in self.folder.glob("temp-*.rdb"):  # of a snapshot that was cut short
            leftover.unlink(missing_ok=True)
        self.hidden_path.unlink(missing_ok=True)
        self.status = None
        # Through a pipe, which holds it whole: a full disk keeps no server from starting.
        reader, writer = os.pipe()
        os.write(writer, config.encode())
        os.close(writer)
        parent = os.getpid()
        self.server = os.fork()
        if self.server == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                end_with_parent()
                os.set_inheritable(self.lock, True)
                os.dup2(reader, 0)
                if os.getppid() == parent:
                    os.execv(binary, [binary, "-"])
            finally:
                os._exit(127)  # reached only where the server could not be executed
        os.close(reader)

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.server, os.WNOHANG)
            if pid:
                self.status = status
        return self.status is None

    def wait(self, seconds: float) -> None:
        """Sleep, but wake for a signal: the server's end, or a wish to end it."""
        select.select([self.wake], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake, 512)

    def end(self) -> None:
        """Let the server leave, with its content saved; wait for it."""
        if self.running():
            # A snapshot of gigabytes is not written again if nothing has changed since.
            os.kill(self.server, signal.SIGTERM if self.unsaved else signal.SIGINT)
        while self.running():
            self.wait(1.0)

    def came_up(self) -> bool:
        """Wait until the server has loaded its snapshot. False if it failed on the way."""
        deadline = time.monotonic() + BIND_SECONDS
        while self.running() and not self.told_to_end:
            with contextlib.suppress(OSError):
                if ask(self.socket_path, "PING") == "PONG":
                    return True
            if time.monotonic() > deadline and self.lost():
                return True  # somebody has removed the socket: for `watch` to end
            self.wait(0.02)
        # A client may have been quicker, and have told the server to leave: that is no failure.
        return self.told_to_end or self.status == 0

    def start_from_snapshot(self, binary: str, max_bytes: int) -> bool:
        """Start the server; if its snapshot kills it, start it empty. False if neither works."""
        for _ in range(2):  # one that was killed is no proof against its snapshot
            self.start(binary, max_bytes)
            if self.came_up():
                return True
        snapshot = self.folder / SNAPSHOT
        aside = self.folder / (SNAPSHOT + ".corrupt")
        if not snapshot.exists():
            return False
        print(f"chunkcache: no start with {snapshot}; moved to {aside}", flush=True)
        snapshot.replace(aside)
        self.start(binary, max_bytes)
        if self.came_up():
            return True
        aside.replace(snapshot)  # an empty server dies too: the snapshot was not the cause
        return False

    def in_use(self) -> bool:
        """Whether a client is connected, or was since the last look."""
        try:
            reply = ask(self.socket_path, "INFO clients stats persistence", timeout=10.0)
        except OSError:
            return True  # busy beyond measure, or going: not idle in either case
        fields = dict(line.split(":", 1) for line in reply.splitlines() if ":" in line)
        if "total_connections_received" not in fields:
            return True  # an error, such as too many clients
        self.unsaved = fields.get("rdb_changes_since_last_save") != "0"
        connections = int(fields["total_connections_received"])
        came, self.connections = connections - self.connections, connections
        return int(fields["connected_clients"]) > 1 or came > 1  # one is this question's own

    def ended_unseen(self) -> bool:
        """End an idle server, unless a client slips in: a client never meets a closing server.

        The socket is renamed away first, so that nobody new can come; whoever came before that has
        been accepted by the time the server answers once more.
        """
        with contextlib.suppress(OSError):
            self.socket_path.replace(self.hidden_path)
            self.socket_path, shown = self.hidden_path, self.socket_path
            used = self.in_use()
            self.socket_path = shown
            if used:
                self.hidden_path.replace(self.socket_path)
                return False
        self.end()
        return True

    def lost(self) -> bool:
        """Whether the folder or the socket was removed, so that no client can come any more."""
        try:
            same = os.path.samestat((self.folder / LOCK).stat(), os.fstat(self.lock))
        except OSError:
            same = False
        if not same:
            # Another server may be at this path by now; a server that leaves in peace would
            # remove that one's socket and overwrite its snapshot.
            os.kill(self.server, signal.SIGKILL)
        return not same or not self.socket_path.exists()

    def watch(self, idle_seconds: float) -> None:
        """Return when the server is gone: idle for too long, told to end, or dead."""
        pause = min(max(idle_seconds / 10, 0.05), 2.0)
        last_use = time.monotonic()
        while self.running():
            if not self.told_to_end:
                self.wait(pause)
            if self.told_to_end or self.lost():
                self.unsaved = True  # not known for the moment
                self.end()
            elif self.in_use():
                last_use = time.monotonic()
            elif time.monotonic() - last_use >= idle_seconds and self.ended_unseen():
                break
        self.hidden_path.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    folder, socket_path, binary = Path(arguments[0]), Path(arguments[1]), arguments[2]
    max_bytes, idle_seconds = int(arguments[3]), float(arguments[4])
    os.umask(0o077)
    lock = take_lock(folder / LOCK)
    if lock is None:
        return LOCKED
    private_folder(socket_path.parent)
    if os.fork():
        return 0  # the client waits for this process only; the next one has no parent to leave
    if os.fstat(1).st_size > LOG_BYTES:
        os.ftruncate(1, 0)
    supervisor = Supervisor(folder, socket_path, lock)
    if supervisor.start_from_snapshot(binary, max_bytes):
        supervisor.watch(idle_seconds)
    if socket_path.parent != folder:
        with contextlib.suppress(OSError):
            socket_path.parent.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
