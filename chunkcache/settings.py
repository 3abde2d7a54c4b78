"""Settings: one validated dataclass, filled from keyword arguments, the environment and a file.

The nearest wins: a keyword argument, then `CHUNKCACHE_<NAME>` in the environment, then the TOML
file that `CHUNKCACHE_CONFIG` names, then the default.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from chunkcache.errors import SettingError
from chunkcache.repair import KNOWN, Repair, parse_repair

REUSE_MODES = ("prefix", "anywhere", "off")
ERROR_MODES = ("compute", "raise")
_OF_STORE = (
    "connect_timeout", "read_timeout", "max_delay", "write_queue_bytes", "ttl", "refresh_ttl",
)  # fmt: skip
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a `RedisChunkCache` behaves.

    Attributes:
        reuse: `"prefix"` reads the longest run of known chunks from the start of the prompt
            (exact); `"anywhere"` also finds text that stands elsewhere now, moves and repairs it
            (approximate, and reported); `"off"` only writes.
        repair: which moved tokens are computed again: a name as `parse_repair` reads it, or a
            `Repair`.
        chunk_size: tokens per chunk.
        chunk_overlap: tokens that a chunk shares with the one before it.
        store_tail: also keep the last, shorter chunk of a prompt, so that the very same prompt is
            reused to its last token.
        namespace: caches reuse only what was stored under the same namespace.
        tags: free text kept in the metadata of every chunk written, `"key=value,…"` by convention.
        on_error: `"compute"` treats a failing store as a miss and reports it; `"raise"` raises
            `StoreError`.
        connect_timeout: seconds to wait for a connection to the store.
        read_timeout: seconds to wait for each answer of the store.
        max_delay: seconds that looking into the store may take one prompt, all its lookups
            together; a store that is slower is left alone for 5 s. Reading what was found does not
            count.
        write_queue_bytes: bytes of RAM that chunks may take while they wait to be written; more
            are dropped.
        ttl: seconds after which chunks are gone, 0 for never.
        refresh_ttl: count them from the last use; `False` counts from the writing.
        pin: keep the chunks written: they do not expire, and others are evicted first.

    Raises:
        SettingError: A value that cannot work, with its name and the mend.
    """

    reuse: str = "prefix"
    repair: str | Repair = "head:4"
    chunk_size: int = 128
    chunk_overlap: int = 0
    store_tail: bool = True
    namespace: str = ""
    tags: str = ""
    on_error: str = "compute"
    connect_timeout: float = 0.25
    read_timeout: float = 0.5
    max_delay: float = 0.5
    write_queue_bytes: int = 1 << 30
    ttl: float = 0.0
    refresh_ttl: bool = True
    pin: bool = False

    def __post_init__(self) -> None:
        _one_of("reuse", self.reuse, REUSE_MODES)
        _one_of("on_error", self.on_error, ERROR_MODES)
        _integer("chunk_size", self.chunk_size, 1)
        _integer("chunk_overlap", self.chunk_overlap, 0)
        _integer("write_queue_bytes", self.write_queue_bytes, 0)
        if self.chunk_overlap >= self.chunk_size:
            raise SettingError(
                f"chunk_overlap={self.chunk_overlap} must be smaller than "
                f"chunk_size={self.chunk_size}: each chunk has to bring new tokens"
            )
        for name in ("connect_timeout", "read_timeout", "max_delay"):
            _seconds(name, getattr(self, name))
        if self.ttl != 0:
            _seconds("ttl", self.ttl, "or 0 for no end")
        for name in ("namespace", "tags"):
            _text(name, getattr(self, name))
        if isinstance(self.repair, str):
            parse_repair(self.repair)
        elif not isinstance(self.repair, Repair):
            raise SettingError(f"repair={self.repair!r} must be a name or a Repair: {KNOWN}")
        for name in ("store_tail", "refresh_ttl", "pin"):
            if not isinstance(value := getattr(self, name), bool):
                raise SettingError(f"{name}={value!r} must be True or False")

    @property
    def strategy(self) -> Repair:
        """The repair to apply."""
        return parse_repair(self.repair) if isinstance(self.repair, str) else self.repair

    @property
    def of_store(self) -> dict[str, Any]:
        """Those that `open_store` takes."""
        return {name: getattr(self, name) for name in _OF_STORE}

    @classmethod
    def load(cls, **given: Any) -> Self:
        """Settings from keyword arguments, then the environment, then a file, then defaults.

        Raises:
            SettingError: An unknown name, an unreadable file, or a value that cannot work.
        """
        known = {field.name: str(field.type) for field in fields(cls)}
        _reject_unknown(given, known, "keyword argument")
        values: dict[str, Any] = {}
        if path := os.environ.get("CHUNKCACHE_CONFIG"):
            values |= _from_file(Path(path), known)
        for name, kind in known.items():
            if (text := os.environ.get(f"CHUNKCACHE_{name.upper()}")) is not None:
                values[name] = _parse(f"CHUNKCACHE_{name.upper()}", text, kind)
        return cls(**(values | given))


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        choices = " or ".join(f'"{choice}"' for choice in allowed)
        raise SettingError(f"{name}={value!r} is not known: use {choices}")


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise SettingError(f"{name}={value!r} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SettingError(f"{name}={value!r} must be text that UTF-8 can express") from error


def _integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingError(f"{name}={value!r} must be a whole number of at least {least}")


def _seconds(name: str, value: object, otherwise: str = "") -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]
        raise SettingError(
            f"{name}={value!r} must be a positive number of seconds {otherwise}".rstrip()
        )


def _reject_unknown(given: Mapping[str, Any], known: Mapping[str, str], what: str) -> None:
    for name in given:
        if name not in known:
            raise SettingError(f"unknown {what} {name!r}: the settings are {', '.join(known)}")


def _from_file(path: Path, known: Mapping[str, str]) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(
            f"CHUNKCACHE_CONFIG={str(path)!r} cannot be read as a TOML file: {error}"
        ) from error
    _reject_unknown(values, known, f"setting in {path}")
    return values


def _parse(name: str, text: str, kind: str) -> Any:
    try:
        if kind == "bool":
            if text.lower() not in _TRUE + _FALSE:
                raise ValueError
            return text.lower() in _TRUE
        return {"int": int, "float": float}.get(kind, str)(text)
    except ValueError as error:
        raise SettingError(f"{name}={text!r} must be a value of type {kind}") from error
