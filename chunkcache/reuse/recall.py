"""Recall: what is known of one prompt, brought into the layers; what is not is left to the model.

Chunks known exactly come first, from the start of each row. With `reuse="anywhere"` text that
stood elsewhere follows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from chunkcache.errors import StoreError
from chunkcache.gain import NO_GAIN
from chunkcache.kv.layers import GrowingLayer, settle_all
from chunkcache.kv.rope import KeyMover
from chunkcache.model.scatter import open_layers, scatter_mask
from chunkcache.report import Report
from chunkcache.reuse.anywhere import relocate
from chunkcache.reuse.index import Passage
from chunkcache.reuse.prefill import Rest
from chunkcache.reuse.restore import Filling, known_chunks
from chunkcache.reuse.step import Held, Setup, Step
from chunkcache.reuse.witness import Witness, rounding
from chunkcache.tokens.chunking import Chunk, cut
from chunkcache.tokens.plan import (
    GAPS,
    NOT_IN_STORE,
    OFF,
    WANTED,
    RowPlan,
    Span,
    computed_too,
    plan_row,
)


@dataclass
class Recall:
    """One prompt, or the next part of one, on its way into the layers.

    Attributes:
        setup: Model, store and settings.
        held: What the layers hold. Its transcript has the whole prompt already.
        step: The forward.
        limit: Column from which on all is computed.
        mover: The model's proven rotation; `None` if nothing may be moved.
        device: Where the ids are.
        report: Takes what was done.
    """

    setup: Setup
    held: Held
    step: Step
    limit: int
    mover: KeyMover | None
    device: torch.device
    report: Report

    def run(self) -> tuple[Rest, list[list[Span]]]:
        """Fill the layers.

        Returns:
            What is left to compute, and what happens to each row's tokens.
        """
        step, pads, ids = self.step, self.held.transcript.pads, self.held.transcript.ids()
        self._make_room()
        started = perf_counter()
        text = ids[:, : self.held.transcript.text_until]
        plans, sizes = self._plan([self._cut(text[row, pad:]) for row, pad in enumerate(pads)])
        self.report.lookup_ms += 1e3 * (perf_counter() - started)
        started = perf_counter()
        filling = self._fill(ids, plans, sizes)
        read_ms = 1e3 * (perf_counter() - started)
        self.report.read_ms += read_ms
        self.setup.gauge.note_read(filling.bytes_read, read_ms)
        if self.mover and (found := self._move(ids, filling, self.mover)):
            return found
        known = self.setup.state.ranks.least(min(filling.stops))
        if not any(pad < known for pad in pads):
            known = step.held
        begin = known
        if rows := self._witnesses(known):
            free = self.setup.state.ranks.all(filling.covered(rows) > known)
            begin = known if free else known - 1
        if begin == step.past:
            known = begin  # where one token alone is known, nothing would be gained
        self._hold(begin)
        if known > step.held:
            self._note_rounding(step.held)
        if known > step.past:
            self._watch(begin, rows)
        used = [max(known - pad, 0) for pad in pads]
        step.fresh = [[(start, step.total - pad)] for start, pad in zip(used, pads, strict=True)]
        spans = [plan.spans(start) for plan, start in zip(plans, used, strict=True)]
        return Rest(begin - step.past), spans

    def _make_room(self) -> None:
        held, total = self.held, self.step.total
        if not self.step.held:
            rows, memory = len(held.transcript.pads), self.setup.state.memory
            settle_all(held.layers, held.layout, rows, total, self.device, memory)
            return
        for layer in held.layers:
            if isinstance(layer, GrowingLayer):
                layer.reserve(total)

    def _cut(self, tokens: Tensor) -> list[Chunk]:
        return cut(tokens.numpy(), self.setup.grid, self.held.origin.salt, tail=True)

    def _plan(self, rows: list[list[Chunk]]) -> tuple[list[RowPlan], dict[str, int]]:
        """Ask which chunks are known, and how far each row is known from its start.

        Returns:
            The rows' plans, and the bytes of each known chunk's blob.
        """
        held = [max(self.step.held - pad, 0) for pad in self.held.transcript.pads]
        known: dict[str, int] = {}
        why = self.report.skipped or WANTED
        if self.setup.settings.reuse == "off":
            why = OFF
        elif self.limit > self.step.held:
            why = NOT_IN_STORE
            try:
                known = known_chunks(self.setup.store, rows, held, self.held.origin.key)
            except StoreError as error:
                self._trouble(error)
                why = str(error)
        self.held.known.update(known)
        lengths = [self.step.total - pad for pad in self.held.transcript.pads]
        plans = [
            plan_row(chunks, length, start, known, why)
            for chunks, length, start in zip(rows, lengths, held, strict=True)
        ]
        if self.held.transcript.text_until is not None:
            plans = [replace(plan, rest=GAPS) for plan in plans]
        if not self.mover and not self._pays(plans, known):
            plans = [plan.cut_at(plan.held, NO_GAIN) for plan in plans]
        return plans, known

    def _pays(self, plans: list[RowPlan], sizes: dict[str, int]) -> bool:
        """Whether to read what these plans reuse."""
        stop = min(
            min(pad + plan.reach, self.limit)
            for pad, plan in zip(self.held.transcript.pads, plans, strict=True)
        )
        tokens, hashes = 0, set()
        for pad, plan in zip(self.held.transcript.pads, plans, strict=True):
            tokens += max(0, stop - pad - plan.held)
            hashes |= {chunk.hash for chunk in plan.reads(max(stop - pad, plan.held))}
        nbytes = sum(sizes[name] for name in hashes)
        return self.setup.gauge.pays(tokens, nbytes, self.setup.settings.min_gain)

    def _fill(self, ids: Tensor, plans: list[RowPlan], sizes: dict[str, int]) -> Filling:
        """Read what is known exactly; `plans` are revised where that fails."""
        step, pads = self.step, self.held.transcript.pads
        stops = [
            max(min(self.limit, pad + plan.reach), step.held)
            for pad, plan in zip(pads, plans, strict=True)
        ]
        filling = Filling(
            self.held.origin, sizes, self.held.layers, self.held.layout, ids, pads, plans, stops,
            self.mover is None, self._trouble, step.may_run_ahead and self.mover is None,
        )  # fmt: skip
        filling.run()
        step.arrival = filling.arrival
        self.report.bytes_read += filling.bytes_read
        self.report.bytes_spared += filling.bytes_spared
        self.held.known.difference_update(filling.bad)  # so that they are written anew
        return filling

    def _hold(self, columns: int) -> None:
        for layer in self.held.layers:
            if isinstance(layer, GrowingLayer):
                for row, pad in enumerate(self.held.transcript.pads):
                    layer.blank(row, self.step.held, min(pad, columns))
                layer.hold(columns)

    def _witnesses(self, known: int) -> list[int]:
        """Rows that have tokens to check among the first `known` columns, if these are to be.

        What the caller holds and does not give again is as it is in any cache.
        """
        ends = self.held.transcript.exact_until
        if known == self.step.past or any(end is not None and end < known for end in ends):
            return []
        return [row for row, pad in enumerate(self.held.transcript.pads) if pad < known]

    def _watch(self, column: int, rows: list[int]) -> None:
        """Have the first column that is computed compared with what is in the layers now."""
        if rows:
            held = self.held
            bound = rounding(self.setup.model, held.layout, held.origin.codec)
            self.step.witness = Witness(held.layers, column, rows, bound)

    def _note_rounding(self, column: int) -> None:
        """K/V from this column on came from the store, or will be computed behind such."""
        transcript, origin = self.held.transcript, self.held.origin
        if transcript.lossy_from is None and origin.lossy(self.held.layout):
            transcript.lossy_from = column

    def _move(
        self, ids: Tensor, filling: Filling, mover: KeyMover
    ) -> tuple[Rest, list[list[Span]]] | None:
        """Bring text that stood elsewhere to where it stands now, if there is any."""
        step, transcript = self.step, self.held.transcript
        pads = transcript.pads
        passages = _passages(ids, pads, filling.stops, self.limit)
        try:
            found = relocate(
                self.setup, self.held, step, mover, passages, filling.at_hand, self.report
            )
        except StoreError as error:
            self._trouble(error)
            return None
        if not found:
            return None
        columns, moved = found
        computed = np.zeros(step.total, dtype=bool)
        computed[columns.numpy()] = True
        spans: list[list[Span]] = [[] for _ in pads]
        step.fresh = [[] for _ in pads]
        for part in moved:
            start = part.passage.start
            for row in part.passage.rows:
                reused = [s for s in filling.plans[row].spans(start) if s.stop <= start]
                spans[row] = computed_too(reused, computed[pads[row] :]) + part.spans
                step.fresh[row] = part.fresh
                if transcript.exact_until[row] is None:
                    transcript.exact_until[row] = part.exact_until
        self._hold(step.total)
        if taken := np.flatnonzero(~computed[step.held :]).tolist():
            self._note_rounding(step.held + taken[0])
        exact = min(filling.stops)
        rows = self._witnesses(exact)
        if rows:
            columns = torch.cat([torch.tensor([exact - 1]), columns])
        columns = columns.to(self.device)
        open_layers(self.held.layers, columns, step.total)
        self._watch(exact - 1, rows)
        first = torch.tensor(pads, device=self.device)[:, None]
        mask = scatter_mask(self.setup.model, columns, step.total, len(pads), pads)
        positions = (columns - first).clamp(min=0)
        return Rest(columns=columns - step.past, positions=positions, mask=mask), spans

    def _trouble(self, error: Exception) -> None:
        self.setup.trouble(error, self.report)


def _passages(ids: Tensor, pads: Sequence[int], starts: Sequence[int], stop: int) -> list[Passage]:
    """The distinct rows of a batch. Equal ones (beams, several answers) are one passage.

    Args:
        ids: `[batch, columns]` token ids, on the CPU.
        pads: Columns of left padding of each row.
        starts: Column where the exact beginning of each row ends.
        stop: Column where the tokens begin whose outputs are wanted.
    """
    alike: defaultdict[bytes, list[int]] = defaultdict(list)
    for row, pad in enumerate(pads):
        alike[ids[row, pad:].numpy().tobytes()].append(row)
    passages = []
    for rows in alike.values():
        pad, start = pads[rows[0]], min(starts[row] for row in rows)
        tokens = ids[rows[0], pad:].numpy()
        passages.append(Passage(tokens, max(start - pad, 0), stop - pad, tuple(rows), pad))
    return passages
