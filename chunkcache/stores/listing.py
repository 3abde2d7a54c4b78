"""What a server has, page by page, without any of it being used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from chunkcache.stores.base import KV_BYTES, METADATA, Listed
from chunkcache.stores.commands import Commands

SCAN_COUNT = 1000
GLOB = re.compile(rb"[\\*?\[\]]")  # what means something in a pattern


class Listing(Commands):
    """Commands that list entries."""

    def scan(self, prefix: str = "") -> Iterator[list[Listed]]:
        """As in `ChunkStore`. Servers older than Redis 7.2 or Valkey count it as a use."""
        pattern = GLOB.sub(rb"\\\g<0>", prefix.encode(errors="surrogatepass")) + b"*@*"
        names: list[bytes] = []
        cursor = -1
        while cursor:
            with self._store_errors():
                page: Any = self._client.scan(max(cursor, 0), match=pattern, count=SCAN_COUNT)
                cursor, more = page
                names += more
                listed: list[Listed] = []
                if len(names) >= SCAN_COUNT or not cursor:
                    listed, names = self._list(names), []
            if listed:
                yield listed

    def _list(self, names: Sequence[bytes]) -> list[Listed]:
        """The entries to which these halves belong. Those with metadata come with that half."""
        keys = [key for name in names if (key := self._key(name, METADATA))]
        blobs = [key for name in names if (key := self._key(name, KV_BYTES))]
        described = self._ask([("EXISTS", self._names(key)[0]) for key in blobs])
        keys += [key for key, there in zip(blobs, described, strict=True) if there == 0]
        looks: list[tuple[str | bytes, ...]] = []
        for key in keys:
            metadata, blob = self._names(key)
            looks += [("HGETALL", metadata), ("STRLEN", blob)]
        switch = ("CLIENT", "NO-TOUCH")  # older servers refuse it, and serve the rest
        replies = self._ask([(*switch, "ON"), *looks, (*switch, "OFF")])[1:-1]
        with self._store_errors():
            for reply in replies:
                self._check(reply)
        found = zip(keys, replies[::2], replies[1::2], strict=True)
        listed = [
            Listed(key, _paired(fields), size if isinstance(size, int) else 0)
            for key, fields, size in found
        ]
        return [entry for entry in listed if entry.metadata or entry.nbytes]


def decoded(fields: dict[bytes, bytes]) -> dict[str, str]:
    """Metadata as they are read, whatever their bytes."""
    return {
        name.decode(errors="replace"): value.decode(errors="replace")
        for name, value in fields.items()
    }


def _paired(fields: object) -> dict[str, str] | None:
    """The same of a reply as it comes, names and values in turn."""
    if not isinstance(fields, list) or not fields:
        return None
    return decoded(dict(zip(fields[::2], fields[1::2], strict=False)))
