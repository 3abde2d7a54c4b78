"""Chunks as files: one `.safetensors` file and one `.json` file each, read through memory maps.

    FOLDER/3f/9c41d2e8-safetensors@org%2Fname@1@0@….safetensors
    FOLDER/3f/9c41d2e8-safetensors@org%2Fname@1@0@….json
    FOLDER/tmp/…                                      files being written

Several processes may share the folder, and nothing is ever changed in place: a file is written
under `tmp` and renamed, so that a reader, and a map already open, sees the old file or the new one.
There are no locks, so a process that forks or is killed leaves none behind.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from chunkcache.errors import SettingError, StoreError
from chunkcache.stores.base import ChunkStore, Entry, merged

BLOB = ".safetensors"
METADATA = ".json"
NAME_BYTES = 255  # the longest file name that common file systems take
TOUCH_SECONDS = 60.0  # how exactly the order of use is kept
STALE_SECONDS = 3600.0  # a file under tmp this old was left by a process that died
KEEP = 0.9  # share of the budget that is still full after an eviction
FOLDER = re.compile("[0-9a-f]{2}")
STEM = re.compile("[0-9a-f]{8}-.*|[0-9a-f]{64}")  # other files are not ours to evict

MENDS = {
    errno.ENOSPC: "free some space, or lower max_bytes",
    errno.EDQUOT: "free some of the quota, or lower max_bytes",
    errno.EROFS: "choose a folder on a writable file system",
    errno.EACCES: "choose a folder that this user may read and write",
    errno.EPERM: "choose a folder that this user may read and write",
}


def stem_of(key: str) -> str:
    """The path of a key's files inside the store, without their suffix.

    The digits of the key's hash spread the files over 256 folders, and keep apart keys that differ
    only in case where the file system does not. What follows is the key, legal on every system:
    bytes other than letters, digits and `@%._=+-` are written `~` and two hex digits. A key too
    long for a file name is named by its full hash; its text is in the JSON.
    """
    raw = key.encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(raw).hexdigest()
    text = re.sub(rb"[^A-Za-z0-9@%._=+-]", lambda byte: b"~%02x" % byte[0][0], raw).decode()
    name = f"{digest[2:10]}-{text}"
    return f"{digest[:2]}/{name if len(name) + len(BLOB) <= NAME_BYTES else digest}"


def key_of(name: str) -> str | None:
    """The key whose file has this name without suffix; None if only the JSON tells."""
    _, dash, text = name.partition("-")
    if not dash:
        return None
    raw = re.sub(rb"~([0-9a-f]{2})", lambda code: bytes([int(code[1], 16)]), text.encode())
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:  # no name that `stem_of` has made
        return None


class DiskStore(ChunkStore):
    """Keeps chunks in files under `path`, which is made when first written to.

    With `max_bytes`, the files' bytes stay below it: the entries least recently used leave first.
    Processes that share the folder may each exceed it by a tenth for a while. Nothing is synced: a
    crash of the machine may lose or damage the last chunks, which their checksums show.

    Raises `SettingError` if `path` is something else than a folder, or `max_bytes` is below 1.
    """

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        self.path = Path(path).expanduser().absolute()
        self.max_bytes = max_bytes
        # How many bytes may be written before the folder is looked at again. Unlocked: what a race
        # between threads makes of it is mended by the next look.
        self._room = 0
        self._swept = False
        if max_bytes is not None and max_bytes < 1:
            raise SettingError(f"max_bytes={max_bytes}: must be at least 1, or None for no limit")
        with contextlib.suppress(OSError):
            if self.path.exists() and not self.path.is_dir():
                raise SettingError(f"file store {self.path}: exists and is not a folder")

    def sizes(self, keys: Sequence[str]) -> list[int]:
        with self._errors("look up"):
            return [self._size(self._file(key, BLOB)) for key in keys]

    def read(self, keys: Sequence[str]) -> Iterator[memoryview | None]:
        for key in keys:
            with self._errors("read"):
                mapped = self._map(self._file(key, BLOB))
            if mapped is None:
                yield None
                continue
            view = memoryview(mapped)
            try:
                yield view
            finally:
                # Refused while the reader holds a view of this view; then it goes with that one.
                with contextlib.suppress(BufferError):
                    view.release()
                    mapped.close()
                del view, mapped

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        with self._errors("read"):
            return [self._metadata(key) for key in keys]

    def write(self, entries: Sequence[Entry]) -> int:
        taken = 0
        if not self._swept:
            self._sweep()
        with self._errors("write"):
            for given in entries:
                entry = merged(given, self._metadata(given.key) or {}) if given.merge else given
                text = json.dumps({"key": entry.key, "metadata": dict(entry.metadata)}, indent=1)
                if not self._make_room(entry.nbytes + len(text)):
                    continue
                if entry.nbytes:
                    self._put(self._file(entry.key, BLOB), entry.blob)
                else:
                    self._file(entry.key, BLOB).unlink(missing_ok=True)
                self._put(self._file(entry.key, METADATA), text.encode())
                taken += entry.nbytes
        return taken

    def delete(self, keys: Sequence[str]) -> int:
        with self._errors("delete"):
            return sum(self._remove(self.path / stem_of(key)) for key in keys)

    def keys(self) -> Iterator[str]:
        """Yield the keys of all entries, in no order. Raises `StoreError`."""
        with self._errors("list"):
            stems = self._scan()
        for stem in stems:
            key: object = key_of(stem.name)
            if key is None:
                with self._errors("list"):
                    key = self._json(Path(f"{stem}{METADATA}")).get("key")
            if isinstance(key, str):
                yield key

    @contextlib.contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            mend = MENDS.get(error.errno or 0)
            raise StoreError(
                f"file store {self.path}: cannot {action}: {error}" + (f"; {mend}" if mend else "")
            ) from error

    def _file(self, key: str, suffix: str) -> Path:
        return self.path / (stem_of(key) + suffix)

    @staticmethod
    def _size(file: Path) -> int:
        try:
            return file.stat().st_size
        except FileNotFoundError:
            return 0

    @staticmethod
    def _map(file: Path) -> mmap.mmap | None:
        try:
            descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            return None
        try:
            found = os.fstat(descriptor)
            if found.st_size == 0:  # no blob has no bytes; a crash of the machine can leave this
                return None
            if time.time() - found.st_mtime > TOUCH_SECONDS:
                with contextlib.suppress(OSError):  # a folder that may only be read serves too
                    os.utime(file)
            return mmap.mmap(descriptor, found.st_size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)

    def _metadata(self, key: str) -> dict[str, str] | None:
        found = self._json(self._file(key, METADATA)).get("metadata")
        if not isinstance(found, dict):
            return None
        return {str(name): str(value) for name, value in found.items()}

    @staticmethod
    def _json(file: Path) -> dict[str, object]:
        """What the file holds; nothing if it is not there, or damaged by a crash of the machine."""
        try:
            found = json.loads(file.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _put(self, file: Path, content: bytes | memoryview) -> None:
        scratch = self.path / "tmp"
        try:
            descriptor, name = tempfile.mkstemp(dir=scratch)
        except FileNotFoundError:
            self._make_folder(scratch)
            descriptor, name = tempfile.mkstemp(dir=scratch)
        try:
            with os.fdopen(descriptor, "wb") as temporary:
                temporary.write(content)
            try:
                os.replace(name, file)
            except FileNotFoundError:
                self._make_folder(file.parent)
                os.replace(name, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _make_folder(self, folder: Path) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)

    @staticmethod
    def _remove(stem: Path) -> bool:
        """Remove both halves of an entry; whether there was one."""
        there = False
        for suffix in (BLOB, METADATA):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{stem}{suffix}")
                there = True
        return there

    def _make_room(self, nbytes: int) -> bool:
        """Evict what must leave for `nbytes` more; False if they exceed the budget on their own."""
        if self.max_bytes is None:
            return True
        if nbytes > self.max_bytes:
            return False
        self._room -= nbytes
        if self._room >= 0:
            return True
        found = self._scan()
        used = sum(size for _, size in found.values()) + nbytes
        if used > self.max_bytes:
            for stem in sorted(found, key=lambda stem: found[stem][0]):
                if used <= KEEP * self.max_bytes:
                    break
                self._remove(stem)
                used -= found[stem][1]
        # Others may fill the folder meanwhile: look again after a tenth of the budget at most.
        self._room = min(self.max_bytes - used, self.max_bytes // 10)
        return True

    def _scan(self) -> dict[Path, tuple[float, int]]:
        """Each entry's stem, with the time of its last use and its bytes."""
        found: dict[Path, tuple[float, int]] = {}
        for folder in self._list(self.path):
            if not FOLDER.fullmatch(folder.name):
                continue
            for file in self._list(Path(folder)):
                name, suffix = os.path.splitext(file.name)
                if suffix not in (BLOB, METADATA) or not STEM.fullmatch(name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat()
                    stem = Path(folder, name)
                    used, size = found.get(stem, (0.0, 0))
                    found[stem] = (max(used, status.st_mtime), size + status.st_size)
        return found

    @staticmethod
    def _list(folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _sweep(self) -> None:
        """Remove what processes left behind that died while they wrote."""
        self._swept = True
        with contextlib.suppress(OSError):
            for file in self._list(self.path / "tmp"):
                if time.time() - file.stat().st_mtime > STALE_SECONDS:
                    os.unlink(file.path)
