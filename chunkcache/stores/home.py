"""Where this user's files go when nobody says where: the cache folder, else a temporary one."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import platformdirs

from chunkcache.errors import SettingError
from chunkcache.stores.supervisor import private_folder

logger = logging.getLogger(__name__)

REMEDY = (
    "set HOME or XDG_CACHE_HOME to a folder that this user may write to, or CHUNKCACHE_URL to "
    "another store, such as redis://localhost:6379/0 or memory://"
)
_warned: set[str] = set()


def own_folder(name: str) -> Path:
    """The folder `name` for this user's chunks: in the user's cache, or in a temporary folder.

    It is not made yet. The temporary folder is chosen where the cache cannot be written, with one
    warning, and is one that nobody else can enter.

    Raises:
        SettingError: There is no folder that this user may write to.
    """
    try:
        path = platformdirs.user_cache_path("chunkcache") / name
    except RuntimeError:
        why = "this user has no home folder"
    else:
        why = _why_no_home() or why_not_writable(path)
        if not why:
            return path
    folder = _temporary()
    if folder is None:
        raise SettingError(
            f"no folder for this user's chunks: {why}, and there is no temporary folder either "
            f"(TMPDIR, /tmp, /var/tmp); {REMEDY}"
        )
    if why not in _warned:
        _warned.add(why)
        logger.warning(
            "The user's cache folder cannot be used: %s. Chunks are kept in %s for now, which the "
            "system may empty; to keep them, %s.",
            why, folder, REMEDY,
        )  # fmt: skip
    return folder / name


def why_not_writable(path: Path) -> str:
    """Why this user cannot make or fill the folder `path`; empty if nothing speaks against it."""
    if not path.is_absolute():
        return f"{path} is not absolute"
    there = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not there.is_dir():
        return f"{there} is not a folder"
    if os.name != "posix":
        return ""
    owner = there.stat().st_uid
    if os.geteuid() == 0 and owner != 0:  # as under sudo: what root leaves there locks them out
        return f"{there} belongs to another user (uid {owner}), and this is root"
    effective = os.access in os.supports_effective_ids
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=effective):
        return f"{there} cannot be written by this user (it belongs to uid {owner})"
    return ""


def _why_no_home() -> str:
    """Why the home folder is none: services often have an empty one, or the root of all files."""
    if os.name != "posix" or os.environ.get("XDG_CACHE_HOME", "").strip():
        return ""
    return "" if os.path.expanduser("~").strip("/") else "the home folder (HOME) is empty or /"


def _temporary() -> Path | None:
    """A folder of this user's own among the temporary files; None if there can be none."""
    if os.name != "posix":
        return None
    for base in (os.environ.get("TMPDIR", ""), "/tmp", "/var/tmp"):
        folder = Path(base)
        if folder.is_dir() and not why_not_writable(folder):
            try:
                return private_folder(folder / f"chunkcache-{os.geteuid()}")
            except OSError:  # somebody else's, perhaps a trap, or no room
                continue
    return None
