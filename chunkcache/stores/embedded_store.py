"""A store on the user's embedded server, which is started again when it is gone.

It may be killed for want of memory, stopped by hand, or lose its folder, while processes that use
it live on. Whoever misses it first starts it, in the background.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import redis

from chunkcache.errors import StoreError
from chunkcache.stores import embedded
from chunkcache.stores.address import Address
from chunkcache.stores.pool import SoundPool
from chunkcache.stores.redis import CONNECT_TIMEOUT, RedisStore
from chunkcache.stores.supervisor import LOG

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # from a start that failed to the next one; doubled each time
MAX_RETRY_SECONDS = 60.0


class EmbeddedStore(RedisStore):
    """A store on the embedded server of `folder`, which is started now and whenever it is missed.

    Arguments are those of `start_embedded` and `RedisStore`. What a call waits for a server to
    come back is part of `connect_timeout`, once for all calls of the process; the start goes on
    behind it. The server comes back with what its last snapshot held.

    Raises StoreError or SettingError as `start_embedded` does.
    """

    def __init__(
        self,
        folder: Path | None = None,
        max_bytes: int | None = None,
        *,
        connect_timeout: float = CONNECT_TIMEOUT,
        **options: Any,
    ) -> None:
        self._keeper = Keeper(folder, max_bytes, connect_timeout)
        super().__init__(self._keeper.url, connect_timeout=connect_timeout, **options)

    def _pool(self, address: Address) -> redis.ConnectionPool:
        options = {**address.options, "connection_class": EmbeddedConnection}
        return SoundPool(**options, keeper=self._keeper)

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            with super()._store_errors():
                yield
        except ServerGoneError:
            raise
        except StoreError as error:
            if error.cause != "connection":
                raise
            why = str(error.__context__ or error).rstrip(".")
            loading = isinstance(error.__context__, redis.BusyLoadingError)
            raise ServerGoneError(self._keeper.miss(why, loading)) from None


class ServerGoneError(StoreError):
    """The embedded server is not there; the message says what is done about it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "connection")


class Keeper:
    """Starts the embedded server of one folder, and again whenever somebody misses it.

    Without locks: should two threads start it at once, only one of the two supervisors stays.

    Attributes:
        url: Where the server is, before and after.
        folder: Where its files are.
    """

    def __init__(self, folder: Path | None, max_bytes: int | None, patience: float) -> None:
        self.url = embedded.start_embedded(folder, max_bytes)
        self.folder = embedded.place_of(embedded.resolved(folder))
        self._max_bytes = max_bytes
        self._patience = patience
        self._starter: threading.Thread | None = None
        self._started_at = 0.0
        self._failure = ""  # of the last start
        self._failures = 0  # since the last one that went well
        self._not_before = 0.0

    def start_again(self, why: str) -> None:
        """Begin to start the server, unless that goes on already or has failed just now."""
        starter = self._starter
        if starter is not None and starter.is_alive():
            return
        # At the end of the interpreter nobody is left to use it.
        if time.monotonic() < self._not_before or not threading.main_thread().is_alive():
            return
        starter = threading.Thread(
            target=self._start, args=(why,), name="chunkcache-embedded", daemon=True
        )
        try:
            starter.start()
        except RuntimeError:  # no more threads: the next call may have one
            return
        self._started_at = time.monotonic()
        self._starter = starter

    def wait(self) -> bool:
        """Wait for a start under way, `patience` s after it began at most; whether it is done."""
        starter = self._starter
        if starter is None:
            return False
        starter.join(max(0.0, self._started_at + self._patience - time.monotonic()))
        return not starter.is_alive() and not self._failure

    def miss(self, why: str, loading: bool = False) -> str:
        """Start a server that somebody has missed because of `why`; what is to be said of it."""
        name = f"the embedded server in {self.folder}"
        if loading:
            return f"{name} is loading its snapshot, and answers when it has"
        self.start_again(why)
        if self._failure:
            return f"{name} is gone, and could not be started again: {self._failure}"
        return f"{name} is gone ({why}); it is being started again, with its last snapshot"

    def _start(self, why: str) -> None:
        if embedded.answers(Path(unquote(urlsplit(self.url).path))):
            return  # it was a connection that went, or another process was quicker
        try:
            url = embedded.start_embedded(self.folder, self._max_bytes)
            if url != self.url:
                raise StoreError(f"{self.folder} has been changed, and is left as it is")
        except Exception as error:  # whatever it is: the next start may do
            self._failure = f"{error}"
            wait = min(RETRY_SECONDS * 2**self._failures, MAX_RETRY_SECONDS)
            self._failures = min(self._failures + 1, 10)
            self._not_before = time.monotonic() + wait
            return
        self._failure, self._failures = "", 0
        logger.warning(
            "The embedded server in %s was gone (%s). It runs again, with what its last snapshot "
            "held; its log is %s.",
            self.folder, why, self.folder / LOG,
        )  # fmt: skip


class EmbeddedConnection(redis.UnixDomainSocketConnection):
    """A connection to a server that its keeper starts if nobody listens."""

    def __init__(self, *, keeper: Keeper, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._keeper = keeper

    def _connect(self) -> socket.socket:
        try:
            found = self._connect_once()
        except (FileNotFoundError, ConnectionRefusedError) as error:
            self._keeper.start_again(str(error))
            if not self._keeper.wait():
                raise
            found = self._connect_once()
        return found

    def _connect_once(self) -> socket.socket:
        """Connect to a server of this user's. Raises OSError."""
        found: socket.socket = super()._connect()  # type: ignore[no-untyped-call]
        if sys.platform == "linux":
            credentials = found.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            uid = struct.unpack("3i", credentials)[1]
            if uid != os.geteuid():
                found.close()
                raise PermissionError(f"the server at {self.path} is another user's (uid {uid})")
        return found
