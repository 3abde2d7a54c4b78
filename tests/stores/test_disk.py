"""The disk store: atomicity, maps, permissions, budget, age, pins, and a disk that says no."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import blobs, keys_of
from users import ROOT, as_nobody

from chunkcache.errors import SettingError, StoreError
from chunkcache.stores.base import Entry, read_blobs
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.folder import Folder

KEY = "safetensors@org%2Fname@1@0@" + "ab" * 32


def entry(key: str, blob: bytes = b"", **metadata: str) -> Entry:
    return Entry(key, metadata, memoryview(blob))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "new" / "folder")
    assert store.write([entry(KEY, b"abc", model="m"), entry("b", b"defgh")]) == 8
    assert store.sizes(["b", "missing", KEY]) == [5, 0, 3]
    assert blobs(store, KEY, "missing", "b", KEY) == [b"abc", None, b"defgh", b"abc"]
    assert store.read_metadata([KEY, "missing", "b"]) == [{"model": "m"}, None, {}]
    assert set(keys_of(store)) == {KEY, "b"}


def test_another_store_on_the_folder_sees_it(tmp_path: Path) -> None:
    DiskStore(tmp_path).write([entry(KEY, b"abc", model="m")])
    assert blobs(DiskStore(tmp_path), KEY) == [b"abc"]


def test_a_folder_not_yet_there_is_empty(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "none")
    assert store.sizes(["a"]) == [0]
    assert blobs(store, "a") == [None]
    assert store.read_metadata(["a"]) == [None]
    assert store.delete(["a"]) == 0
    assert keys_of(store) == []


def test_writing_replaces_both_halves(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.write([entry("a", b"old", old="1")])
    store.write([entry("a", b"newer", new="2")])
    assert blobs(store, "a") == [b"newer"]
    assert store.read_metadata(["a"]) == [{"new": "2"}]
    store.write([entry("a", only="metadata")])
    assert store.sizes(["a"]) == [0]
    assert blobs(store, "a") == [None]
    assert store.read_metadata(["a"]) == [{"only": "metadata"}]


def test_delete_counts_entries_and_removes_files(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.write([entry("a", b"1"), entry("b", only="metadata")])
    assert store.delete(["a", "missing", "b"]) == 2
    assert files(tmp_path) == []


ENTRIES = st.dictionaries(
    st.text(min_size=0, max_size=300),
    st.tuples(st.binary(max_size=50), st.dictionaries(st.text(max_size=5), st.text(max_size=5))),
    max_size=5,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=ENTRIES)
def test_any_content_round_trips(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, tuple[bytes, dict[str, str]]]
) -> None:
    store = DiskStore(tmp_path_factory.mktemp("disk"))
    store.write([Entry(key, meta, memoryview(blob)) for key, (blob, meta) in content.items()])
    keys = list(content)
    assert store.sizes(keys) == [len(content[key][0]) for key in keys]
    assert blobs(store, *keys) == [content[key][0] or None for key in keys]
    assert store.read_metadata(keys) == [content[key][1] for key in keys]
    assert set(keys_of(store)) == set(keys)


def test_reading_leaves_no_descriptors(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    keys = [f"k{number}" for number in range(20)]
    store.write([entry(key, b"x" * 10_000) for key in keys])
    descriptors = open_descriptors()
    assert blobs(store, *keys) == [b"x" * 10_000] * 20
    early = read_blobs(store, keys)
    next(early)
    early.close()
    assert open_descriptors() == descriptors


WRITE_FOR_EVER = """
import sys
from pathlib import Path
from chunkcache.stores.base import Entry
from chunkcache.stores.disk import DiskStore
store = DiskStore(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    for letter in b"abcdefgh":
        store.write([Entry("k", {"letter": chr(letter)}, memoryview(bytes([letter]) * 2_000_000))])
"""


def test_a_killed_writer_leaves_whole_blobs_and_only_temporary_files(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for _ in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        deadline = time.monotonic() + 10
        while store.sizes(["k"]) == [0]:
            assert time.monotonic() < deadline
        for _ in range(20):  # a reader beside the writer never sees half a file
            for view in read_blobs(store, ["k"]):
                assert view is not None
                array = np.frombuffer(view, np.uint8)
                assert len(array) == 2_000_000
                assert (array == array[0]).all()
        writer.kill()
        writer.wait()
        writer.stdout.close()
    leftovers = [path for path in files(tmp_path) if path.parent.name != "tmp"]
    assert len(leftovers) == 2


def test_old_temporary_files_are_swept_and_young_ones_are_not(tmp_path: Path) -> None:
    """And nothing else: the folder may be one where others keep temporary files too."""
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    dead, alive = (scratch / f"chunkcache-{digit * 16}" for digit in "da")
    others = [scratch / "thesis.txt", scratch / "tmpab1_xyz9"]
    for path in (dead, alive, *others):
        path.write_bytes(b"half")
        age = 0 if path == alive else 7200
        os.utime(path, (time.time() - age,) * 2)
    DiskStore(tmp_path).write([entry("a", b"1")])
    assert set(files(scratch)) == {alive, *others}


GROUP = 4321


@ROOT
@pytest.mark.parametrize(
    ("mode", "umask", "shared"),
    [(0o2775, 0o002, True), (0o2770, 0o007, True), (0o2775, 0o022, False), (0o775, 0o002, False)],
)
def test_a_group_shares_a_folder_where_setgid_and_umask_let_it(
    tmp_path: Path, mode: int, umask: int, shared: bool
) -> None:
    """Both read, write, replace and evict what the other has written, pinned or not."""
    for each in (tmp_path, *tmp_path.parents[:-2]):
        each.chmod(each.stat().st_mode | 0o011)
    folder = tmp_path / "s"
    folder.mkdir()
    os.chown(folder, 0, GROUP)
    folder.chmod(mode)
    before = os.umask(umask)
    try:
        DiskStore(folder).write([entry("a", b"root's", model="m"), pinned("p", b"pinned")])
    finally:
        os.umask(before)

    def read_and_replace() -> None:
        store = DiskStore(folder)
        assert store.sizes(["a", "p"]) == [6, 6]
        assert blobs(store, "a", "p") == [b"root's", b"pinned"]
        assert store.read_metadata(["a"]) == [{"model": "m"}]
        store.write([entry("a", b"nobody's"), entry("b", b"1")])
        assert store.delete(["p"]) == 1

    def refused() -> None:
        with pytest.raises(StoreError, match=r"chmod g.rwxs .* umask 002"):
            read_and_replace()

    as_nobody(read_and_replace if shared else refused, GROUP, umask)
    assert stat.S_IMODE(folder.stat().st_mode) == mode
    made = [path.stat() for path in folder.rglob("*")]
    assert not any(status.st_mode & 0o007 & ~umask & 0o007 for status in made)
    if shared:
        assert {status.st_gid for status in made} == {GROUP}
        store = DiskStore(folder)
        assert blobs(store, "a", "b") == [b"nobody's", b"1"]
        assert store.delete(["a", "b"]) == 2


def test_files_of_others_are_not_evicted(tmp_path: Path) -> None:
    """Not even those whose names look like ours: a folder may be named that has other files."""
    others = [
        tmp_path / "ab" / "12345678-1234-4321-8888-0123456789ab.json",
        tmp_path / "ab" / f"{'cd' * 32}.json",
        tmp_path / "ab" / "0badcafe-weights.safetensors",
        tmp_path / "notes.json",
    ]
    (tmp_path / "ab").mkdir()
    for path in others:
        path.write_bytes(bytes(2000))
        os.utime(path, (0, 0))
    store = DiskStore(tmp_path, max_bytes=5000)
    for number in range(20):
        store.write([entry(f"k{number}", bytes(1000))])
    assert [listed.key for page in store.scan() for listed in page]
    assert all(path.exists() for path in others)


def test_only_the_user_can_read_it(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        DiskStore(tmp_path / "s").write([entry("a", b"1", model="m")])
    finally:
        os.umask(previous)
    folders = [tmp_path / "s", *(path for path in (tmp_path / "s").rglob("*") if path.is_dir())]
    assert len(folders) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(tmp_path)} == {0o600}


def test_the_budget_holds_and_the_least_recently_used_leave(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, max_bytes=20_000)
    for number in range(10):
        store.write([entry(f"k{number}", b"x" * 1000)])
        age = 10_000 - number
        for file in files(tmp_path):
            if f"-k{number}." in file.name:
                os.utime(file, (time.time() - age,) * 2)
    blobs(store, "k0")  # used: not the oldest any more
    for number in range(10, 30):
        store.write([entry(f"k{number}", b"x" * 1000)])
        assert used_bytes(tmp_path) <= 20_000
        if number < 20:
            assert store.sizes(["k0"]) == [1000]
    assert store.sizes([f"k{number}" for number in range(1, 10)]) == [0] * 9
    assert store.sizes(["k29"]) == [1000]
    assert used_bytes(tmp_path) > 10_000
    # both halves leave together
    assert len(files(tmp_path)) == 2 * len(keys_of(store))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 3000), max_size=30), budget=st.integers(200, 5000))
def test_one_process_never_exceeds_its_budget(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], budget: int
) -> None:
    folder = tmp_path_factory.mktemp("budget")
    store = DiskStore(folder, max_bytes=budget)
    for number, size in enumerate(sizes):
        taken = store.write([entry(f"k{number}", b"x" * size)])
        assert used_bytes(folder) <= budget
        assert taken in (0, size)
        assert store.sizes([f"k{number}"]) == [taken]


def pinned(key: str, blob: bytes = b"", **metadata: str) -> Entry:
    return Entry(key, metadata, memoryview(blob), pinned=True)


def test_pinned_entries_stay_and_make_room_only_for_each_other(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, max_bytes=10_000)
    store.write([pinned("old", b"x" * 3000)])
    for file in files(tmp_path):
        os.utime(file, (0, 0))
    for number in range(20):
        DiskStore(tmp_path, max_bytes=10_000).write([entry(f"k{number}", b"x" * 1000)])
    assert store.sizes(["old", "k19"]) == [3000, 1000]
    assert store.write([pinned("new", b"x" * 6000)]) == 6000
    assert store.write([entry("large", b"x" * 2000)]) == 0
    assert store.sizes(["old", "new", "k19", "large"]) == [3000, 6000, 0, 0]
    assert store.write([pinned("newer", b"x" * 3000)]) == 3000
    assert store.sizes(["old", "new", "newer"]) == [0, 6000, 3000]
    assert used_bytes(tmp_path) <= 10_000


def test_files_of_pinned_entries_are_write_protected_and_can_be_replaced(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.write([pinned("a", b"1", m="1")])
    store.write([Entry("a", {"n": "2"}, memoryview(b""), merge=True)])
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(tmp_path)} == {0o400}
    assert store.read_metadata(["a"]) == [{"m": "1", "n": "2"}]
    store.write([entry("a", b"22")])
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(tmp_path)} == {0o600}
    store.write([pinned("a", b"1")])
    assert store.delete(["a"]) == 1
    assert files(tmp_path) == []


def age(folder: Path, seconds: float, *suffixes: str) -> None:
    """Make all files, or those of one kind, that much older."""
    for path in files(folder):
        if not suffixes or path.suffix in suffixes:
            before = path.stat().st_mtime - seconds
            os.utime(path, (before, before))


def test_entries_go_after_their_time(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, ttl=100, refresh_ttl=False)
    store.write([entry("a", b"one", m="1"), pinned("p", b"two", m="2")])
    age(tmp_path, 50)
    assert blobs(store, "a") == [b"one"]
    assert store.read_metadata(["a"]) == [{"m": "1"}]
    age(tmp_path, 51)
    assert store.sizes(["a", "p"]) == [0, 3]
    assert blobs(store, "a", "p") == [None, b"two"]
    assert store.read_metadata(["a", "p"]) == [None, {"m": "2"}]
    assert keys_of(store) == ["p"]
    assert DiskStore(tmp_path).sizes(["a"]) == [3]  # a store without a time applies none
    store.write([Entry("a", {"n": "2"}, memoryview(b""), merge=True)])
    assert store.read_metadata(["a"]) == [{"n": "2"}]  # not added to what has expired
    store.write([entry("a", b"anew")])
    assert store.sizes(["a"]) == [4]


@pytest.mark.parametrize("verb", [lambda s: blobs(s, "a"), lambda s: s.read_metadata(["a"])])
def test_use_renews_the_time(tmp_path: Path, verb: Callable[[DiskStore], object]) -> None:
    store = DiskStore(tmp_path, ttl=100)
    store.write([entry("a", b"one", m="1")])
    for _ in range(3):
        age(tmp_path, 90)
        verb(store)
    age(tmp_path, 90)
    assert store.sizes(["a"]) == [3]  # which is not a use
    age(tmp_path, 11)
    assert store.sizes(["a"]) == [0]


def test_what_has_expired_is_swept(tmp_path: Path) -> None:
    DiskStore(tmp_path).write([entry("a", b"1"), pinned("p", b"1"), entry("b", only="metadata")])
    age(tmp_path, 101)
    DiskStore(tmp_path, ttl=100).write([entry("new", b"1")])
    assert set(keys_of(DiskStore(tmp_path))) == {"p", "new"}


def test_a_blob_that_lost_its_json_has_no_age_and_is_not_found(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, ttl=100)
    store.write([entry("a", b"one")])
    for path in files(tmp_path):
        if path.suffix == ".json":
            path.unlink()
    assert store.sizes(["a"]) == [0]
    assert blobs(store, "a") == [None]


def write_and_read(folder: Path, name: str) -> None:
    store = DiskStore(folder, max_bytes=100_000)
    for number in range(200):
        key = f"{name}{number}"
        store.write([entry(key, key.encode() * 200)])
        for other in "ab":
            for n in range(max(0, number - 5), number + 1):
                assert blobs(store, f"{other}{n}")[0] in (None, f"{other}{n}".encode() * 200)


def test_two_processes_share_a_folder_and_its_budget(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=write_and_read, args=(tmp_path, name)) for name in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert used_bytes(tmp_path) <= 100_000 + 2 * 10_000
    last = blobs(DiskStore(tmp_path), "a199", "b199")
    assert b"a199" * 200 in last or b"b199" * 200 in last  # of who came last, at least


def test_the_folder_is_not_scanned_at_each_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path, max_bytes=1_000_000)
    scans = []
    scan = Folder.scan
    monkeypatch.setattr(Folder, "scan", lambda self: scans.append(1) or scan(self))
    for number in range(200):
        store.write([entry(f"k{number}", b"x" * 1000)])
    assert 1 <= len(scans) <= 5


def test_stores_that_share_a_folder_share_the_budget(tmp_path: Path) -> None:
    stores = [DiskStore(tmp_path, max_bytes=50_000) for _ in range(3)]
    for number in range(300):
        stores[number % 3].write([entry(f"k{number}", b"x" * 1000)])
    assert used_bytes(tmp_path) <= 50_000 + 3 * 5_000


def test_files_of_others_are_neither_listed_nor_evicted(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    foreign = [tmp_path / "notes.json", tmp_path / "ab" / "my-notes.json", tmp_path / "ab" / "x"]
    for path in foreign:
        path.write_bytes(b"mine" * 1000)
        os.utime(path, (0, 0))
    store = DiskStore(tmp_path, max_bytes=3000)
    for number in range(10):
        store.write([entry(f"k{number}", b"x" * 1000)])
    assert all(path.exists() for path in foreign)
    assert {key[0] for key in keys_of(store)} == {"k"}


def test_reading_touches_at_most_once_a_minute(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.write([entry("a", b"1")])
    (file,) = (path for path in files(tmp_path) if path.suffix == ".safetensors")
    for age, touched in ((3600, True), (30, False)):
        before = time.time() - age
        os.utime(file, (before, before))
        blobs(store, "a")
        assert (file.stat().st_mtime > before + 1) == touched


def test_a_damaged_json_is_no_metadata(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.write([entry("a", b"1", model="m")])
    (file,) = (path for path in files(tmp_path) if path.suffix == ".json")
    for damage in (b"", b"{", b"[]", b'{"metadata": 3}', b"\xff\xfe"):
        file.write_bytes(damage)
        assert store.read_metadata(["a"]) == [None]
    assert blobs(store, "a") == [b"1"]


def test_a_path_that_is_a_file_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SettingError, match="not a folder"):
        DiskStore(tmp_path / "file")
    with pytest.raises(SettingError, match="max_bytes"):
        DiskStore(tmp_path, max_bytes=0)


def test_a_folder_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = DiskStore(tmp_path / "file" / "folder")
    with pytest.raises(StoreError, match="cannot write"):
        store.write([entry("a", b"1")])


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="needs a file system that refuses")
def test_a_read_only_file_system_is_a_store_error() -> None:
    store = DiskStore(Path("/proc/chunkcache"))
    with pytest.raises(StoreError, match="cannot write"):
        store.write([entry("a", b"1")])


FULL = """
import resource, signal, sys
from pathlib import Path
from chunkcache.errors import StoreError
from chunkcache.stores.base import Entry, read_blobs
from chunkcache.stores.disk import DiskStore
store = DiskStore(Path(sys.argv[1]))
store.write([Entry("small", {}, memoryview(b"x" * 10))])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    store.write([Entry("large", {}, memoryview(b"x" * 100_000))])
except StoreError as error:
    (blob,) = read_blobs(store, ["small"])
    print("refused", store.sizes(["small", "large"]), bytes(blob))
"""


def test_a_write_cut_short_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"refused [10, 0] {b'x' * 10!r}"
    assert files(tmp_path / "tmp") == []


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "bytes="), (errno.EROFS, "writable"), (errno.EACCES, "this user")],
)
def test_errors_name_their_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    store = DiskStore(tmp_path)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StoreError, match=remedy) as caught:
        store.write([entry("a", b"1")])
    assert str(tmp_path) in str(caught.value)
    assert store.sizes(["a"]) == [0]


AS_NOBODY = """
import os, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
from chunkcache.errors import StoreError
from chunkcache.stores.base import Entry, Part
from chunkcache.stores.disk import DiskStore
store = DiskStore(Path(sys.argv[1]))
os.setuid(65534)
verbs = [
    lambda: store.write([Entry("a", {}, memoryview(b"1"))]),
    lambda: list(store.fetch([Part("a", 0, [memoryview(bytearray(1))])])),
    lambda: store.sizes(["a"]),
    lambda: store.read_metadata(["a"]),
    lambda: store.delete(["a"]),
]
for verb in verbs:
    try:
        verb()
    except StoreError as error:
        print("refused" if "this user" in str(error) else error)
DiskStore(Path(sys.argv[1]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_a_folder_of_somebody_else_is_a_store_error(tmp_path: Path) -> None:
    DiskStore(tmp_path / "mine").write([entry("a", b"1")])
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(tmp_path / "mine")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["refused"] * 5


def test_the_folder_may_vanish_between_writes(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "s", max_bytes=1000)
    store.write([entry("a", b"1")])
    subprocess.run(["rm", "-rf", str(tmp_path / "s")], check=True)
    assert blobs(store, "a") == [None]
    store.write([entry("a", b"2")])
    assert blobs(store, "a") == [b"2"]
