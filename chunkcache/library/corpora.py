"""Corpora: documents out of text files, JSON lines and data sets, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkcache.errors import SettingError

JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Files:
    """Documents in files: one per text file, one per line of a JSON-lines file.

    Attributes:
        paths: The files. Those that end in `.jsonl` or `.ndjson` hold JSON lines.
        field: Which field of a line has the text. A line may also be a text itself.

    Raises:
        SettingError: A file is not there; while iterating: one cannot be read, or a line has no
            such text.
    """

    paths: Sequence[Path]
    field: str = "text"

    def __post_init__(self) -> None:
        for path in self.paths:
            if not path.is_file():
                raise _unreadable(path, "there is no such file")

    def __len__(self) -> int:
        return sum(
            sum(1 for _ in _lines(path)) if path.suffix in JSON_LINES else 1 for path in self.paths
        )

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            if path.suffix not in JSON_LINES:
                yield _read(path)
                continue
            for number, line in _lines(path):
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise SettingError(
                        f"{path}, line {number} is no JSON ({error}): write an object per line"
                    ) from None
                yield _text(value, self.field, f"{path}, line {number}")


def read_dataset(name: str, split: str, field: str) -> Iterator[str]:
    """Documents of a data set: a folder that `save_to_disk` wrote, or one on the Hub.

    Args:
        name: The folder or the hub id.
        split: Which part of it.
        field: Which column has the text.

    Raises:
        SettingError: The package `datasets` is not installed, or there is no such data set, split
            or column.
    """
    try:
        import datasets
    except ImportError:
        raise SettingError("--dataset needs the package datasets: pip install datasets") from None
    try:
        if Path(name).is_dir():
            found: Any = datasets.load_from_disk(name)
            # A folder holds one data set, or several splits.
            rows = found[split] if isinstance(found, dict) else found
        else:
            rows = datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # of many kinds, from below that package too
        raise SettingError(
            f"--dataset {name!r} cannot be read, split {split!r}: {error}. Name a folder that "
            "save_to_disk wrote, or a hub id, and one of its splits with --split"
        ) from error
    return (
        _text(row, field, f"--dataset {name!r}, row {number}") for number, row in enumerate(rows)
    )


def _text(value: Any, field: str, where: str) -> str:
    found = value.get(field) if isinstance(value, dict) else value
    if isinstance(found, str):
        return found
    there = f"; it has {', '.join(map(str, value))}" if isinstance(value, dict) else ""
    raise SettingError(f"{where} has no text in the field {field!r}{there}: name it with --field")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: object) -> SettingError:
    return SettingError(
        f"{str(path)!r} cannot be read as UTF-8 text: {error}. Name a text file, or JSON lines "
        "(.jsonl)"
    )
