"""Where chunks are kept: `open_store` turns URLs into a store, `OPENERS` lists the schemes."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from chunkcache.errors import SettingError, StoreError
from chunkcache.stores.base import ChunkStore, Entry
from chunkcache.stores.memory import DEFAULT_BYTES, MemoryStore

if TYPE_CHECKING:
    from chunkcache.stores.redis import RedisStore

__all__ = ["ChunkStore", "Entry", "open_store", "parse_bytes"]

logger = logging.getLogger(__name__)

URL_VARIABLE = "CHUNKCACHE_URL"
FALLBACK_BYTES = 10_000_000_000  # files nobody asked for must not fill the disk
UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def open_store(
    url: str | Sequence[str] | None = None,
    *,
    connect_timeout: float = 0.25,
    read_timeout: float = 0.5,
    max_delay: float = 0.5,
    write_queue_bytes: int = 1 << 30,
    ttl: float = 0,
    refresh_ttl: bool = True,
) -> ChunkStore:
    """Open the store that `url` names, or one of several tiers, the nearest first.

    - `redis://user:password@host:6379/0`, `rediss://...` (TLS), `unix:///path/of/socket`
    - `redis+sentinel://host1:26379,host2:26379/service/0`, `rediss+sentinel://...`
    - `redis+cluster://host1:6379,host2:6379`, `rediss+cluster://...`
    - the same with `valkey` for `redis`: `valkey://`, `valkeys://`, `valkey+cluster://`
    - `memory://?bytes=2GB`: this process only
    - `file:///path?bytes=50GB`: a folder
    - `embedded://`: a server of the user's own, started when needed; `embedded:///folder?bytes=4GB`
    - `["memory://?bytes=2GB", "file:///path?bytes=50GB", "redis://host"]`: see `TieredStore`. The
      memory is shared by all stores of the process that are opened with the same list.
    - `None`: the environment variable CHUNKCACHE_URL (tiers with a space in between), else
      `embedded://`, and where that cannot run, files in the user's cache folder.

    `connect_timeout`, `read_timeout` and `max_delay` (seconds) bound what a server in trouble may
    cost: for a connection, for each answer, and for all lookups of one prompt. `write_queue_bytes`
    bounds what waits to be written, per tier. Entries are gone `ttl` seconds (0: never) after they
    were written or, with `refresh_ttl`, last read. Sizes take KB, MB, GB, KiB, MiB, GiB.

    A server that cannot be reached is no error here: its calls raise StoreError until it can.
    Raises SettingError for a URL that cannot work.
    """
    limits = _Limits(connect_timeout, read_timeout, max_delay, write_queue_bytes, ttl, refresh_ttl)
    if url is None or url == "":
        url = named_urls()
        if not url:
            return _open_default(limits)
    urls = [url] if isinstance(url, str) else list(url) if isinstance(url, Iterable) else []
    if not urls or not all(isinstance(each, str) for each in urls):
        raise SettingError(
            "store: must be a URL, or a list of one URL per tier, the nearest first, such as "
            '["memory://?bytes=2GB", "redis://localhost:6379/0"]'
        )
    return _open(urls[0], limits) if len(urls) == 1 else _open_tiers(urls, limits)


def named_urls(url: str | None = None) -> list[str]:
    """The URL given, else those that CHUNKCACHE_URL names, tier by tier; empty without either."""
    return [url] if url else os.environ.get(URL_VARIABLE, "").split()


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "2GB", "1.5 GiB" or "4096". Raises SettingError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE | re.ASCII)
    unit = UNITS.get(match[2].upper()) if match else None
    size = int(Decimal(match[1]) * unit) if match and unit else 0
    if size <= 0:
        raise SettingError(
            f"size {text!r} cannot be understood: write a number above 0 of bytes, "
            "or of KB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 2GB"
        )
    return size


@dataclass(frozen=True, slots=True)
class _Limits:
    connect_timeout: float
    read_timeout: float
    max_delay: float
    write_queue_bytes: int
    ttl: float
    refresh_ttl: bool

    def __post_init__(self) -> None:
        if not 0 <= self.ttl < math.inf:
            raise SettingError(f"ttl={self.ttl!r} must be a number of seconds, 0 for no end")
        if not self.max_delay > 0:
            raise SettingError(f"max_delay={self.max_delay!r} must be more than 0 s")


def _open(url: str, limits: _Limits) -> ChunkStore:
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")  # the URL is not quoted in messages: it may hold a password
    opener = OPENERS.get(re.sub("^valkey", "redis", parts.scheme))
    if opener is None:
        known = ", ".join(f"{scheme}://" for scheme in OPENERS)
        raise SettingError(
            f"store URL: unknown scheme {parts.scheme!r}; known are {known} "
            f"(for instance redis://localhost:6379/0 or file:///var/cache/chunks?bytes=50GB)"
        )
    return opener(url, parts, limits)


def _open_tiers(urls: list[str], limits: _Limits) -> ChunkStore:
    from chunkcache.stores.tiered import TieredStore, shared_memory

    with ExitStack() as opened:  # closes the first ones, should a later one not open
        tiers = []
        for place, url in enumerate(urls):
            tier = _open(url, limits)
            if isinstance(tier, MemoryStore):
                tier = shared_memory((place, *urls, limits.ttl, limits.refresh_ttl), tier)
            else:
                opened.enter_context(tier)
            tiers.append(tier)
        opened.pop_all()
    return TieredStore(tiers)


def _open_default(limits: _Limits) -> ChunkStore:
    from chunkcache.stores.home import own_folder

    try:
        return _embedded(None, None, limits)
    except StoreError as error:
        folder = own_folder("chunks")
        logger.warning(
            "No embedded server (%s). Chunks are kept in %s; set %s to choose another store.",
            error, folder, URL_VARIABLE,
        )  # fmt: skip
        return _files(folder, FALLBACK_BYTES, limits)


def _open_memory(url: str, parts: SplitResult, limits: _Limits) -> ChunkStore:
    if parts.netloc or parts.path.strip("/"):
        raise SettingError("memory:// store URL: takes no path; write memory://?bytes=2GB")
    size = _bytes_parameter(parts) or DEFAULT_BYTES
    return MemoryStore(size, ttl=limits.ttl, refresh_ttl=limits.refresh_ttl)


def _open_file(url: str, parts: SplitResult, limits: _Limits) -> ChunkStore:
    folder = _folder(parts)
    if folder is None:
        raise SettingError("file:// store URL: names no folder; write file:///path?bytes=50GB")
    return _files(folder, _bytes_parameter(parts), limits)


def _open_server(url: str, parts: SplitResult, limits: _Limits) -> ChunkStore:
    return _behind(_redis_store(url, limits), limits)


def _open_sentinel(url: str, parts: SplitResult, limits: _Limits) -> ChunkStore:
    from chunkcache.stores.sentinel import SentinelStore

    return _behind(SentinelStore(url, **_redis_options(limits)), limits)


def _open_cluster(url: str, parts: SplitResult, limits: _Limits) -> ChunkStore:
    from chunkcache.stores.cluster import ClusterStore

    store = ClusterStore(url, max_delay=limits.max_delay, **_redis_options(limits))
    return _behind(store, limits)


def _open_embedded(url: str, parts: SplitResult, limits: _Limits) -> ChunkStore:
    try:
        return _embedded(_folder(parts), _bytes_parameter(parts), limits)
    except StoreError as error:
        raise SettingError(
            f"embedded:// store URL: {error}; use redis://... or file:///path?bytes=50GB"
        ) from error


# A new kind of store is one opener and one line here.
OPENERS: dict[str, Callable[[str, SplitResult, _Limits], ChunkStore]] = {
    "redis": _open_server,
    "rediss": _open_server,
    "unix": _open_server,
    "redis+sentinel": _open_sentinel,
    "rediss+sentinel": _open_sentinel,
    "redis+cluster": _open_cluster,
    "rediss+cluster": _open_cluster,
    "embedded": _open_embedded,
    "file": _open_file,
    "memory": _open_memory,
}


def _redis_store(url: str, limits: _Limits) -> RedisStore:
    from chunkcache.stores.redis import RedisStore

    return RedisStore(url, **_redis_options(limits))


def _redis_options(limits: _Limits) -> dict[str, Any]:
    return {
        "connect_timeout": limits.connect_timeout,
        "read_timeout": limits.read_timeout,
        "ttl": limits.ttl,
        "refresh_ttl": limits.refresh_ttl,
    }


def _embedded(folder: Path | None, max_bytes: int | None, limits: _Limits) -> ChunkStore:
    """Raises StoreError if the server cannot run here."""
    from chunkcache.stores.embedded_store import EmbeddedStore

    store = EmbeddedStore(folder, max_bytes, **_redis_options(limits))
    # The server leaves when nobody is connected, and the first prompt may come late.
    with suppress(StoreError):
        store.connect()
    # Whether it is back costs next to nothing to find out.
    return _behind(store, limits, cooldown=1.0)


def _files(folder: Path, max_bytes: int | None, limits: _Limits) -> ChunkStore:
    from chunkcache.stores.disk import DiskStore

    try:
        store = DiskStore(folder, max_bytes, ttl=limits.ttl, refresh_ttl=limits.refresh_ttl)
        return _behind(store, limits)
    except (OSError, StoreError) as error:
        raise SettingError(
            f"file:// store: the folder {folder} cannot be used ({error}); "
            f"name another with file:///path in the store's URL or {URL_VARIABLE}"
        ) from error


def _behind(store: ChunkStore, limits: _Limits, **breaker: float) -> ChunkStore:
    """What every store outside of this process gets: a breaker, and writes behind."""
    from chunkcache.stores.breaker import CircuitBreaker
    from chunkcache.stores.writer import WriteBehind

    circuit = CircuitBreaker(store, max_delay=limits.max_delay, **breaker)
    return WriteBehind(circuit, max_bytes=limits.write_queue_bytes)


def _folder(parts: SplitResult) -> Path | None:
    """The absolute folder in a URL, None if it names none. Raises SettingError."""
    if f"{parts.netloc}{parts.path}".lstrip("/").startswith("~"):
        raise SettingError(
            f"{parts.scheme}:// store URL: ~ does not stand for the home folder in a URL: write "
            f"{parts.scheme}://{os.path.expanduser('~')}/..."
        )
    if parts.netloc not in ("", "localhost") or parts.fragment:
        raise SettingError(
            f"{parts.scheme}:// store URL: the path must be absolute, with three slashes: "
            f"{parts.scheme}:///path (and # written as %23)"
        )
    path = unquote(parts.path)
    if os.name == "nt":
        path = path.removeprefix("/")  # file:///C:/path
    if not path.strip("/"):
        return None
    folder = Path(path)
    if not folder.is_absolute():
        raise SettingError(f"{parts.scheme}:// store URL: the path {path!r} is not absolute")
    return folder


def _bytes_parameter(parts: SplitResult) -> int | None:
    """The value of `bytes=`, the only parameter of the stores without a server of the user's."""
    query = parse_qs(parts.query, keep_blank_values=True)
    if unknown := sorted(query.keys() - {"bytes"}):
        raise SettingError(
            f"{parts.scheme}:// store URL: unknown parameter {unknown[0]!r}; known are bytes"
        )
    return parse_bytes(query["bytes"][0]) if "bytes" in query else None
