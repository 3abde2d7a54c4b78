"""Chunks as files in a folder, within a budget and a time to live."""

from __future__ import annotations

import contextlib
import errno
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

from chunkcache.errors import SettingError, StoreError
from chunkcache.stores.base import (
    ChunkStore,
    Entry,
    Listed,
    Part,
    chunk_of,
    described,
    merged,
    with_extras,
)
from chunkcache.stores.eviction import leaving
from chunkcache.stores.folder import BLOB, METADATA, Folder, Found, is_pinned, key_of, stem_of

TOUCH_SECONDS = 60.0  # how exactly times of use are kept that nothing is evicted by
TOGETHER_SECONDS = 1.0  # from a use to the next one that is noted of what stands before a chunk
DEEPER = 1000  # nanoseconds by which a chunk was used before the one before it
LOOK_SECONDS = 1.0  # a look at the folder that is older than this is no reason to refuse anything
STALE_SECONDS = 3600.0  # a file under tmp this old was left by a process that died
PAGE = 1000  # entries of a listing that are read before the first is handed out

NOT_ALLOWED = (
    "choose a folder that this user may read and write; one for a group needs chmod g+rwxs before "
    "anything is written, and umask 002 of all who write"
)
REMEDIES = {
    errno.ENOSPC: "free some space, or lower bytes= in the store's URL",
    errno.EDQUOT: "free some of the quota, or lower bytes= in the store's URL",
    errno.EROFS: "choose a folder on a writable file system",
    errno.EACCES: NOT_ALLOWED,
    errno.EPERM: NOT_ALLOWED,
}


class DiskStore(ChunkStore):
    """Keeps chunks in files under `path`, which is made when first written to.

    With `max_bytes`, the files' bytes stay below it: entries leave in the order of `eviction.py`,
    and pinned ones only for other pinned ones. Processes that share the folder may each exceed it
    by a tenth for a while. Entries that are not pinned are gone `ttl` seconds (0: never) after
    they were written or, with `refresh_ttl`, last read; each process applies its own `ttl`.
    Nothing is synced: a crash of the machine may lose or damage the last chunks, which their
    checksums show.

    Raises `SettingError` if `path` is something else than a folder, or `max_bytes` is below 1.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int | None = None,
        *,
        ttl: float = 0,
        refresh_ttl: bool = True,
    ) -> None:
        try:
            self.path = Path(path).expanduser().absolute()
        except RuntimeError as error:  # ~ without a home folder
            raise SettingError(f"file store {path}: {error}; name the whole path") from None
        self.max_bytes = self.largest = max_bytes
        self._folder = Folder(self.path)
        self._ttl = ttl
        self._refresh = refresh_ttl
        self._touch_seconds = min(TOUCH_SECONDS, ttl / 10) if ttl else TOUCH_SECONDS
        self._blob_seconds = TOUCH_SECONDS if max_bytes is None else 0.0
        # What the last look at the folder has shown, and how many bytes may be written before the
        # next. Unlocked: what a race between threads makes of it is put right by that one.
        self._ranked: list[tuple[Path, Found]] = []  # who leaves first is last
        self._room = self._until_look = 0
        self._looked = -LOOK_SECONDS
        self._swept: float | None = None
        if max_bytes is not None and max_bytes < 1:
            raise SettingError(f"max_bytes={max_bytes}: must be at least 1, or None for no limit")
        with contextlib.suppress(OSError):
            if self.path.exists() and not self.path.is_dir():
                raise SettingError(
                    f"file store {self.path}: exists and is not a folder; name another with "
                    "file:///path"
                )

    def __repr__(self) -> str:
        return f"DiskStore({str(self.path)!r})"

    def sizes(self, keys: Sequence[str]) -> list[int]:
        with self._errors("look up"):
            return [self._size(key) for key in keys]

    def fetch(self, parts: Sequence[Part]) -> Generator[bool]:
        self._use(list(dict.fromkeys(part.key for part in parts)))
        for part in parts:
            with self._errors("read"):
                there = self._is_young(part.key) and self._folder.read(*part)
            if there and self._ttl and self._refresh:
                self._folder.touch(part.key, METADATA, self._touch_seconds)
            yield there

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        with self._errors("read"):
            found = [self._metadata(key) for key in keys]
        for key, fields in zip(keys, found, strict=True):
            if fields is not None and self._refresh:
                self._folder.touch(key, METADATA, self._touch_seconds)
        return found

    def write(self, entries: Sequence[Entry]) -> int:
        self._sweep()
        with self._errors("write"):
            taken = [entry for entry in described(entries) if self._put(entry)]
        return self._took(taken)

    def delete(self, keys: Sequence[str]) -> int:
        with self._errors("delete"):
            remove = self._folder.remove
            gone = {key for key in with_extras(keys) if remove(self._folder.file(key, ""))}
        return len(gone.intersection(keys))

    def scan(self, prefix: str = "") -> Iterator[list[Listed]]:
        with self._errors("list"):
            found = {s: each for s, each in self._folder.scan().items() if not self._is_old(each)}
        blobs = {stem.name: each.blob for stem, each in found.items()}
        names = {stem: key_of(stem.name) for stem in found}
        stems = [stem for stem, key in names.items() if key is None or key.startswith(prefix)]
        for at in range(0, len(stems), PAGE):
            with self._errors("list"):
                page = [
                    entry
                    for stem in stems[at : at + PAGE]
                    if (entry := self._listed(stem, names[stem], blobs))
                    and entry.key.startswith(prefix)
                ]
            if page:
                yield page

    @contextlib.contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = REMEDIES.get(error.errno or 0)
            raise StoreError(
                f"file store {self.path}: cannot {action}: {error}"
                + (f"; {remedy}" if remedy else ""),
                "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "disk",
            ) from error

    def _size(self, key: str) -> int:
        status = self._folder.status(key, BLOB)
        return status.st_size if status and self._is_young(key) else 0

    def _metadata(self, key: str) -> dict[str, str] | None:
        if not self._is_young(key):
            return None
        return _fields(self._folder.json(self._folder.file(key, METADATA)))

    def _listed(self, stem: Path, key: str | None, blobs: Mapping[str, int]) -> Listed | None:
        text = self._folder.json(Path(f"{stem}{METADATA}"))
        name = key or text.get("key")  # names of files have bounds, which keys have not
        if not isinstance(name, str):
            return None
        chunk = chunk_of(name)
        files = [stem_of(each).rpartition("/")[2] for each in with_extras([chunk])]
        if next((file for file in files if file in blobs), None) != stem.name:
            return None  # told of with the first value of its chunk that is there
        fields = _fields(text) if name == chunk else None
        return Listed(chunk, fields or None, *(blobs.get(file, 0) for file in files))

    def _is_young(self, key: str) -> bool:
        """Whether an entry has not expired: its JSON is as old as the entry."""
        if not self._ttl:
            return True
        status = self._folder.status(key, METADATA)
        if status is None:
            return False
        return is_pinned(status) or time.time() - status.st_mtime <= self._ttl

    def _is_old(self, found: Found) -> bool:
        """The same of an entry in a listing."""
        return bool(self._ttl) and not found.pinned and time.time() - found.renewed > self._ttl

    def _put(self, given: Entry) -> bool:
        entry = merged(given, self._there(given.key)) if given.merge else given
        text = json.dumps({"key": entry.key, "metadata": dict(entry.metadata)}, indent=1)
        used = self._time_of_use(entry.before)
        if not self._make_room(entry.nbytes + len(text), entry.pinned, used):
            return False
        if entry.nbytes:
            self._folder.put(self._folder.file(entry.key, BLOB), entry.blob, entry.pinned, used)
        elif not given.merge:
            self._folder.file(entry.key, BLOB).unlink(missing_ok=True)
        self._folder.put(self._folder.file(entry.key, METADATA), text.encode(), entry.pinned)
        return True

    def _there(self, key: str) -> Entry | None:
        """What a merge adds to, without the blob, which stays where it is."""
        status = self._folder.status(key, METADATA)
        if status is None:
            return None
        return Entry(key, self._metadata(key) or {}, memoryview(b""), pinned=is_pinned(status))

    def _use(self, keys: Sequence[str]) -> None:
        """Note that these are used together, each as if a little before the one before it."""
        now = time.time_ns()
        for number in reversed(range(len(keys))):  # files of other users get the time as it is
            self._folder.touch(keys[number], BLOB, self._blob_seconds, now - number * DEEPER)

    def _time_of_use(self, before: Sequence[str]) -> int:
        """When a new chunk is used: together with those before it."""
        now = time.time_ns()
        if before and self.max_bytes is not None:
            first = self._folder.status(before[0], BLOB)
            if first and now - first.st_mtime_ns < 1e9 * TOGETHER_SECONDS:
                now = first.st_mtime_ns
            else:
                self._use(before)
        return now - len(before) * DEEPER

    def _make_room(self, nbytes: int, pinned: bool, used: int) -> bool:
        """Evict what must leave for `nbytes` used at a time; False if they would leave first."""
        if self.max_bytes is None:
            return True
        if nbytes > self.max_bytes:
            return False
        if nbytes > self._until_look:
            self._look()
        done = self._evict(nbytes - self._room, pinned, used)
        is_old = time.monotonic() - self._looked > LOOK_SECONDS
        if not done and (is_old or self._until_look < self.max_bytes // 10):
            self._look()
            done = self._evict(nbytes - self._room, pinned, used)
        if done:
            self._room -= nbytes
            self._until_look -= nbytes
        return done

    def _look(self) -> None:
        """Take stock of the folder: others may have filled it."""
        assert self.max_bytes is not None
        found = self._folder.scan()
        self._ranked = sorted(
            found.items(), key=lambda item: (item[1].pinned, item[1].used), reverse=True
        )
        self._room = self.max_bytes - sum(each.nbytes for each in found.values())
        self._until_look = self.max_bytes // 10
        self._looked = time.monotonic()

    def _evict(self, nbytes: int, pinned: bool, used: int) -> bool:
        """Remove what leaves for an entry that lacks so many bytes; False if that is too little."""
        leave, is_enough = leaving(self._may_leave(pinned, used), nbytes)
        if not is_enough:
            self._ranked += leave[::-1]
            return False
        for stem, found in leave:
            self._folder.remove(stem)
            self._room += found.nbytes
        return True

    def _may_leave(self, pinned: bool, used: int) -> Iterator[tuple[tuple[Path, Found], int]]:
        """Take out of the ranking what leaves before an entry that is used at a time."""
        while self._ranked:
            stem, found = self._ranked.pop()
            if not pinned and (found.pinned or found.used >= used):
                self._ranked.append((stem, found))
                return
            if self._folder.is_as(stem, found):  # it was not used since the look
                yield (stem, found), found.nbytes

    def _sweep(self) -> None:
        """Now and then, remove what has expired and what dead processes have left behind."""
        now = time.monotonic()
        if self._swept is not None and now - self._swept < STALE_SECONDS:
            return
        self._swept = now
        with contextlib.suppress(OSError):
            self._folder.sweep(STALE_SECONDS)
            if self._ttl:
                for stem, found in self._folder.scan().items():
                    if self._is_old(found):
                        self._folder.remove(stem)


def _fields(text: Mapping[str, object]) -> dict[str, str] | None:
    """The metadata in what a JSON file holds."""
    found = text.get("metadata")
    if not isinstance(found, dict):
        return None
    return {str(name): str(value) for name, value in found.items()}
