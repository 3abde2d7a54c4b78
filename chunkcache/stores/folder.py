"""A folder of entries, each a `.safetensors` file and a `.json` file.

    FOLDER/3f/9c41d2e8-safetensors@org%2Fname@1@0@….safetensors
    FOLDER/3f/9c41d2e8-safetensors@org%2Fname@1@0@….json
    FOLDER/tmp/…                                      files being written

Several processes may share the folder, and nothing is ever changed in place: a file is written
under `tmp` and renamed, so that a reader sees the old file or the new one. There are no locks, so a
process that forks or is killed leaves none behind.

A blob's modification time is that of its last use. Files of pinned entries are write-protected.

What is written is for this user only, unless the folder was made for a group: if the group may
write to it, and it hands its group on (`chmod g+rwxs`), the group may read and write what the umask
lets it. Files of any other name are left alone, whatever folder is named.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chunkcache.stores.base import nbytes_of

BLOB = ".safetensors"
METADATA = ".json"
NAME_BYTES = 255  # the longest file name that common file systems take
FOLDER = re.compile("[0-9a-f]{2}")
STEM = re.compile("[0-9a-f]{8}-.*|[0-9a-f]{64}")
SCRATCH = re.compile("chunkcache-[0-9a-f]{16}")  # a file being written
SHARED = stat.S_IWGRP | stat.S_ISGID  # the mode of a folder that was made for a group


def stem_of(key: str) -> str:
    """The path of a key's files inside the folder, without their suffix.

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


def is_stem(folder: str, name: str) -> bool:
    """Whether a file without its suffix has a name by `stem_of`: others are not ours to evict."""
    if not STEM.fullmatch(name):
        return False
    if "-" not in name:
        return name.startswith(folder)
    key = key_of(name)
    if key is None:
        return False
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    return digest.startswith(folder + name[:8])


@dataclass(slots=True)
class Found:
    """What a folder's listing tells of an entry.

    Attributes:
        used: When it was last used, in nanoseconds since the epoch.
        renewed: When its JSON was written or touched; 0 if it has none.
        nbytes: Bytes of both files.
        blob: Bytes of the blob alone.
        pinned: Whether it is to be kept.
    """

    used: int = 0
    renewed: float = 0.0
    nbytes: int = 0
    blob: int = 0
    pinned: bool = False


class Folder:
    """The files under `path`, which is made when first written to. Methods raise OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, key: str, suffix: str) -> Path:
        """Where a half of an entry is, or would be."""
        return self.path / (stem_of(key) + suffix)

    def status(self, key: str, suffix: str) -> os.stat_result | None:
        """What the file system knows of a half of an entry."""
        try:
            return self.file(key, suffix).stat()
        except FileNotFoundError:
            return None

    def read(self, key: str, start: int, place: Sequence[memoryview]) -> bool:
        """Fill the views with an entry's blob from a byte on; whether it is there, and so long."""
        with contextlib.suppress(FileNotFoundError), open(self.file(key, BLOB), "rb", 0) as file:
            # No blob has no bytes; a crash of the machine can leave this.
            if os.fstat(file.fileno()).st_size < max(start + nbytes_of(place), 1):
                return False
            file.seek(start)
            for view in place:
                at = 0
                while at < view.nbytes:  # the kernel reads 2 GB at once
                    count = file.readinto(view[at:])
                    if not count:
                        return False
                    at += count
            return True
        return False

    def json(self, file: Path) -> dict[str, object]:
        """What the file holds; nothing if it is not there, or damaged by a crash of the machine."""
        try:
            found = json.loads(file.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def touch(self, key: str, suffix: str, seconds: float, used: int | None = None) -> None:
        """Note that a file is used, if its last use was noted more than `seconds` before that.

        `used` is the time, in nanoseconds since the epoch (default: now).
        """
        with contextlib.suppress(OSError):  # a folder that may only be read serves too
            file = self.file(key, suffix)
            time_used = time.time_ns() if used is None else used
            if time_used - file.stat().st_mtime_ns > 1e9 * seconds:
                try:
                    os.utime(file, ns=(time_used, time_used))
                except PermissionError:  # of another user in the group: all we may set is now
                    os.utime(file)

    def put(
        self, file: Path, content: bytes | memoryview, pinned: bool, used: int | None = None
    ) -> None:
        """Write a file whole or not at all. `used` is as in `touch`."""
        scratch = self.path / "tmp" / f"chunkcache-{secrets.token_hex(8)}"
        try:
            descriptor = self._create(scratch)
        except FileNotFoundError:
            self._make(scratch.parent)
            descriptor = self._create(scratch)
        try:
            with os.fdopen(descriptor, "wb") as temporary:
                temporary.write(content)
                mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            if used is not None:
                os.utime(scratch, ns=(used, used))
            if pinned:
                os.chmod(scratch, mode & ~0o222)
            try:
                os.replace(scratch, file)
            except FileNotFoundError:
                self._make(file.parent)
                os.replace(scratch, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise

    def remove(self, stem: Path) -> bool:
        """Remove both halves of an entry; whether there was one."""
        there = False
        for suffix in (BLOB, METADATA):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{stem}{suffix}")
                there = True
        return there

    def scan(self) -> dict[Path, Found]:
        """All entries, by the path of their files without suffix."""
        entries: dict[Path, Found] = {}
        for folder in _list(self.path):
            if not FOLDER.fullmatch(folder.name):
                continue
            for file in _list(Path(folder)):
                name, suffix = os.path.splitext(file.name)
                stem = Path(folder, name)
                if suffix not in (BLOB, METADATA):
                    continue
                if stem not in entries and not is_stem(folder.name, name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat()
                    found = entries.setdefault(stem, Found())
                    if suffix == BLOB or not found.blob:
                        found.used = status.st_mtime_ns
                    found.nbytes += status.st_size
                    found.pinned |= is_pinned(status)
                    if suffix == METADATA:
                        found.renewed = status.st_mtime
                    else:
                        found.blob = status.st_size
        return entries

    def is_as(self, stem: Path, found: Found) -> bool:
        """Whether an entry is there and was not used since it was found."""
        try:
            return os.stat(f"{stem}{BLOB if found.blob else METADATA}").st_mtime_ns == found.used
        except FileNotFoundError:
            return False

    def sweep(self, seconds: float) -> None:
        """Remove what processes left behind that died while they wrote, `seconds` ago or more."""
        for file in _list(self.path / "tmp"):
            if not SCRATCH.fullmatch(file.name):
                continue
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > seconds:
                    os.unlink(file.path)

    def _make(self, folder: Path) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700 | self._for_group(), exist_ok=True)

    def _create(self, file: Path) -> int:
        """A new file, open for writing. The umask may take from the group what the folder gives."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        return os.open(file, flags, 0o600 | self._for_group() & 0o060)

    def _for_group(self) -> int:
        """What the group may do, at most, with what is written."""
        return 0o070 if self.path.stat().st_mode & SHARED == SHARED else 0


def is_pinned(status: os.stat_result) -> bool:
    """Whether a file is that of a pinned entry."""
    return not status.st_mode & stat.S_IWUSR


def _list(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
