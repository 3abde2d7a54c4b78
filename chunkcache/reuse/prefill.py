"""Prefill: one forward that reads a prompt, or its next part, from what is known to what is stored.

Its methods stand in the order of time: `plan` asks what the store has, `load` brings it into the
layers, `trim` says what is left to the model, and once that has come back `finish` says whether its
outputs may be believed, and stores what is new. One object, made for this forward, owns all that
happens in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Protocol

import numpy as np
from torch import nn

from chunkcache.errors import BlobError, StoreError
from chunkcache.gain import NO_GAIN
from chunkcache.kv.codec import BlobForm
from chunkcache.kv.layers import allocate_all, hold_all, reserve_all
from chunkcache.model.foreign import has_outer_hooks
from chunkcache.model.scatter import close_layers
from chunkcache.report import Report, RowReport
from chunkcache.reuse.background import BackgroundLoad
from chunkcache.reuse.blobs import WRONG_SIZE, BlobReader, PendingChunk
from chunkcache.reuse.check_token import CheckToken, rounding
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
from chunkcache.reuse.pieces import Pieces, environment
from chunkcache.reuse.stopwatch import Stopwatch
from chunkcache.stores.base import Entry
from chunkcache.stores.locks import Latch
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


class Beside(Protocol):
    """Values that chunks have beside their K/V.

    Attributes:
        value: The last part of their keys.
        sizes: Bytes of those that the store has, by chunk hash.
    """

    value: str
    sizes: dict[str, int]


class Prefill:
    """One forward that reads a prompt, from lookup to storing.

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
    no_outputs = "a prompt's outputs are not kept"
    """Why logits of known tokens cannot be had; `ScoringPrefill` has them."""

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
        self.forms: dict[str, BlobForm] = {}
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
        self._check_token: CheckToken | None = None
        self._off_by: float | None = None  # what the check token has shown, where it was a piece
        self._stopwatch: Stopwatch | None = None  # since the model began

    @staticmethod
    def check_model(conversation: Conversation) -> None:
        """Raise UnsupportedModelError if a model that was looked at is not for this kind of reuse.

        No model is refused here: what cannot be reused is computed.
        """

    def begin(self) -> TrimSpec:
        """Fill the layers with what is known. Returns what is left to compute."""
        with self.context.store_calls(self.report):
            if not self.take_prompt():
                trim = self._bypass()
            else:
                self.plan()
                self.load()
                trim = self.trim()
                self._report_prompt()
        self.conversation.note_written()
        self._stopwatch = Stopwatch(self.call.place)
        return trim

    # ------------------------------------------------------------------ what is known

    def take_prompt(self) -> bool:
        """Take the prompt's tokens over. False: bypass the store, as the conversation says why."""
        conversation = self.conversation
        conversation.begin_prompt(self.module, self.call, self.past, self.held)
        if conversation.bypass_reason:
            return False
        assert self.call.ids is not None
        conversation.transcript.append(self.call.ids[:, self.held - self.past :])
        conversation.choose_keys()
        return True

    def plan(self, dry: bool = False) -> None:
        """Ask which chunks are known, and how far each row is known from its start.

        `dry` means that nothing is read afterwards.
        """
        began = perf_counter()
        report, transcript = self.report, self.conversation.transcript
        gaps = "" if transcript.text_until is None else GAPS
        report.skipped = self.full_reason or gaps
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
        self._settle(dry)
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
    def full_reason(self) -> str:
        """Why all is computed, or `""`."""
        why = self.call.full_reason
        return f"{why}; {self.no_outputs}" if why and self.call.scores else why

    @property
    def limit(self) -> int:
        """Column from which on all is computed, since its outputs are wanted."""
        return self.outputs_from if self.conversation.is_as_a_prompt(self.held) else self.held

    @property
    def outputs_from(self) -> int:
        """Column from which on outputs are wanted of the model."""
        if self.call.full_reason:
            return self.held
        return max(self.held, self.total - max(self.call.keep, self.conversation.least))

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
            if beside := self._beside:
                names += [name + beside.value for name in names]
            sizes = self.context.store.sizes(names) if names else []
        except StoreError as error:
            self.lookup_failed = True
            self._handle(error)
            return str(error)
        self.sizes = {name: size for name, size in zip(hashes, sizes, strict=False) if size}
        if beside:
            found = zip(hashes, sizes[len(hashes) :], strict=True)
            beside.sizes = {name: size for name, size in found if size}
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

    @property
    def _beside(self) -> Beside | None:
        """What a chunk must have beside its K/V to be of use."""
        return None

    def _settle(self, dry: bool) -> None:
        """Revise how far each row is known, by what else there is of it or is missing."""
        may_ask = not self.lookup_failed and self.context.settings.reuse != "off"
        if self.sizes or may_ask:
            self._follow_branches(dry)

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

    def note_form(self, chunk_hash: str, form: BlobForm) -> None:
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
        for pad, plan in zip(self.pads, self.plans, strict=True):
            tokens += max(0, stop - pad - plan.held)
            hashes |= {chunk.hash for chunk in plan.reads(max(stop - pad, plan.held))}
        nbytes, gauge = sum(self.sizes[name] for name in hashes), self.context.gauge
        nbytes += self.keys.layout.state_bytes if tokens else 0
        ask = gauge.expects_gain if dry else gauge.pays
        return ask(tokens, nbytes, self.context.settings.min_gain)

    # ------------------------------------------------------------------ into the layers

    def load(self) -> None:
        """Bring what is known into the layers, or let it come while the model computes."""
        self._make_room()
        self._load_chunks(self.plans, self.stops)

    def _load_chunks(self, plans: list[RowPlan], stops: list[int]) -> None:
        """Read the K/V of these plans up to these columns; both are revised where that fails."""
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
        read_ms = 1e3 * (perf_counter() - began)
        self.report.read_ms += read_ms
        self.context.gauge.note_read(self._reader.bytes_read, read_ms)
        self._count_read()

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
        for name in reader.bad & self._continuations.keys():
            self.stale |= self._continuations.pop(name).without_it()

    # ------------------------------------------------------------------ what is left

    def trim(self) -> TrimSpec:
        """Declare what is known to be held. Returns what is left to compute."""
        known = self._known_columns()
        begin, rows = self._first(known)
        if begin == self.past and not self.pieces.reproducible:
            known = begin  # where one token alone is known, nothing would be gained
        self._hold(begin)
        if known > self.held:
            self._note_rounding(self.held)
        if known > self.past:
            self._add_check_token(begin, rows)
        self.spans = [
            plan.spans(max(known - pad, 0)) for plan, pad in zip(self.plans, self.pads, strict=True)
        ]
        number_from = self.conversation.number_from(self.call, self.past)
        return TrimSpec(begin - self.past, self._cuts(begin), number_from)

    def _known_columns(self) -> int:
        """Columns that all processes know of all rows."""
        known = self.context.state.ranks.least(max(self.pieces.usable(min(self.stops)), self.held))
        return known if any(pad < known for pad in self.pads) else self.held

    def _first(self, known: int) -> tuple[int, list[int]]:
        """The first column that is computed, and the rows in which it is a check token.

        Such a token's K/V are known: those behind the ones used if the store has them, else the
        last one of these is computed again.
        """
        rows = self._checked_rows(known)
        if not rows:
            return known, []
        assert self._loader is not None
        free = self.context.state.ranks.all(self._loader.covered(rows) > known)
        return known if free else known - 1, rows

    def _cuts(self, begin: int) -> tuple[int, ...]:
        """Columns of the ids given at which a forward from column `begin` on is cut."""
        if not self.conversation.in_pieces or self.call.bypass_reason:
            return ()
        found, last = [], begin
        for column in sorted(self._wanted_cuts(begin)):
            if column - last >= self.conversation.least_piece:
                found.append(column - self.past)
                last = column
        return tuple(found)

    def _wanted_cuts(self, begin: int) -> set[int]:
        """Columns at which it should be."""
        return set(self.pieces.cuts(begin, self.outputs_from))

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

    def _add_check_token(self, column: int, rows: list[int]) -> None:
        """Make the check token: the first column computed, whose K/V are in the layers already."""
        if rows:
            bound = rounding(self.context.model, self.keys.layout, self.keys.codec)
            self._check_token = CheckToken(self.conversation.layers, column, rows, bound)

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
        if self.pieces.reproducible and self.conversation.is_as_a_prompt(self.held):
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
        conversation.record(self.call, self.past, self.held)
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
        if not self.pieces.reproducible:
            return
        if self._check_token and self._off_by is None:  # it was of the check token alone
            self._off_by = self._check_token.difference()
            self._check_token.undo()
        self.conversation.note_edits()
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
        conversation.note_edits()
        is_sound = self.has_arrived()
        assert self._stopwatch is not None
        self._stopwatch.stop()
        if not is_sound or not self._agrees():
            self._note_time(0)
            return False
        computed = sum(s.tokens for row in self.spans for s in row if s.kind in COMPUTING)
        self._note_time(computed if self.plans else 0)
        conversation.bypass_reason = conversation.bypass_reason or conversation.distrust
        report.skipped = conversation.bypass_reason or report.skipped
        conversation.end_forward(self.total)
        if not conversation.bypass_reason:
            is_as_a_prompt = conversation.is_as_a_prompt(self.held) and not self.call.full_reason
            if self.pieces.reproducible and is_as_a_prompt:
                conversation.prompt_until = self.pieces.whole(self.outputs_from, self.total)
            self.store()
        conversation.tell(report)
        conversation.end_prompt()
        return True

    def _note_time(self, computed: int) -> None:
        """Take down how long so many tokens took: now, or once the device tells."""
        assert self._stopwatch is not None
        report, gauge = self.report, self.context.gauge
        computed = computed if self._stopwatch.is_certain else 0

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
        check_token, self._check_token = self._check_token, None  # which holds on to layers
        if check_token is None:
            return True
        difference = check_token.difference() if self._off_by is None else self._off_by
        if self.context.state.ranks.all(conversation.edited or difference <= check_token.bound):
            conversation.distrust = ""
            return True
        conversation.bypass_reason = conversation.distrust = (
            "K/V from the store were not those that the model computes (off by "
            f"{difference:.1e}, rounding explains {check_token.bound:.0e}): this model, or the one "
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
            more = partial(self._more_entries, certain)
            self.conversation.store(certain, self.report, tail, self._found(certain), more)

    def _more_entries(self, certain: int, may_copy: Latch) -> list[Entry]:
        """What is stored beside K/V, behind them: they are in the store or on their way there.

        `may_copy` is that of `harvest`.
        """
        return []

    def _found(self, certain: int) -> Found:
        """What was found out of what is stored, and bears on what is to be stored."""
        return Found(stale=self.stale)

    def stop(self) -> None:
        """Give up half-way, after an interrupt: what is held must not be used any more."""
        if self._background:
            self._background.stop()
        self._background = self._check_token = None

    def _handle(self, error: Exception) -> None:
        self.context.handle_store_error(error, self.report)
