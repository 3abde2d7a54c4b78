"""States: snapshots of recurrent and convolution states, at which a prompt can be taken up again.

K/V serve to the token, a state only where it was copied. So the prompt of a model with states goes
on from the last chunk that has both, and is computed in pieces that end where a snapshot is worth
its bytes: shortly before the prompt's end, where known K/V go on without a state (a second prompt
with that beginning will start there), every so many tokens, and where the user says so. Windows of
convolutions are small and can be cut out of any forward: each chunk has them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from chunkcache.kv.layers import growing
from chunkcache.kv.layout import KVLayout
from chunkcache.kv.states import keep_windows, put_states, take_states, take_windows
from chunkcache.reuse.blobs import BlobReader, PendingTensors
from chunkcache.reuse.context import CacheContext
from chunkcache.reuse.harvest import extra_entry
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.stores.base import STATE, Entry
from chunkcache.stores.locks import Latch
from chunkcache.tokens.chunking import Chunk, Tokens
from chunkcache.tokens.plan import RowPlan

ALIGNMENT = 64  # scans are computed in pieces of so many tokens: cut there, nothing is rounded anew
# The last tokens of a prompt (the beginning of an answer, stripped thinking) change from turn to
# turn; a snapshot among them would be of no use.
LAST_TOKENS = 8
# By default, snapshots are so far apart that their bytes are this share of those of the K/V.
SHARE = 0.4
_KEPT, _KEPT_WINDOWS = 3, 64


def spacing(layout: KVLayout, chosen: int) -> int:
    """Tokens between snapshots on the way: those that the user chose, else by their bytes."""
    return chosen or max(ALIGNMENT, int(layout.state_bytes / (SHARE * layout.token_bytes)))


class States:
    """Snapshots of one conversation of one row.

    Args:
        context: Model, store and settings.
        layout: What the model's layers cache.
        cuts_windows: Whether all states are windows, which can be cut at any token of a forward.

    Attributes:
        value: The last part of the keys of snapshots.
        held: States `[...]` of the row by the column that they stand before, the newest last.
        sizes: Bytes of the snapshots that the store has, by the hash of the chunk before them.
    """

    def __init__(self, context: CacheContext, layout: KVLayout, cuts_windows: bool) -> None:
        self.held: dict[int, Sequence[Tensor]] = {}
        self.value = STATE
        self.sizes: dict[str, int] = {}
        self._context, self._layout, self._cuts_windows = context, layout, cuts_windows
        self._every = spacing(layout, context.settings.state_every)
        self._wanted: list[int] = []  # columns, in order
        self._begin = 0  # of the forward that runs
        self._past = 0  # column to which such a forward may have to be gone back
        self._taken: set[int] = set()  # columns whose snapshot is new

    def nearest(self, columns: int) -> int:
        """The last of the first `columns` at which a snapshot is held, or 0."""
        return max((column for column in self.held if column <= columns), default=0)

    def put(self, layers: Sequence[Any], column: int) -> None:
        """Have layers hold a snapshot that is held here."""
        device = growing(layers)[0].device
        put_states(layers, self._layout.states, [self.held[column]], device)

    def go_to(self, layers: Sequence[Any], column: int, past: int) -> None:
        """The same ahead of `past` columns, to which it may have to be gone back."""
        if past and past not in self.held:
            self.held[past] = take_states(layers)
        self._past = past
        self.put(layers, column)

    def forget(self, columns: int = 0) -> None:
        """What is held behind the first columns is no longer."""
        self.held = {at: states for at, states in self.held.items() if at <= columns}
        self._taken &= self.held.keys()

    # ------------------------------------------------------------------ what is known

    @staticmethod
    def boundaries(chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks at whose end a snapshot may be."""
        return [c for c in chunks if c.stop % ALIGNMENT == 0] or list(chunks)

    def settle(self, plan: RowPlan, limit: int) -> RowPlan:
        """The plan, cut where the last snapshot before `limit` is.

        What is held is gone on from where no snapshot is farther on.
        """
        ends = self.boundaries(plan.chunks)
        usable = min(plan.reach, limit)
        known = [
            c.stop for c in plan.chunks if self.sizes.get(c.hash) and plan.held < c.stop <= usable
        ]
        stop = max(known, default=plan.held)
        if usable - stop < ALIGNMENT:
            return plan.cut_at(stop, plan.missing)
        nearest = f"nearest state {stop:,}" if stop else "no state"
        told = f"K/V known to {plan.reach:,}, {nearest}: {usable - stop:,} tokens computed again"
        new = max((c.stop for c in ends if c.stop <= usable), default=0)
        if new > stop and self._context.settings.write:
            told += f"; a state is stored at {new:,} now"
        return replace(plan.cut_at(stop, told), unread=told)

    def read(
        self,
        keys: KeySpace,
        plan: RowPlan,
        row: Tokens,
        device: torch.device,
        handle_error: Callable[[Exception], None],
    ) -> tuple[Sequence[Tensor] | None, int]:
        """The snapshot where the plan ends, `None` if it cannot be had; and bytes read."""
        chunk = next(c for c in plan.chunks if c.stop == plan.reach)
        ids = row[chunk.start : chunk.stop].tolist()
        form = keys.state_form(ids, chunk.start, chunk.hash)
        reader = BlobReader(self._context.store, handle_error)
        pending = PendingTensors(chunk.hash, form, self.sizes[chunk.hash], device=device)
        reader.read_tensors([pending])
        if pending.failure:
            self.sizes.pop(chunk.hash)
            return None, reader.bytes_read
        return pending.tensors, reader.bytes_read

    # ------------------------------------------------------------------ as the model computes

    def cuts(
        self,
        chunks: Sequence[Chunk],
        begin: int,
        known: int,
        limit: int,
        total: int,
        marks: Iterable[int],
    ) -> list[int]:
        """Columns at which a forward from `begin` on is cut to take snapshots.

        Args:
            chunks: The row's.
            begin: The first column that is computed.
            known: How far K/V are known.
            limit: Column from which on outputs are wanted, which come of one piece.
            total: Columns once the prompt is done.
            marks: Columns that the user wants snapshots at, or shortly before.
        """
        self._taken.clear()  # of an earlier forward, which has stored them or may not
        ends = [c.stop for c in self.boundaries(chunks) if begin < c.stop <= limit]
        if self._cuts_windows:
            self._wanted = ends
            return []
        final = max((end for end in ends if end <= total - LAST_TOKENS), default=0)
        wanted = {final}
        wanted |= {max((end for end in ends if end <= mark), default=0) for mark in marks}
        wanted.add(max((end for end in ends if end <= known), default=0))
        last = begin
        for end in ends:
            if end - last >= self._every and final - end >= self._every // 2:
                wanted.add(end)
            if end in wanted:
                last = end
        self._wanted = sorted(wanted - {0})
        return self._wanted

    def expect(self, layers: Sequence[Any], begin: int) -> None:
        """A forward, or a piece of one, begins at this column."""
        self._begin = begin
        if self._cuts_windows:
            keep_windows(layers, [column - begin for column in self._wanted if column > begin])

    def take(self, layers: Sequence[Any], stop: int) -> None:
        """It has come back at this one: keep the snapshots that it passed."""
        for column in self._wanted:
            if not self._begin < column <= stop:
                continue
            if self._cuts_windows:
                states = take_windows(layers, column - self._begin)
            else:
                states = take_states(layers) if column == stop else None
            if states is not None:
                self.held.pop(column, None)
                self.held[column] = states
                self._taken.add(column)
        if self._cuts_windows:
            keep_windows(layers, ())
        self._keep_recent()

    def take_step(self, layers: Sequence[Any], column: int, chunks: Sequence[Chunk]) -> None:
        """A decoding step has come back at this one: keep a snapshot if it is time for one."""
        ends = self.boundaries(chunks)
        least = 0 if self._cuts_windows else self._every
        if not ends or ends[-1].stop != column or column - self.nearest(column) < least:
            return
        self.held[column] = take_states(layers)
        self._taken.add(column)
        self._keep_recent()

    def _keep_recent(self) -> None:
        most = _KEPT_WINDOWS if self._cuts_windows else _KEPT
        recent = {self._past, *list(self.held)[-max(most, len(self._taken)) :]}
        self.held = {at: states for at, states in self.held.items() if at in recent}

    def entries(
        self,
        keys: KeySpace,
        chunks: Sequence[Chunk],
        row: Tokens,
        stored: Collection[str],
        certain: int,
        may_copy: Latch,
    ) -> list[Entry]:
        """Snapshots to be stored: new ones, behind chunks whose K/V the store has or was given."""
        entries, before = [], []
        for chunk in chunks:
            before.append(keys.key(chunk.hash))
            is_wanted = chunk.stop in self._taken and chunk.hash in stored
            if not is_wanted or chunk.stop > certain or self.sizes.get(chunk.hash):
                continue
            ids = row[chunk.start : chunk.stop].tolist()
            form = keys.state_form(ids, chunk.start, chunk.hash)
            pin = self._context.settings.pin
            entries.append(extra_entry(form, self.held[chunk.stop], chunk, before, pin, may_copy))
            self.sizes[chunk.hash] = entries[-1].nbytes
        self._taken.clear()
        return entries
