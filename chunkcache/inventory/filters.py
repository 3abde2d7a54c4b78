"""Filter: which stored chunks are meant, by what their keys and metadata say."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

from chunkcache.errors import SettingError
from chunkcache.keys import ChunkKey

NO_MATCH = "no chunk in this store matches: check the terms and --store"
_TERM = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*)([=<>])(.*)", re.DOTALL)
_SPAN = re.compile(r"(\d+(?:\.\d+)?)([smhdw]?)", re.ASCII)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True, slots=True)
class Filter:
    """What chunks must have to be meant; all of it. Without arguments all chunks are meant.

    Attributes:
        model: The model's name in the metadata, or as it stands in the key.
        namespace: The namespace; `""` is the one without a name.
        tags: Comma-separated tags, one at least, all of which must be among those of the chunk.
        codec: How the blob is written, the `format` in the key.
        min_age: Seconds since the chunk was made, at least.
        max_age: Seconds since then, at most.
        fields: Any other field of the metadata, and the value that it must have exactly.
    """

    model: str | None = None
    namespace: str | None = None
    tags: str | None = None
    codec: str | None = None
    min_age: float | None = None
    max_age: float | None = None
    fields: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # Nothing is among any tags: an unset variable in `tags=$TAGS` would mean every chunk.
        if self.tags is not None and not split_tags(self.tags):
            raise SettingError(
                "filter: tags= names no tag: write tags=project=docs, or leave it out"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read terms with spaces in between, quoted as in a shell.

        `name=value` is about any field, `age>7d` and `age<1h` about the age (s, m, h, d or w):
        `model=org/name tags=project=docs temperature=0.7 age>7d`.

        Raises:
            SettingError: There is no term, or one that cannot be understood.
        """
        try:
            terms = shlex.split(text)
        except ValueError as error:
            raise SettingError(f"filter {text!r}: {error}") from None
        if not terms:
            raise SettingError("filter: is empty; write terms such as namespace=team-a or age>7d")
        values: dict[str, Any] = {}
        fields: dict[str, str] = {}
        for term in terms:
            name, value = _read(term)
            if name in values or name in fields:
                raise SettingError(f"filter {text!r}: {term!r} says twice what the same must be")
            (values if name in cls.__slots__ else fields)[name] = value
        return cls(**values, fields=fields)

    def matches(self, key: ChunkKey, there: Mapping[str, str]) -> bool:
        """Whether the chunk with this key and this metadata is meant."""
        wanted = dict(self.fields)
        if self.namespace is not None:
            wanted["namespace"] = self.namespace
        return (
            self.model in (None, key.model, there.get("model"))
            and self.codec in (None, key.format)
            and all(there.get(name) == value for name, value in wanted.items())
            and (self.tags is None or split_tags(self.tags) <= split_tags(there.get("tags", "")))
            and self._fits_age(there.get("created", ""))
        )

    def _fits_age(self, created: str) -> bool:
        if self.min_age is None and self.max_age is None:
            return True
        try:
            age = time.time() - datetime.fromisoformat(created).timestamp()
        except ValueError:
            return False
        least = -float("inf") if self.min_age is None else self.min_age
        most = float("inf") if self.max_age is None else self.max_age
        return least <= age <= most


def split_tags(text: str) -> set[str]:
    """The tags in a chunk's metadata."""
    return {tag.strip() for tag in text.split(",") if tag.strip()}


def _read(term: str) -> tuple[str, Any]:
    """What a term is about, and the value. Raises SettingError."""
    match = _TERM.fullmatch(term)
    name, sign, value = match.groups() if match else ("", "", "")
    if name == "age" and sign in "<>" and (span := _SPAN.fullmatch(value)):
        return "min_age" if sign == ">" else "max_age", float(span[1]) * _SECONDS[span[2]]
    if name and name not in ("age", "min_age", "max_age", "fields") and sign == "=":
        return name, value
    raise SettingError(
        f"filter: {term!r} cannot be understood; write name=value, age>7d or age<1h "
        "(s, m, h, d or w)"
    )
