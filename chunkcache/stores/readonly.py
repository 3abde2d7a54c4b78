"""A store that is looked into and left as it is: for dry runs, and caches with `write=False`."""

from __future__ import annotations

from collections.abc import Sequence

from chunkcache.errors import StoreError
from chunkcache.stores.base import Entry, ReadsFrom


class ReadOnly(ReadsFrom):
    """Reads from `store`; takes nothing, deletes nothing, and leaves it open.

    What reading alone does to a store (the order of a least-recently-used list, say) it still does.
    """

    def __repr__(self) -> str:
        return f"ReadOnly({self.store!r})"

    def write(self, entries: Sequence[Entry]) -> int:
        """Takes nothing."""
        return 0

    def check_writable(self) -> None:
        raise StoreError(f"{self!r} takes no changes: open the store itself", "read_only")

    def delete(self, keys: Sequence[str]) -> int:
        """Deletes nothing."""
        return 0
