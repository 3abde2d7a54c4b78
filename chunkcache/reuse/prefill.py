"""Prefill: one forward that reads a prompt, or its next part, from what is known to what is stored.

Its methods stand in the order of time: `plan` asks what the store has, `load` brings it into the
layers, `trim` says what is left to the model, and once that has come back `finish` says whether its
outputs may be believed, and stores what is new. One object, made for this forward, owns all that
happens in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

import numpy as np
from torch import nn

from chunkcache.errors import BlobError, StoreError
from chunkcache.gain import NO_GAIN
from chunkcache.kv.coding import BlobFormat
from chunkcache.kv.layers import allocate_all, hold_all, reserve_all
from chunkcache.model.foreign import has_outer_hooks
from chunkcache.model.scatter import close_layers
from chunkcache.report import Report, RowReport
from chunkcache.reuse.background import BackgroundLoad
from chunkcache.reuse.blobs import WRONG_SIZE, BlobReader, PendingChunk
from chunkcache.reuse.continuations import (
    WINDOW,
    Branch,
    Continuation,
    find_continuations,
)
from chunkcache.reuse.conversation import Conversation
from chunkcache.reuse.harvest import Found
from chunkcache.reuse.hook import ForwardCall, TrimSpec
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.reuse.load import ChunkLoader
from chunkcache.reuse.outputs import Outputs, outputs_of
from chunkcache.reuse.pieces import Pieces, environment
from chunkcache.reuse.stopwatch import Stopwatch
from chunkcache.reuse.witness import Witness, rounding
from chunkcache.stores.base import STATE, Entry
from chunkcache.tokens.chunking import Chunk, Tokens, cut
from chunkcache.tokens.plan import (
    COMPUTING,
    GAPS,
    HELD,
    NOT_IN_STORE,
    OFF,
    WANTED,
    Kind,
    RowPlan,
    Span,
    plan_row,
)


class Prefill:
    """See the module.

    Args:
        conversation: What is held, and of which model.
        module: The model that was called.
        call: The prompt.
        report: Takes what was done.
        past: Columns that stand before the ids given.
        held: Columns that are held; more than `past` where a whole prompt was given whose beginning
            is held.
        as_plain: Whether what is held is kept as a `DynamicCache` would, though its tokens alone do
            not name it.
        again: Whether the same forward is done for a second time.

    Attributes:
        total: Columns once it is done.
        lookup_failed: Whether the store could not say what it has.
        plans: What is to be read of each row; revised where a read fails.
        stops: Up to which column each row is known.
        sizes: Bytes of the blobs that the store has, by chunk hash; 0: gone or damaged.
        forms: Forms (key, header and encoding) of the blobs that may be read, by chunk hash.
        spans: What happens to each row's tokens, for the report.
        stale: Index entries to correct: by key, what shall replace them.
    """

    computes_together = True
    """Whether what one row has to compute is computed in all."""

    def __init__(
        self,
        conversation: Conversation,
        module: nn.Module,
        call: ForwardCall,
        report: Report,
        *,
        past: int = 0,
        held: int = 0,
        as_plain: bool = False,
        again: bool = False,
    ) -> None:
        self.conversation, self.context = conversation, conversation.context
        self.module, self.call, self.report = module, call, report
        self.past, self.held, self.total = past, held, past + call.new
        self.lookup_failed = False
        self.plans: list[RowPlan] = []
        self.stops: list[int] = []
        self.sizes: dict[str, int] = {}
        self.forms: dict[str, BlobFormat] = {}
        self.spans: list[list[Span]] = []
        self.stale: dict[str, Entry] = {}
        self._continuations: dict[str, Continuation] = {}
        self._as_plain = as_plain
        # Whether the model may begin before all K/V are here: all ids were given, so that it can
        # be done again.
        self._may_run_ahead = not past and not again and self.context.may_do_again
        self._reader = BlobReader(self.context.store, self._handle)
        self._loader: ChunkLoader | None = None
        self._background: BackgroundLoad | None = None
        self._witness: Witness | None = None
        self._known: list[int] = []  # how far each row's K/V are, with or without a state there
        self._off_by: float | None = None  # what the check token has shown, where it was a piece
        self._whole = call.whole  # why all is computed
        self._outputs: Outputs | None = None  # where logits of several tokens are wanted
        self._stopwatch: Stopwatch | None = None  # since the model began

    @staticmethod
    def check_model(conversation: Conversation) -> None:
        """Raise UnsupportedModelError if a model that was looked at is not for this kind of reuse.

        No model is refused here: what cannot be reused is computed.
        """

    def begin(self) -> TrimSpec:
        """Fill the layers with what is known. Returns what is left to compute."""
        with self.context.store_calls(self.report):
            if self.bypass_reason():
                trim = self._bypass()
            else:
                self._seek_outputs()
                self.plan()
                self._read_outputs()
                self.load()
                trim = self.trim()
                self._report_prompt()
        self.conversation.note_written()
        self._stopwatch = Stopwatch(self.call.place)
        return trim

    # ------------------------------------------------------------------ what is known

    def bypass_reason(self) -> str:
        """Why the prompt is computed as with a plain cache, or `""`. Else its tokens are noted."""
        conversation = self.conversation
        conversation.begin_prompt(self.module, self.call, self.past, self.held, self.total)
        if not conversation.bypass_reason:
            assert self.call.ids is not None
            conversation.transcript.append(self.call.ids[:, self.held - self.past :])
            conversation.choose_keys()
        return conversation.bypass_reason

    def plan(self, dry: bool = False) -> None:
        """Ask which chunks are known, and how far each row is known from its start.

        `dry` means that nothing is read afterwards.
        """
        began = perf_counter()
        report, transcript = self.report, self.conversation.transcript
        gaps = "" if transcript.text_until is None else GAPS
        report.skipped = self._whole or gaps
        rows = [
            cut(self._tokens(row), self.context.grid, self.keys.salt, tail=True)
            for row in range(len(self.pads))
        ]
        held = [max(self.held - pad, 0) for pad in self.pads]
        why = report.skipped or WANTED
        if self.context.settings.reuse == "off":
            why = OFF
        elif self.limit > self.held:
            why = self._look_up(rows, held)
        self.conversation.known |= self.sizes.keys()
        self.plans = [
            plan_row(chunks, self.total - pad, start, self.sizes, why)
            for chunks, pad, start in zip(rows, self.pads, held, strict=True)
        ]
        if gaps:
            self.plans = [replace(plan, rest=GAPS) for plan in self.plans]
        self._stop_at_wrong_sizes()
        if self._outputs:
            report.skipped = self._outputs.settle(self.plans) or report.skipped
        elif states := self.conversation.states:
            self._known = [plan.reach for plan in self.plans]
            if self.limit > self.held:
                self.plans = [states.settle(plan, self.limit) for plan in self.plans]
        elif self.sizes or (not self.lookup_failed and self.context.settings.reuse != "off"):
            self._follow_branches(dry)
        if self._reads_together and not self._pays(dry):
            self.plans = [plan.cut_at(plan.held, NO_GAIN) for plan in self.plans]
        self.stops = [
            max(self.pieces.usable(min(self.limit, pad + plan.reach)), self.held)
            for pad, plan in zip(self.pads, self.plans, strict=True)
        ]
        if self._reads_together:
            self.stops = [min(self.stops)] * len(self.stops)
        report.lookup_ms += 1e3 * (perf_counter() - began)

    @property
    def limit(self) -> int:
        """Column from which on all is computed, since its outputs are wanted."""
        if self._outputs:
            return max(self.held, self._outputs.limit)
        if self.conversation.states and not self._is_one_row:
            return self.held  # rows go on from states at other columns: see `rows.py`
        if not self.conversation.is_as_a_prompt(self.held):
            return self.held
        return self.outputs_from if self._is_in_whole_pieces else self.held

    @property
    def _is_one_row(self) -> bool:
        """Whether there is one row without padding: its columns are positions, as snapshots are."""
        return len(self.pads) == 1 and not self.pads[0]

    @property
    def outputs_from(self) -> int:
        """Column from which on outputs are wanted of the model."""
        if self.call.whole:
            return self.held
        return max(self.held, self.total - max(self.call.keep, self.conversation.least))

    @property
    def _is_in_whole_pieces(self) -> bool:
        """Whether all that is held was computed in whole pieces, where that matters."""
        return not self.pieces.reproducible or self.held <= self.conversation.whole_pieces

    @property
    def pieces(self) -> Pieces:
        """Where the forward is cut."""
        return self.context.pieces

    @property
    def keys(self) -> KeySpace:
        """Where chunks of the model are found."""
        assert self.conversation.keys is not None, "a model without keys is bypassed"
        return self.conversation.keys

    @property
    def pads(self) -> list[int]:
        """Columns of left padding of each row."""
        return self.conversation.transcript.pads

    @property
    def _reads_together(self) -> bool:
        """Whether no row is read further than the row known least far, as in prefix reuse."""
        return True

    def _tokens(self, row: int) -> Tokens:
        """A row's tokens, `[tokens]`, as far as they are text."""
        transcript = self.conversation.transcript
        tokens: Tokens = transcript.ids()[row, self.pads[row] : transcript.text_until].numpy()
        return tokens

    def _look_up(self, rows: Sequence[Sequence[Chunk]], held: Sequence[int]) -> str:
        """Ask for all chunks in one round trip. Returns why others are not known."""
        hashes = dict.fromkeys(
            chunk.hash
            for chunks, start in zip(rows, held, strict=True)
            for chunk in chunks
            if chunk.stop > start
        )
        try:
            names = [self.keys.key(name) for name in hashes]
            if self._outputs:
                names += map(self._outputs.key, hashes)
            elif self.conversation.states:
                names += [self.keys.key(name) + STATE for name in hashes]
            sizes = self.context.store.sizes(names) if names else []
        except StoreError as error:
            self.lookup_failed = True
            self._handle(error)
            return str(error)
        self.sizes = {name: size for name, size in zip(hashes, sizes, strict=False) if size}
        if self._outputs:
            found = zip(hashes, sizes[len(hashes) :], strict=True)
            self._outputs.sizes = {name: size for name, size in found if size}
        elif self.conversation.states:
            found = zip(hashes, sizes[len(hashes) :], strict=True)
            self.conversation.states.sizes = {name: size for name, size in found if size}
        return NOT_IN_STORE

    def _stop_at_wrong_sizes(self) -> None:
        """Read no row as far as a blob whose length tells that it is damaged."""
        for row, plan in enumerate(self.plans):
            for chunk in plan.chunks:
                if chunk.hash in self.sizes and chunk.hash not in self.forms:
                    ids = self._tokens(row)[chunk.start : chunk.stop].tolist()
                    self.note_form(chunk.hash, self.keys.form(ids, chunk.start, chunk.hash))
                if chunk.hash in self.damaged:
                    start = max(chunk.start, plan.held)
                    self.plans[row] = self.plans[row].cut_at(start, WRONG_SIZE)

    def _follow_branches(self, dry: bool) -> None:
        """Go on with stored chunks that begin like a row where its own chunks end."""
        if self.pieces.reproducible:
            return  # where a chunk ends short, so does a piece
        branches = [
            Branch.of(plan, self._tokens(row), self.limit - pad)
            for row, (plan, pad) in enumerate(zip(self.plans, self.pads, strict=True))
        ]
        if all(branch.stop - branch.start < WINDOW for branch in branches):
            return
        try:
            found, self.stale = find_continuations(self.context.store, self.keys, branches)
            self._look_up_continuations(found, dry)
        except StoreError as error:
            self._handle(error)
            return
        for row, (branch, continuations) in enumerate(zip(branches, found, strict=True)):
            for each in continuations:
                if each.is_whole and not each.pinned:
                    shorter = self.conversation.shorter.setdefault(
                        (branch.parent, branch.start), {}
                    )
                    shorter[each.chunk.hash] = each.chunk.stop
            plan = self.plans[row]
            best = next((c for c in continuations if self.sizes.get(c.chunk.hash)), None)
            if best and best.chunk.stop > plan.reach:
                self.plans[row] = plan.extended(best.chunk)
                self._continuations[best.chunk.hash] = best
                if best.chunk.stop == plan.tokens:  # nothing of the row is missing in the store
                    self.conversation.known |= {c.hash for c in plan.chunks if c.stop > plan.reach}

    def _look_up_continuations(self, found: Sequence[Sequence[Continuation]], every: bool) -> None:
        """Take down the forms of what may be read, and ask for sizes that these do not tell."""
        unknown = []
        for row in found:
            for chunk, tokens, *_ in row:
                if chunk.hash not in self.sizes:
                    form = self.keys.form(tokens.tolist(), chunk.start, chunk.hash)
                    self.forms[chunk.hash], self.sizes[chunk.hash] = form, form.nbytes or 0
                    unknown += [form] if every or form.nbytes is None else []
                if self.sizes[chunk.hash] and not every:
                    break  # the rest will not be read
        if unknown:
            sizes = self.context.store.sizes([form.key for form in unknown])
            for form, size in zip(unknown, sizes, strict=True):
                self.sizes[form.key.rpartition("@")[2]] = size if form.may_have(size) else 0

    def note_form(self, chunk_hash: str, form: BlobFormat) -> None:
        """Take down the form of a blob that the store has, and whether its length is right."""
        self.forms[chunk_hash], size = form, self.sizes[chunk_hash]
        if size and not form.may_have(size):
            self.sizes[chunk_hash] = 0
            self._reader.reject(PendingChunk(chunk_hash, form, size), BlobError(WRONG_SIZE))

    def continuation(self, plan: RowPlan) -> Continuation | None:
        """The stored chunk that goes on like a row, if there is one."""
        return self._continuations.get(plan.branch.hash) if plan.branch else None

    @property
    def damaged(self) -> set[str]:
        """Hashes of chunks whose blob is missing or damaged, as far as is known."""
        return self._reader.bad

    def _pays(self, dry: bool) -> bool:
        """Whether to read what the plans reuse."""
        reach = (pad + plan.reach for pad, plan in zip(self.pads, self.plans, strict=True))
        stop = min(self.limit, *reach)
        tokens, hashes = 0, set()
        states = self.conversation.states
        for pad, plan in zip(self.pads, self.plans, strict=True):
            tokens += max(0, stop - pad - plan.held)
            hashes |= {chunk.hash for chunk in plan.reads(max(stop - pad, plan.held))}
        nbytes, gauge = sum(self.sizes[name] for name in hashes), self.context.gauge
        nbytes += self.keys.layout.state_bytes if states and tokens else 0
        ask = gauge.expects_gain if dry else gauge.pays
        return ask(tokens, nbytes, self.context.settings.min_gain)

    # ------------------------------------------------------------------ outputs of what is known

    def _seek_outputs(self) -> None:
        """Where logits of several tokens are wanted, and may be had of known ones, see to that."""
        if not self.call.scores:
            return
        found = outputs_of(
            self.context, self.keys, self.call, self.conversation.transcript, self.total,
            self._handle,
        )  # fmt: skip
        if isinstance(found, Outputs):
            self._outputs, self._whole = found, ""
        elif self._whole:
            self._whole = f"{self._whole}; {found}"

    def _read_outputs(self) -> None:
        """Bring them; where that fails, more is computed."""
        if self._outputs is None or min(self.stops) <= self.held:
            return
        began = perf_counter()
        self.report.bytes_read += self._outputs.read(self.plans, min(self.stops))
        self.report.read_ms += 1e3 * (perf_counter() - began)
        self.stops = [min(stop, self.limit) for stop in self.stops]

    # ------------------------------------------------------------------ into the layers

    def load(self) -> None:
        """Bring what is known into the layers, or let it come while the model computes."""
        self._make_room()
        if self.conversation.states:
            self._load_states()
        self._load_chunks()
        if self.conversation.states and self.stops[0] < self.plans[0].reach:  # damaged K/V
            self._settle_states(self.stops[0])
            self._load_states()

    def _load_chunks(self) -> None:
        plans, stops = self.plans, self.stops
        if self.conversation.states:
            plans, stops = self._with_a_check()
        began = perf_counter()
        self._loader = ChunkLoader(
            self._reader, self.conversation.layers, self.pads, self._reads_together
        )
        # Hooks should not see what is thrown away.
        hooked = self.context.state.foreign or has_outer_hooks(self.context.model)
        ahead = self._may_run_ahead and self._reads_together and not hooked
        ahead = ahead and self.context.gauge.trusts_store
        self._background = self._loader.load(
            plans, stops, self.sizes, self.forms, self.total if ahead else 0
        )
        if self.conversation.states:
            self.stops = [min(self.stops[0], stops[0])]
        read_ms = 1e3 * (perf_counter() - began)
        self.report.read_ms += read_ms
        self.context.gauge.note_read(self._reader.bytes_read, read_ms)
        self._count_read()

    def _load_states(self) -> None:
        """Bring the states where the plan ends; where that fails, an earlier one or none."""
        states, began = self.conversation.states, perf_counter()
        assert states is not None
        while self.stops[0] > self.held:
            plan = self.plans[0]
            found, nbytes = states.read(self.keys, plan, self._tokens(0), self._handle)
            self.report.bytes_read += nbytes
            if found is not None:
                states.held[plan.reach] = found
                break
            self._settle_states(plan.reach)
        self.report.read_ms += 1e3 * (perf_counter() - began)

    def _settle_states(self, known: int) -> None:
        """Plan to go on from a state where K/V, or a state, were known and are not."""
        assert self.conversation.states is not None
        plan = self.plans[0].cut_at(known, self.plans[0].missing)
        self.plans = [self.conversation.states.settle(plan, self.limit)]
        self.stops = [self.plans[0].reach]

    def _with_a_check(self) -> tuple[list[RowPlan], list[int]]:
        """What to read so that the first token computed is a check token, if there are its K/V.

        A state cannot be gone back from, so no known token is computed again.
        """
        plan, stop = self.plans[0], self.stops[0]
        ahead = [c for c in plan.chunks if c.start == stop and c.stop <= self._known[0]]
        if not ahead or stop <= self.held:
            return [plan], [stop]
        return [replace(plan, reach=ahead[0].stop)], [stop + 1]

    def _make_room(self) -> None:
        layers = self.conversation.layers
        if not self.held:
            device, memory = self.call.place, self.context.state.memory
            allocate_all(layers, self.keys.layout, len(self.pads), self.total, device, memory)
            return
        reserve_all(layers, self.total)

    def _count_read(self) -> None:
        """Take down what was read since it was counted last."""
        reader = self._reader
        self.report.bytes_read += reader.bytes_read
        self.report.bytes_saved += reader.bytes_saved
        reader.bytes_read = reader.bytes_saved = 0
        self.conversation.known -= reader.bad  # so that they are written anew
        if self.conversation.states:  # which were removed with them
            for name in reader.bad:
                self.conversation.states.sizes.pop(name, None)
        for name in reader.bad & self._continuations.keys():
            self.stale |= self._continuations.pop(name).without_it()

    # ------------------------------------------------------------------ what is left

    def trim(self) -> TrimSpec:
        """Declare what is known to be held. Returns what is left to compute."""
        assert self._loader is not None
        known = self.context.state.ranks.least(max(self.pieces.usable(min(self.stops)), self.held))
        if not any(pad < known for pad in self.pads):
            known = self.held
        begin = known
        states = self.conversation.states
        if states and known not in states.held:
            known = begin = self.held
        if rows := self._checked_rows(known):
            free = self.context.state.ranks.all(self._loader.covered(rows) > known)
            begin = known if free or states else known - 1
            rows = rows if free or not states else []
        if begin == self.past and not self.pieces.reproducible:
            known = begin  # where one token alone is known, nothing would be gained
        self._hold(begin)
        if known > self.held:
            self._note_rounding(self.held)
            if states:
                states.go_to(self.conversation.layers, known, self.past)
        if known > self.past:
            self._watch(begin, rows)
        self.spans = [
            plan.spans(max(known - pad, 0)) for plan, pad in zip(self.plans, self.pads, strict=True)
        ]
        head = self._outputs.behind(begin) if self._outputs else None
        cuts = self._cuts(begin)
        if states:
            states.expect(self.conversation.layers, begin)
        number_from = self.conversation.number_from(self.call, self.past)
        return TrimSpec(begin - self.past, cuts, number_from, head=head)

    def _cuts(self, begin: int) -> tuple[int, ...]:
        """Columns of the ids given at which a forward from column `begin` on is cut."""
        if not self.conversation.in_pieces or self._outputs or self.call.bypass_reason:
            return ()
        cuts = set(self.pieces.cuts(begin, self.outputs_from))
        if self.conversation.states and self._known and self._is_one_row:
            cuts |= set(
                self.conversation.states.cuts(
                    self.plans[0].chunks,
                    begin,
                    self._known[0],
                    self.outputs_from,
                    self.total,
                    self.conversation.marks,
                )
            )
        found, last = [], begin
        for column in sorted(cuts):
            if column - last >= self.conversation.least_piece:
                found.append(column - self.past)
                last = column
        return tuple(found)

    def _hold(self, columns: int) -> None:
        hold_all(self.conversation.layers, columns, self.pads, self.held)

    def _checked_rows(self, known: int) -> list[int]:
        """Rows that have tokens to check among the first `known` columns, if these are to be.

        What the caller holds and does not give again is as it is in any cache.
        """
        ends = self.conversation.transcript.inexact_from
        if known == self.past or any(end is not None and end < known for end in ends):
            return []
        return [row for row, pad in enumerate(self.pads) if pad < known]

    def _watch(self, column: int, rows: list[int]) -> None:
        """Make the check token: the first column computed, whose K/V are in the layers already."""
        if rows:
            bound = rounding(self.context.model, self.keys.layout, self.keys.codec)
            self._witness = Witness(self.conversation.layers, column, rows, bound)

    def _note_rounding(self, column: int) -> None:
        """K/V from this column on came from the store, or will be computed behind such."""
        transcript = self.conversation.transcript
        if transcript.lossy_from is None and self.keys.lossy:
            transcript.lossy_from = column

    def _report_prompt(self) -> None:
        transcript = self.conversation.transcript
        self._report_exactness()
        self._report_spans(self.spans, [max(self.past - pad, 0) for pad in self.pads])
        for row, ids, pad in zip(self.report.rows, transcript.ids(), self.pads, strict=True):
            row.ids = ids[pad:].numpy()

    def _report_exactness(self) -> None:
        if self.pieces.reproducible and self._is_in_whole_pieces:
            bits = environment(self.context.model)
            self.report.reproducible = f"pieces of {self.pieces.tokens} tokens, {bits}"
        transcript, keys = self.conversation.transcript, self.conversation.keys
        self.report.approximate = not transcript.is_exact
        self.report.lossy = keys.codec.name if keys and transcript.lossy_from is not None else ""

    def _report_spans(self, spans: list[list[Span]], past: list[int]) -> None:
        """Add this forward's spans, behind those of earlier parts of the same prompt if any."""
        rows = self.report.rows
        if len(rows) != len(spans):
            self.report.rows = [RowReport(row) for row in spans]
        else:
            for row, new, begin in zip(rows, spans, past, strict=True):
                row.spans += [span for span in new if span.start >= begin]

    def _bypass(self) -> TrimSpec:
        """Fall back to normal prefill; what is held is kept where it can be."""
        conversation = self.conversation
        if self.held > self.past and not (self._as_plain or conversation.edited):
            conversation.empty()  # the whole prompt is computed anew
            self.held = self.past
        conversation.record(self.call, self.past, self.held, self.total)
        self.report.skipped = conversation.bypass_reason
        if self.past:
            self._report_exactness()
        rows, pads = self.call.shape[0], self.pads if self.past else []
        for pad in pads if len(pads) == rows else [0] * rows:
            begin, held, total = (max(c - pad, 0) for c in (self.past, self.held, self.total))
            row = [Span(held, total, Kind.COMPUTED, reason=conversation.bypass_reason)]
            if held > begin:
                row.insert(0, Span(begin, held, Kind.REUSED, origin=HELD))
            self.spans.append(row)
        is_first = not self.report.rows
        self._report_spans(self.spans, [row[0].start for row in self.spans])
        given = () if self.call.ids is None else self.call.ids.cpu()
        for known, ids in zip(self.report.rows, given, strict=False):
            if is_first:
                known.ids = ids.numpy().copy()  # callers write the next token into theirs
            elif known.ids is not None:
                known.ids = np.concatenate([known.ids, ids.numpy()])
        return TrimSpec(self.held - self.past, self._cuts(self.held))

    # ------------------------------------------------------------------ the model has computed

    def end_piece(self, columns: int) -> None:
        """A piece of the forward has come back, after so many columns of the ids given."""
        if states := self.conversation.states:
            states.take(self.conversation.layers, self.past + columns)
            states.expect(self.conversation.layers, self.past + columns)
            self.conversation.note_states()
        if not self.pieces.reproducible:
            return
        if self._witness and self._off_by is None:  # it was of the check token alone
            self._off_by = self._witness.difference()
            self._witness.undo()
        self.conversation.check_edited()
        if any(self.pads):  # as where K/V were read: experts are chosen for padding too
            hold_all(self.conversation.layers, self.past + columns, self.pads, 0)
            self.conversation.note_written()

    def finish(self) -> bool:
        """Store what is new. False if the outputs are wrong: all must be computed again.

        Raises:
            StoreError: The store failed, and `on_error="raise"` was asked for.
        """
        conversation, report = self.conversation, self.report
        conversation.note_states()
        conversation.check_edited()
        if conversation.states:
            conversation.states.take(conversation.layers, self.total)
        is_sound = self.has_arrived()
        assert self._stopwatch is not None
        self._stopwatch.stop()
        if not is_sound or not self._agrees():
            self._note_time(0)
            return False
        if self._outputs and not self._outputs.are_taken():
            close_layers(conversation.layers)
            self._note_time(0)
            return False
        computed = sum(s.tokens for row in self.spans for s in row if s.kind in COMPUTING)
        self._note_time(computed if self.plans else 0)
        conversation.bypass_reason = conversation.bypass_reason or conversation.distrust
        report.skipped = conversation.bypass_reason or report.skipped
        conversation.end_forward(self.total)
        if not conversation.bypass_reason:
            if self.pieces.reproducible and self._is_in_whole_pieces and not self.call.whole:
                conversation.whole_pieces = self.pieces.whole(self.outputs_from, self.total)
            self.store()
        conversation.end_prompt()
        return True

    def _note_time(self, computed: int) -> None:
        """Take down how long so many tokens took: now, or once the device tells."""
        assert self._stopwatch is not None
        report, gauge = self.report, self.context.gauge

        def note(ms: float) -> None:
            report.prefill_ms += ms
            gauge.note_computed(computed, ms)

        gauge.note_computing(self._stopwatch.ms, note)

    def has_arrived(self) -> bool:
        """Whether all K/V that the model was promised have come, and are what they must be.

        Waits for them; what is damaged is removed.
        """
        background = self._background
        if background is None:
            return True
        with self.context.store_calls(self.report):
            is_sound = background.finish()
        self._background = None  # not before: who is interrupted here still has to stop it
        waited, busy, gauge = background.waited_ms, background.busy_ms, self.context.gauge
        if self._stopwatch:
            self._stopwatch.leave_out(waited / 1e3)
        self.report.read_ms += waited
        self.report.overlapped_ms += max(0.0, busy - waited)
        gauge.note_read(self._reader.bytes_read, busy)
        if not is_sound:
            gauge.note_unsound()
        self._count_read()
        return is_sound

    def _agrees(self) -> bool:
        """Whether the model computes what the store gave, as far as one token can tell.

        Until it does again, nothing is stored: that may have been a change of the model which its
        identity does not show, or what the store has was made by a changed one.
        """
        conversation = self.conversation
        witness, self._witness = self._witness, None  # which holds on to layers
        if witness is None:
            return True
        difference = witness.difference() if self._off_by is None else self._off_by
        if self.context.state.ranks.all(conversation.edited or difference <= witness.bound):
            conversation.distrust = ""
            return True
        conversation.bypass_reason = conversation.distrust = (
            "K/V from the store were not those that the model computes (off by "
            f"{difference:.1e}, rounding explains {witness.bound:.0e}): this model, or the one "
            "that stored them, was changed in a way that the identity does not show. Nothing is "
            "stored until a prompt agrees with the store again; if none does, use another namespace"
        )
        close_layers(conversation.layers)
        return False

    def store(self) -> None:
        """Hand over chunks that are complete, certain and not in the store."""
        certain = self.total - self.call.drafts
        tail = not self.call.drafts  # the prompt ends here
        if self.conversation.may_store(self.total, certain, prompt=True, tail=tail):
            more: Callable[[], list[Entry]] = list
            if self._outputs:
                more = partial(self._outputs.entries, self.plans, self.conversation.known, certain)
            elif self.conversation.states and self._is_one_row:
                more = partial(self._state_entries, certain)
            self.conversation.store(certain, self.report, tail, self._found(certain), more)

    def _state_entries(self, certain: int) -> list[Entry]:
        assert self.conversation.states is not None
        return self.conversation.states.entries(
            self.keys, self.plans[0].chunks, self._tokens(0), self.conversation.known,
            self.conversation.transcript.exact_lengths(certain)[0],
        )  # fmt: skip

    def _found(self, certain: int) -> Found:
        """What was found out of what is stored, and bears on what is to be stored."""
        return Found(stale=self.stale)

    def stop(self) -> None:
        """Give up half-way, after an interrupt: what is held must not be used any more."""
        if self._background:
            self._background.stop()
        self._background = self._witness = None

    def _handle(self, error: Exception) -> None:
        self.context.handle_store_error(error, self.report)
