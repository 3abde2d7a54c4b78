"""A store that is looked into and left as it is, for dry runs."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from chunkcache.stores.base import ChunkStore, Entry


class ReadOnly(ChunkStore):
    """Reads from `store`; takes nothing, deletes nothing, and leaves it open.

    What reading alone does to a store (the order of a least-recently-used list, say) it still does.
    """

    def __init__(self, store: ChunkStore) -> None:
        self._store = store

    def __repr__(self) -> str:
        return f"ReadOnly({self._store!r})"

    def sizes(self, keys: Sequence[str]) -> list[int]:
        return self._store.sizes(keys)

    def read(self, keys: Sequence[str]) -> Iterator[memoryview | None]:
        return self._store.read(keys)

    def read_into(
        self, keys: Sequence[str], places: Sequence[Sequence[memoryview]]
    ) -> Generator[bool]:
        return self._store.read_into(keys, places)

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        return self._store.read_metadata(keys)

    def write(self, entries: Sequence[Entry]) -> int:
        """Takes nothing."""
        return 0

    def delete(self, keys: Sequence[str]) -> int:
        """Deletes nothing."""
        return 0
