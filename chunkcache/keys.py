"""ChunkKey: a chunk's name in every store, and the formats that stand in front of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from chunkcache.errors import SettingError

# Of chunks: how the numbers are written, compressed, and sealed.
FORMAT = "safetensors"  # every one begins so
PLAIN, BF16, INT8 = FORMAT, f"{FORMAT}-bf16", f"{FORMAT}-int8"
ZSTD = "+zstd"
CODECS = (PLAIN, BF16, INT8, PLAIN + ZSTD, BF16 + ZSTD, INT8 + ZSTD)
SEALED = "+sealed"
# Of index entries, which name chunks.
INDEX_FORMAT = "anchor"
# What stands behind a chunk's key, of each value that it may have (see `stores/base.py`).
VALUES = ("@metadata", "@kv_bytes", "@outputs", "@state")

_KEY = re.compile(r"([a-z0-9+.-]+)@([^@]*)@(\d{1,9})@(\d{1,9})@([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class ChunkKey:
    """`format@model@world_size@worker@chunk_hash`, the name of one chunk in every store.

    `str(key)` escapes what could be mistaken in `model` (`@`, `%`, spaces, braces), reversibly;
    a store adds one of `VALUES`; in a cluster the hash stands in braces.
    """

    format: str
    model: str
    world_size: int
    worker: int
    chunk_hash: str

    def __str__(self) -> str:
        name = quote(self.model, safe="/:+=,", errors="surrogatepass")
        return f"{self.format}@{name}@{self.world_size}@{self.worker}@{self.chunk_hash}"

    @classmethod
    def parse(cls, text: str) -> ChunkKey:
        """Read a key back, also as a cluster writes it, with or without one of `VALUES` behind it.

        Raises:
            SettingError: The text is not a key of ours.
        """
        name = text.rpartition("@")[0] if text.endswith(VALUES) else text
        name = re.sub(r"@\{([0-9a-f]{64})\}\Z", r"@\1", name)
        if match := _KEY.fullmatch(name):
            format, model, world_size, worker, chunk_hash = match.groups()
            try:
                model = unquote(model, errors="surrogatepass")
                key = cls(format, model, int(world_size), int(worker), chunk_hash)
            except UnicodeDecodeError:
                key = None
            if key is not None and str(key) == name:  # written as we write it, no other way
                return key
        raise SettingError(
            f"{text[:200]!r} is not a chunk key: expected format@model@world_size@worker@chunk_hash"
        )
