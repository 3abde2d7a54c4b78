"""Documents out of files: what is read, and what a mistake is told by."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from chunkcache import SettingError
from chunkcache.library.corpora import Files, read_dataset


def test_text_files_and_json_lines(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("one\n\ntwo")
    lines.write_text('{"text": "three"}\n\n"four"\n')
    files = Files([text, lines])
    assert list(files) == ["one\n\ntwo", "three", "four"]
    assert len(files) == 3
    assert list(files) == list(files)  # and from the start again


def test_another_field(tmp_path):
    path = tmp_path / "a.ndjson"
    path.write_text('{"text": "no", "body": "yes"}')
    assert list(Files([path], "body")) == ["yes"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\xff", "UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', "line 2"),
        ("a.jsonl", b'{"body": 3}', "it has body: name it with --field"),
        ("a.jsonl", b'{"text": 3}', "--field"),
        ("a.jsonl", b"[1]", "--field"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SettingError, match=said):
        list(Files([path]))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SettingError, match="no such file"):
        Files([tmp_path / "a.txt"])


def test_a_data_set_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SettingError, match="pip install datasets"):
        read_dataset("org/name", "train", "text")


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The two functions of the package that are used, in its place: it is large."""
    rows = [{"text": "one"}, {"text": "two"}]

    def load_dataset(name, split, streaming):
        assert (name, streaming) == ("org/name", True)
        return {"train": rows}[split]

    def load_from_disk(name):
        return {"train": rows} if name.endswith("splits") else rows

    module = SimpleNamespace(load_dataset=load_dataset, load_from_disk=load_from_disk)
    monkeypatch.setitem(sys.modules, "datasets", module)
    (tmp_path / "splits").mkdir()
    (tmp_path / "one").mkdir()
    return tmp_path


def test_data_sets(datasets):
    for name in ("org/name", str(datasets / "splits"), str(datasets / "one")):
        assert list(read_dataset(name, "train", "text")) == ["one", "two"]


@pytest.mark.parametrize("name", ["org/name", "splits"])
def test_a_split_that_is_not_there(datasets, name):
    name = str(datasets / name) if name == "splits" else name
    with pytest.raises(SettingError, match="--split"):
        read_dataset(name, "test", "text")


def test_a_column_that_is_not_there(datasets):
    with pytest.raises(SettingError, match=r"row 0 .* it has text: name it with --field"):
        list(read_dataset("org/name", "train", "body"))
