"""Which server of a Redis or Valkey cluster serves which key."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import redis
from redis.cluster import parse_cluster_slots
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from chunkcache.errors import StoreError
from chunkcache.stores.address import Address
from chunkcache.stores.base import chunk_of, note_partial
from chunkcache.stores.breaker import CircuitBreaker
from chunkcache.stores.redis import RedisStore

REFRESH_SECONDS = 1.0  # between two looks for the successor of a server that fails
ELSEWHERE = (redis.exceptions.AskError, redis.exceptions.TryAgainError)

Host = tuple[str, int]


class ClusterNode(RedisStore):
    """One server of a cluster. `on_moved` is called when it says that a key's place has changed.

    A key that is elsewhere is a miss, also while its slot is on the way to another server.
    """

    def __init__(self, address: Address, on_moved: Callable[[], None], **options: Any) -> None:
        super().__init__(address, **options)
        self._on_moved = on_moved

    def primaries(self) -> dict[tuple[int, int], Host]:
        """The server of each range of slots (first, last), as this one knows them."""
        own_host = self._address.hosts[0][0]
        with self._store_errors():
            reply: Any = self._client.execute_command("CLUSTER SLOTS")
            try:
                found = parse_cluster_slots(reply, current_host=own_host)
            except (IndexError, TypeError, ValueError):
                raise redis.InvalidResponse("the reply to CLUSTER SLOTS is no table") from None
        return {slots: servers["primary"] for slots, servers in found.items()}

    def _names(self, key: str) -> tuple[bytes, bytes]:
        return super()._names(tagged(key))

    def _use(self, keys: Collection[str]) -> None:
        """Nothing: they are on all servers, which whoever knows all of them tells."""

    def _key(self, name: bytes, half: str) -> str | None:
        key = super()._key(name, half)
        if key is None:
            return None
        rest, at, chunk_hash = key.rpartition("@")
        plain = f"{rest}{at}{chunk_hash[1:-1]}"
        return plain if tagged(plain) == key else None

    def _is_miss(self, error: redis.ResponseError) -> bool:
        if isinstance(error, redis.exceptions.MovedError):
            self._on_moved()
        return isinstance(error, ELSEWHERE) or super()._is_miss(error)


def tagged(key: str) -> str:
    """The key as it stands in a cluster: the hash in braces, which alone choose the server."""
    chunk = chunk_of(key)
    rest, at, chunk_hash = chunk.rpartition("@")
    return f"{rest}{at}{{{chunk_hash}}}{key.removeprefix(chunk)}"


@dataclass(slots=True, eq=False)
class Server:
    """A primary: as it is, and behind a breaker of its own, so that it costs one time-out only.

    `failed` says whether its last call did.
    """

    node: ClusterNode
    breaker: CircuitBreaker
    failed: bool = False


class Topology:
    """The primaries of a cluster, and the slots that they serve.

    `address` names some of the servers; `max_delay` (seconds) is how long a server's answer to a
    lookup may take; `options` are those of `RedisStore`. Nothing connects
    before the first use. All methods may be called from several threads. Raises SettingError for
    an option that cannot work.

    Attributes:
        primaries: The servers that have slots, as far as is known.
        moved: Whether a server has said that a key's place has changed.
    """

    def __init__(self, address: Address, max_delay: float, **options: Any) -> None:
        self.primaries: frozenset[Server] = frozenset()
        self.moved = False
        self._address = address
        self._max_delay = max_delay
        self._options = options
        self._met: dict[Host, Server] = {}
        self._owners: list[Server | None] = []  # of each slot
        self._refreshed_at = 0.0
        for host in address.hosts:
            self._server(host)

    def share_out(self, keys: Sequence[str]) -> dict[Server, list[int]]:
        """The positions in `keys` of what each server has.

        Raises:
            StoreError: No server is known, and none of those named says which there are.
        """
        if not keys:
            return {}
        if not self._owners:
            self.refresh()
        elif self.failing and time.monotonic() > self._refreshed_at + REFRESH_SECONDS:
            with suppress(StoreError):  # the others go on
                self.refresh()
        owners = self._owners
        shares: dict[Server, list[int]] = {}
        for at, key in enumerate(keys):
            owner = owners[key_slot(tagged(key).encode(errors="surrogatepass"))]
            if owner is not None:
                shares.setdefault(owner, []).append(at)
        if sum(len(share) for share in shares.values()) < len(keys):
            note_partial(
                StoreError(
                    f"store {self._address.label}: nobody serves a part of the slots; "
                    "run redis-cli --cluster check on one of the servers"
                )
            )
        return shares

    def refresh(self) -> None:
        """Ask one server after the other which slots are whose, until one answers.

        Raises:
            StoreError: None has answered within two times `read_timeout`.
        """
        asked_at = time.monotonic()
        self.moved = False  # before asking: what moves from now on counts
        failing = {server.node for server in self.failing}
        met = self._met.copy().values()
        errors: list[StoreError] = []
        for node in sorted((server.node for server in met), key=failing.__contains__):
            if errors and time.monotonic() > asked_at + self._address.read_timeout:
                break
            try:
                found = node.primaries()
            except StoreError as error:
                errors.append(error)
                continue
            self._settle(found)
            return
        self._refreshed_at = time.monotonic()
        raise errors[0]

    @property
    def failing(self) -> set[Server]:
        """The primaries whose last call failed."""
        return {server for server in self.primaries if server.failed}

    def note(self, asked: Iterable[Server], failed: Container[Server]) -> None:
        """Note which servers a call has asked, and which of them failed."""
        for server in asked:
            server.failed = server in failed

    def note_move(self) -> None:
        """Note that a key's place has changed."""
        self.moved = True

    def close(self) -> None:
        """Let go of all connections."""
        for server in list(self._met.values()):
            server.node.close()

    def _settle(self, found: dict[tuple[int, int], Host]) -> None:
        owners: list[Server | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for (first, last), host in found.items():
            owners[first : last + 1] = [self._server(host)] * (last + 1 - first)
        self.primaries = frozenset(owner for owner in owners if owner)
        # Those named stay: after a time of trouble they may be all that can be reached.
        named = set(self._address.hosts)
        self._met = {h: s for h, s in self._met.items() if s in self.primaries or h in named}
        self._refreshed_at = time.monotonic()
        self._owners = owners  # last, as it says that all is known

    def _server(self, host: Host) -> Server:
        if host not in self._met:
            node = ClusterNode(self._address.at(*host), self.note_move, **self._options)
            server = Server(node, CircuitBreaker(node, max_delay=self._max_delay))
            return self._met.setdefault(host, server)
        return self._met[host]
