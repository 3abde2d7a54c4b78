"""Settings: one validated dataclass, filled from keyword arguments, the environment and a file.

The nearest wins: a keyword argument, then `CHUNKCACHE_<NAME>` in the environment, then the TOML
file that `CHUNKCACHE_CONFIG` names, then the default.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from chunkcache.errors import SettingError
from chunkcache.keys import CODECS, PLAIN, ZSTD
from chunkcache.kv.seal import Seal

if TYPE_CHECKING:
    from chunkcache.repair import Repair

_REPAIR = "head:4"
PIECE_TOKENS = 1024  # with reproducible=True: less costs more, more reuses less
REUSE_MODES = ("prefix", "anywhere", "off")
VARIANTS = ("any", "prepared")
BACKGROUND = "background"
AUDIT_PLACES = (BACKGROUND, "call")
ERROR_MODES = ("compute", "raise")
OBSERVERS = "observers"
HOOK_MODES = ("fallback", OBSERVERS)
SHORTEST_SECRET = 16
_OF_STORE = (
    "connect_timeout", "read_timeout", "max_delay", "write_queue_bytes", "ttl", "refresh_ttl",
)  # fmt: skip
# What chunks say of themselves, and "age", by which they can be chosen.
RESERVED_FIELDS = frozenset(
    (
        "age", "bytes", "codec", "context", "created", "dtype", "identity", "layers", "model",
        "namespace", "outputs", "parent", "pinned", "positions", "prepared", "revision", "state",
        "tags", "token_ids", "tokens",
    )
)  # fmt: skip
FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_PAIRS = "Mapping[str, str]"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_IN_WORDS = {
    "bool": "yes or no",
    "int": "a whole number",
    "float": "a number",
    _PAIRS: "name=value pairs with commas in between",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How a `RedisChunkCache` behaves.

    Attributes:
        reuse: `"prefix"` reads the longest run of known chunks from the start of the prompt
            (exact); `"anywhere"` also finds text that stands elsewhere now, moves and repairs it
            (approximate, and reported); `"off"` only writes.
        repair: which moved tokens are computed again: a name as `parse_repair` reads it, or a
            `Repair`.
        variants: with `reuse="anywhere"`, which K/V of a text may serve: `"any"`, those of earlier
            prompts too; `"prepared"` only those that `add_documents` has computed, so that an
            answer never depends on earlier prompts.
        audit_rate: share of the prompts with moved text that are compared with a full run, 0 to 1;
            `metrics` tells how far they were off. An audit costs a whole prefill and the memory of
            the prompt's K/V; there is never more than one at a time.
        audit_bound: KL in nats, beyond which an audited prompt is logged; 0 for none.
        audit_in: `"background"` audits in a thread beside the answer, `"call"` before the first
            token is returned.
        chunk_size: tokens per chunk.
        chunk_overlap: tokens that a chunk shares with the one before it.
        reproducible: cold and warm runs give the same bits: prompts are computed in pieces, and
            only whole pieces are stored and read. The same machine, versions of PyTorch and
            Transformers, number of threads and batch are taken for granted.
        piece_tokens: tokens of a piece in which prompts are computed, which bounds the memory of a
            long prefill; 0 computes them at once, or with `reproducible` in pieces of 1,024.
        state_every: tokens between snapshots of a model's recurrent states, at which prompts can be
            taken up again; 0 chooses by their bytes, so that they take 40 % of those of the K/V.
        store_tail: also keep the last, shorter chunk of a prompt, so that the very same prompt is
            reused to its last token.
        namespace: caches reuse only what was stored under the same namespace.
        codec: how K/V are written: `"safetensors"` as the model has them, `"safetensors-bf16"` or
            `"safetensors-int8"` with fewer bits (approximate, and reported), each compressed with
            `"+zstd"` behind it. Caches find only what was written with the same codec.
        secret: text of 16 characters or more. Who does not know it can neither find what was stored
            under it nor tell from the keys which texts are there.
        seal: keys of 32 bytes, in hexadecimal digits, joined by commas, under which K/V and token
            ids are encrypted in the store. The first one seals, all of them open.
        tags: free text kept in the metadata of every chunk written, `"key=value,…"` by convention.
        metadata: more fields for the metadata of every chunk written, as texts; in the environment
            `"name=value,…"`.
        write: `False` reads only: nothing that is computed reaches the store, and nothing is
            deleted from it.
        on_error: `"compute"` treats a failing store as a miss and reports it; `"raise"` raises
            `StoreError`.
        hooks: what to do where modules have forward hooks, or a replaced `forward`, of yours:
            `"fallback"` computes the whole prompt and stores nothing, since a hook may change K/V
            and a trimmed prompt changes what it sees; `"observers"` promises that they change
            nothing and need not see tokens that are reused. A forward may be done twice.
        min_gain: read known chunks only if computing them takes at least so many times as long, as
            far as both have been timed; 0 reads them always. Text to be moved is always read.
        connect_timeout: seconds to wait for a connection to the store.
        read_timeout: seconds to wait for each answer of the store.
        max_delay: seconds that looking into the store may take one prompt, all its lookups
            together; a store that is slower is not asked for 5 s. Reading what was found does not
            count.
        write_queue_bytes: bytes of RAM that chunks may take while they wait to be written; more
            are dropped.
        ttl: seconds after which chunks are gone, 0 for never.
        refresh_ttl: count them from the last use; `False` counts from the writing.
        pin: keep the chunks written: they do not expire, and others are evicted first.

    Raises:
        SettingError: A value that cannot work, with its name and the remedy.
    """

    reuse: str = "prefix"
    repair: str | Repair = _REPAIR
    variants: str = "any"
    audit_rate: float = 0.0
    audit_bound: float = 0.0
    audit_in: str = BACKGROUND
    chunk_size: int = 128
    chunk_overlap: int = 0
    reproducible: bool = False
    piece_tokens: int = 0
    state_every: int = 0
    store_tail: bool = True
    namespace: str = ""
    codec: str = "safetensors"
    secret: str = field(default="", repr=False)
    seal: str = field(default="", repr=False)
    tags: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    write: bool = True
    on_error: str = "compute"
    hooks: str = "fallback"
    min_gain: float = 1.0
    connect_timeout: float = 0.25
    read_timeout: float = 0.5
    max_delay: float = 0.5
    write_queue_bytes: int = 1 << 30
    ttl: float = 0.0
    refresh_ttl: bool = True
    pin: bool = False

    def __post_init__(self) -> None:
        _one_of("reuse", self.reuse, REUSE_MODES)
        _one_of("variants", self.variants, VARIANTS)
        _one_of("audit_in", self.audit_in, AUDIT_PLACES)
        for name in ("audit_rate", "audit_bound"):
            if (value := getattr(self, name)) != 0:
                _positive(name, value, "number", "or 0 for none")
        if self.audit_rate > 1:
            raise SettingError(f"audit_rate={self.audit_rate!r} must be a share, from 0 to 1")
        _one_of("on_error", self.on_error, ERROR_MODES)
        _one_of("hooks", self.hooks, HOOK_MODES)
        _one_of("codec", self.codec, CODECS)
        if self.codec.endswith(ZSTD):
            _require_zstd()
        _hidden_text("secret", self.secret)
        if 0 < len(self.secret) < SHORTEST_SECRET:
            raise SettingError(
                f"secret has {len(self.secret)} characters, which can be guessed: take at least "
                f"{SHORTEST_SECRET} random ones"
            )
        _hidden_text("seal", self.seal)
        if self.seal:
            Seal.parse(self.seal)
        _integer("chunk_size", self.chunk_size, 1)
        _integer("chunk_overlap", self.chunk_overlap, 0)
        _integer("write_queue_bytes", self.write_queue_bytes, 0)
        if self.chunk_overlap >= self.chunk_size:
            raise SettingError(
                f"chunk_overlap={self.chunk_overlap} must be smaller than "
                f"chunk_size={self.chunk_size}: each chunk has to bring new tokens"
            )
        _integer("piece_tokens", self.piece_tokens, 0)
        _integer("state_every", self.state_every, 0)
        self._check_pieces()
        for name in ("connect_timeout", "read_timeout", "max_delay"):
            _seconds(name, getattr(self, name))
        if self.min_gain != 0:
            _positive("min_gain", self.min_gain, "number", "or 0 to read always")
        if self.ttl != 0:
            _seconds("ttl", self.ttl, "or 0 for no end")
        for name in ("namespace", "tags"):
            _text(name, getattr(self, name))
        _fields(self.metadata)
        object.__setattr__(self, "metadata", dict(self.metadata))
        if self.repair is not _REPAIR:
            _strategy(self.repair)
        for name in ("store_tail", "refresh_ttl", "pin", "write", "reproducible"):
            if not isinstance(value := getattr(self, name), bool):
                raise SettingError(f"{name}={value!r} must be True or False")

    def _check_pieces(self) -> None:
        if self.reuse == "anywhere" and (self.reproducible or self.piece_tokens):
            name = "reproducible" if self.reproducible else "piece_tokens"
            raise SettingError(
                f"{name}={getattr(self, name)!r} excludes reuse='anywhere', which computes what is "
                "missing in one scattered forward: set reuse='prefix'"
            )
        if self.piece_tokens == 1:
            raise SettingError(
                "piece_tokens=1 is too few: some models compute a token by itself otherwise than "
                "among others. Set it to 2 or more (256 and more are fast), or to 0 for no pieces"
            )
        if not self.reproducible:
            return
        if self.codec.removesuffix(ZSTD) != PLAIN:
            raise SettingError(
                f"reproducible=True excludes codec={self.codec!r}, which rounds what it stores: "
                f"set codec={PLAIN!r}"
            )
        if self.chunk_overlap:
            raise SettingError(
                f"reproducible=True excludes chunk_overlap={self.chunk_overlap}: a chunk is a "
                "whole piece then. Set it to 0"
            )

    @property
    def in_pieces(self) -> int:
        """Tokens of a piece, 0 where prompts are computed at once."""
        return self.piece_tokens or (PIECE_TOKENS if self.reproducible else 0)

    @property
    def prepared_only(self) -> bool:
        """Whether nothing but prepared documents is reused."""
        return self.reuse == "anywhere" and self.variants == "prepared"

    @property
    def strategy(self) -> Repair:
        """The repair to apply."""
        return _strategy(self.repair)

    @property
    def sealing(self) -> Seal | None:
        """The keys of `seal`, if there are any."""
        return Seal.parse(self.seal) if self.seal else None

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
        known = {each.name: str(each.type) for each in fields(cls)}
        _reject_unknown(given, known, "keyword argument")
        values: dict[str, Any] = {}
        if path := os.environ.get("CHUNKCACHE_CONFIG"):
            values |= _from_file(Path(path), known)
        _warn_of_misspelt(known)
        for name, kind in known.items():
            if (text := os.environ.get(f"CHUNKCACHE_{name.upper()}")) is not None:
                values[name] = _parse(f"CHUNKCACHE_{name.upper()}", text, kind)
        return cls(**(values | given))


def _strategy(repair: object) -> Repair:
    # Not above: it brings numpy, which takes long to import, and to look into a store needs none.
    from chunkcache.repair import KNOWN, Repair, parse_repair

    if isinstance(repair, str):
        return parse_repair(repair)
    if isinstance(repair, Repair):
        return repair
    raise SettingError(f"repair={repair!r} must be a name or a Repair: {KNOWN}")


def _require_zstd() -> None:
    if find_spec("zstandard") is None:
        raise SettingError(
            "codec='…+zstd' needs the package zstandard: pip install 'chunkcache[zstd]'"
        )


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


def _fields(given: object) -> None:
    if not isinstance(given, Mapping):
        raise SettingError(f"metadata={given!r} must be a mapping, as {{'temperature': '0.7'}}")
    for name, value in given.items():
        if not isinstance(name, str) or not FIELD_NAME.fullmatch(name):
            raise SettingError(
                f"metadata: the name {name!r} must be letters, digits, _, . and -, and not begin "
                "with a digit"
            )
        if name in RESERVED_FIELDS:
            raise SettingError(
                f"metadata: {name!r} is a field that chunks have already: choose another name"
            )
        _text(f"metadata[{name!r}]", value)


def _hidden_text(name: str, value: object) -> None:
    """Like `_text`, with a message that does not show the value."""
    if not isinstance(value, str):
        raise SettingError(f"{name} must be a string, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SettingError(f"{name} must be text that UTF-8 can express") from None


def _integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingError(f"{name}={value!r} must be a whole number of at least {least}")


def _seconds(name: str, value: object, otherwise: str = "") -> None:
    _positive(name, value, "number of seconds", otherwise)


def _positive(name: str, value: object, what: str, otherwise: str = "") -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]
        raise SettingError(f"{name}={value!r} must be a positive {what} {otherwise}".rstrip())


def _reject_unknown(given: Mapping[str, Any], known: Mapping[str, str], what: str) -> None:
    for name in given:
        if name not in known:
            raise SettingError(f"unknown {what} {name!r}: the settings are {', '.join(known)}")


def _warn_of_misspelt(known: Collection[str]) -> None:
    """Tell of variables that are nearly a setting's. Others may be anybody's."""
    for variable in os.environ:
        name = variable.removeprefix("CHUNKCACHE_").lower()
        if variable.startswith("CHUNKCACHE_") and name not in known:
            for meant in get_close_matches(name, known, 1, 0.8):
                right = f"CHUNKCACHE_{meant.upper()}"
                warnings.warn(f"unknown setting {variable}; did you mean {right}?", stacklevel=4)


def _from_file(path: Path, known: Mapping[str, str]) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no TOML
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
        if kind == _PAIRS:
            pairs = [pair.split("=", 1) for pair in text.split(",") if pair.strip()]
            return {key.strip(): value.strip() for key, value in pairs}
        return {"int": int, "float": float}.get(kind, str)(text)
    except ValueError as error:
        raise SettingError(f"{name}={text!r} must be {_IN_WORDS[kind]}") from error
