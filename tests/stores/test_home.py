"""Where a user's files go who has no usable home: as root, and as another user in a child."""

from __future__ import annotations

import logging
import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest
from users import NOBODY, ROOT, as_nobody

from chunkcache import open_store, samples
from chunkcache.errors import SettingError, StoreError
from chunkcache.stores import Entry, embedded, home
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.home import own_folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="elsewhere there is always a home")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of a user, in one that is open to all; nobody was warned yet."""
    for folder in (tmp_path, *tmp_path.parents[:-2]):  # for the other user
        folder.chmod(folder.stat().st_mode | 0o011)
    base = tmp_path / "temporary"
    base.mkdir()
    base.chmod(0o1777)
    monkeypatch.setenv("TMPDIR", str(base))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("CHUNKCACHE_URL", raising=False)
    monkeypatch.setattr(home, "_warned", set())
    return base / f"chunkcache-{os.geteuid()}"


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"HOME": ""}, "HOME"),
        ({"HOME": "/"}, "HOME"),
        ({"HOME": "/dev/null"}, "/dev/null is not a folder"),
        ({"HOME": "/proc/self"}, "/proc/self"),
    ],
    ids=str,
)
def test_without_a_usable_home_there_is_a_temporary_folder(
    variables: dict[str, str],
    why: str,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert own_folder("chunks") == own_folder("chunks") == temporary / "chunks"
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
    (warning,) = caplog.messages
    assert all(
        word in warning for word in (why, str(temporary), "XDG_CACHE_HOME", "CHUNKCACHE_URL")
    )
    assert {path.name for path in tmp_path.iterdir()} == {"temporary"}


def test_without_a_home_at_all(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container under a number that has no name."""

    def unknown(uid: int) -> object:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert embedded.resolved(None) == temporary / "embedded"
    assert "no home folder" in caplog.text
    monkeypatch.delenv("CHUNKCACHE_CACHE_DIR", raising=False)
    with pytest.raises(SettingError, match="CHUNKCACHE_CACHE_DIR"):
        samples.cache_folder()
    for make in (embedded.resolved, DiskStore):
        with pytest.raises(SettingError, match=r"~/kv.* whole path"):
            make(Path("~/kv"))


def test_a_usable_home_is_used_and_nothing_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert own_folder("chunks") == platformdirs.user_cache_path("chunkcache") / "chunks"
    assert own_folder("chunks").is_relative_to(tmp_path)
    monkeypatch.setenv("HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert own_folder("chunks") == tmp_path / "xdg/chunkcache/chunks"
    assert not (tmp_path / "xdg").exists()
    assert not caplog.messages


def read_only(folder: Path) -> None:
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    folder.chmod(0o555)


def cache_of_root(folder: Path) -> None:
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    (folder / ".cache/chunkcache/chunks").mkdir(parents=True)
    (folder / ".cache/chunkcache/embedded").mkdir()


@ROOT
@pytest.mark.parametrize("make", [read_only, cache_of_root])
def test_what_another_user_cannot_write_is_not_promised(
    make: Callable[[Path], None],
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """With files, as no server can run: where the warning says that chunks are, they are."""
    user = tmp_path / "user"
    make(user)
    monkeypatch.setenv("HOME", str(user))

    def no_server(folder: Path | None = None, max_bytes: int | None = None) -> str:
        embedded.resolved(folder)
        raise StoreError("no server here")

    monkeypatch.setattr(embedded, "start_embedded", no_server)

    def store_and_find() -> None:
        with open_store() as store:
            store.write([Entry("a", {}, memoryview(b"blob"))])
            assert store.flush(60.0)
        kept = temporary.with_name(f"chunkcache-{NOBODY}") / "chunks"
        assert list(kept.rglob("*.safetensors"))
        assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
        assert f"Chunks are kept in {kept};" in caplog.text
        assert "cannot be written by this user" in caplog.text

    as_nobody(store_and_find)


@ROOT
def test_root_leaves_nothing_in_the_home_of_another(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    user = tmp_path / "user"
    user.mkdir()
    os.chown(user, NOBODY, NOBODY)
    monkeypatch.setenv("HOME", str(user))
    assert own_folder("chunks") == temporary / "chunks"
    assert list(user.iterdir()) == []


def test_a_trap_among_the_temporary_files_is_passed_over(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "")
    trap = tmp_path / "trap"
    trap.mkdir(mode=0o700)
    temporary.symlink_to(trap)
    assert not own_folder("chunks").is_relative_to(tmp_path)
    temporary.unlink()
    temporary.mkdir()
    temporary.chmod(0o755)
    assert not own_folder("chunks").is_relative_to(tmp_path)
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o755


@pytest.mark.parametrize("unusable", ["/no/such/folder", "relative", "/dev/null"])
def test_an_unusable_tmpdir_is_passed_over(
    unusable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relative").mkdir()
    monkeypatch.setenv("HOME", "")
    monkeypatch.setenv("TMPDIR", unusable)
    assert own_folder("chunks").parent.parent in (Path("/tmp"), Path("/var/tmp"))


def test_with_no_folder_at_all_there_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(home, "why_not_writable", lambda path: "no room")
    for open_it in (open_store, lambda: open_store("embedded://")):
        with pytest.raises(SettingError, match=r"HOME or XDG_CACHE_HOME .* or CHUNKCACHE_URL"):
            open_it()
    caplog.set_level(logging.WARNING)
    assert not caplog.messages
