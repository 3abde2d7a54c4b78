"""StatefulPrefill: a prompt of a model with recurrent or convolution states (see `states.py`).

K/V serve to the token, a state only where it was copied: so what is known of a row ends where both
are there, and no known token is computed again to check the others. Rows of a batch behind nothing
are brought up one by one (see `rows.py`); behind tokens that are held, they are computed.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Any

from chunkcache.reuse.hook import TrimSpec
from chunkcache.reuse.prefill import Beside, Prefill
from chunkcache.reuse.states import States
from chunkcache.stores.base import Entry
from chunkcache.stores.locks import Latch
from chunkcache.tokens.plan import RowPlan


class StatefulPrefill(Prefill):
    """Prefill for models with states: goes on only where K/V and a snapshot end together."""

    no_outputs = "outputs of models with recurrent or convolution states are not kept"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kv_reach = 0  # how far the row's K/V are known, with or without a state there

    @property
    def states(self) -> States:
        """The snapshots of what is held."""
        assert self.conversation.states is not None, "a model without is not computed so"
        return self.conversation.states

    @property
    def _is_one_row(self) -> bool:
        """Whether there is one row without padding: its columns are positions, as snapshots are."""
        return len(self.pads) == 1 and not self.pads[0]

    # ------------------------------------------------------------------ what is known

    @property
    def limit(self) -> int:
        """Column from which on all is computed."""
        return super().limit if self._is_one_row else self.held

    @property
    def _beside(self) -> Beside | None:
        return self.states

    def _settle(self, dry: bool) -> None:
        self._kv_reach = self.plans[0].reach
        if self.limit > self.held:
            self.plans = [self.states.settle(self.plans[0], self.limit)]

    # ------------------------------------------------------------------ into the layers

    def load(self) -> None:
        """Bring K/V and a state that stand at the same token."""
        self._make_room()
        if not self._is_one_row:
            self._load_chunks(self.plans, self.stops)
            return
        self._load_state()
        plans, stops = self._with_a_check()
        self._load_chunks(plans, stops)
        self.stops = [min(self.stops[0], stops[0])]
        if self.stops[0] < self.plans[0].reach:  # damaged K/V
            self._settle_at(self.stops[0])
            self._load_state()

    def _load_state(self) -> None:
        """Bring the state where the plan ends; where that fails, an earlier one or none."""
        began = perf_counter()
        while self.stops[0] > self.held:
            plan = self.plans[0]
            found, nbytes = self.states.read(
                self.keys, plan, self._tokens(0), self.call.place, self._handle
            )
            self.report.bytes_read += nbytes
            if found is not None:
                self.states.held[plan.reach] = found
                break
            self._settle_at(plan.reach)
        self.report.read_ms += 1e3 * (perf_counter() - began)

    def _settle_at(self, known: int) -> None:
        """Plan to go on from a state where K/V, or a state, were known and are not."""
        plan = self.plans[0].cut_at(known, self.plans[0].missing)
        self.plans = [self.states.settle(plan, self.limit)]
        self.stops = [self.plans[0].reach]

    def _with_a_check(self) -> tuple[list[RowPlan], list[int]]:
        """What to read so that the first token computed is a check token, if there are its K/V.

        A state cannot be gone back from, so no known token is computed again.
        """
        plan, stop = self.plans[0], self.stops[0]
        ahead = [c for c in plan.chunks if c.start == stop and c.stop <= self._kv_reach]
        if not ahead or stop <= self.held:
            return [plan], [stop]
        return [replace(plan, reach=ahead[0].stop)], [stop + 1]

    def _count_read(self) -> None:
        for name in self._reader.bad:  # whose snapshots were removed with them
            self.states.sizes.pop(name, None)
        super()._count_read()

    # ------------------------------------------------------------------ what is left

    def trim(self) -> TrimSpec:
        """As in `Prefill`, with the states that stand before the first column computed."""
        trim = super().trim()
        begin, layers = self.past + trim.skip, self.conversation.layers
        if begin > self.held:
            self.states.go_to(layers, begin, self.past)
        self.states.expect(layers, begin)
        return trim

    def _known_columns(self) -> int:
        known = super()._known_columns()
        return known if known in self.states.held else self.held

    def _first(self, known: int) -> tuple[int, list[int]]:
        begin, rows = super()._first(known)
        return known, rows if begin == known else []

    def _wanted_cuts(self, begin: int) -> set[int]:
        cuts = super()._wanted_cuts(begin)
        if self.plans and self._is_one_row:
            cuts |= set(
                self.states.cuts(
                    self.plans[0].chunks,
                    begin,
                    self._kv_reach,
                    self.outputs_from,
                    self.total,
                    self.conversation.marks,
                )
            )
        return cuts

    # ------------------------------------------------------------------ the model has computed

    def end_piece(self, columns: int) -> None:
        """As in `Prefill`; snapshots are taken where it has ended."""
        if states := self.conversation.states:
            states.take(self.conversation.layers, self.past + columns)
            states.expect(self.conversation.layers, self.past + columns)
        self.conversation.note_states()
        super().end_piece(columns)

    def finish(self) -> bool:
        """As in `Prefill`, likewise."""
        if states := self.conversation.states:
            states.take(self.conversation.layers, self.total)
        return super().finish()

    def _more_entries(self, certain: int, may_copy: Latch) -> list[Entry]:
        if not self._is_one_row:
            return []
        return self.states.entries(
            self.keys, self.plans[0].chunks, self._tokens(0), self.conversation.known,
            self.conversation.transcript.exact_lengths(certain)[0], may_copy,
        )  # fmt: skip
