"""Sequence: the tokens in a cache object's layers, and the way of one prompt through them.

Find what is known, fill the layers, let the model compute the rest, keep what is new. A cache has
one sequence at a time and takes a new one whenever it drops what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from chunkcache.anywhere import Moved, relocate
from chunkcache.chunking import Chunk, Grid, cut
from chunkcache.codec import FORMAT, KVLayout
from chunkcache.errors import StoreError, UnsupportedModelError
from chunkcache.foreign import Hooks
from chunkcache.harvest import harvest
from chunkcache.identity import ModelIdentity, numerics
from chunkcache.layers import GrowingLayer, settle_all
from chunkcache.model_state import ModelState
from chunkcache.plan import Kind, RowPlan, Span, plan_row
from chunkcache.prefill import ForwardCall, Rest
from chunkcache.proof import Proof, growing_layers
from chunkcache.relocate import Origin, approximate_chunks
from chunkcache.report import Report, RowReport
from chunkcache.restore import Filling, find
from chunkcache.rope import KeyMover
from chunkcache.scatter import close_layers, open_layers, scatter_mask
from chunkcache.settings import Settings
from chunkcache.stores.base import ChunkStore
from chunkcache.transcript import Transcript

_NOT_TEXT = "mask and positions are not those of a text with padding on its left alone"


@dataclass(frozen=True, slots=True)
class Setup:
    """What all sequences of one cache object share."""

    model: nn.Module
    state: ModelState
    store: ChunkStore
    settings: Settings
    grid: Grid


@dataclass(slots=True)
class Step:
    """One forward: `past` columns stand before the ids given, `held` have K/V already.

    `held` exceeds `past` when a whole prompt was given whose beginning is held.
    """

    past: int
    held: int
    total: int
    certain: int
    is_prompt: bool
    trimmed: bool = False
    prefill_from: float = 0.0


class Sequence:
    """See the module. `layers` is the list that the cache object works on.

    `opaque` says why K/V of these tokens can be neither taken from the store nor put there; the
    model then computes as with a plain cache.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.transcript = Transcript()
        self.opaque = ""
        self.identity: ModelIdentity | None = None
        self.proof = Proof()
        self.layers: list[Any] = self._empty_layers()
        self._salt = b""
        self._fed = 0
        self._known: set[str] = set()
        self._complete: list[int] = []
        self._checks: list[Tensor | bool] = []
        self._hooks: list[tuple[str, Hooks, int]] = []
        self._numerics = ""
        self._moved: Moved | None = None
        self._exact_until: int | None = None  # from there on, K/V are only nearly those of a run

    @property
    def length(self) -> int:
        """Columns whose K/V are held."""
        for layer in self.layers:
            if isinstance(layer, CacheLayerMixin):
                return int(layer.get_seq_length())
        return self._fed  # recurrent layers do not count

    def identify(self) -> bool:
        """Look at the model. True if it is no longer the one that computed what is held."""
        identity = self.setup.state.identity()
        if identity == self.identity:
            return False
        changed = self.identity is not None
        self.identity = identity
        self._numerics = numerics(self.setup.model)
        self.proof = self.setup.state.proof(identity, self.setup.store)
        self._salt = identity.salt(self.setup.settings.namespace)
        return changed

    def begins_like(self, call: ForwardCall) -> bool:
        """Whether the ids given and those held have a beginning in common."""
        assert call.ids is not None
        return self.transcript.common_columns(call.ids, self.transcript.pads) > 0

    def common_columns(self, call: ForwardCall) -> int:
        """Columns of a whole prompt that are held, the last ones that must be computed left out."""
        if self.opaque or call.opaque or call.whole or self.identify() or self.proof.obstacle:
            return 0
        assert call.ids is not None
        common = self.transcript.common_columns(call.ids, call.pads())
        return max(0, min(common, call.new - max(call.keep, 1)))

    # ------------------------------------------------------------------ a forward begins

    def begin(self, module: nn.Module, call: ForwardCall, step: Step, report: Report) -> Rest:
        """Fill the layers with what is known. Returns what is left to compute."""
        rest = self._prepare(module, call, step, report)
        self.setup.state.hooks.begin([] if self.opaque else self._hooks)
        return rest

    def _prepare(self, module: nn.Module, call: ForwardCall, step: Step, report: Report) -> Rest:
        self.opaque = self.opaque or call.opaque
        if step.is_prompt and not self.opaque:
            self.opaque = self._why_aside(module, call, step)
        if self.opaque:
            if step.held > step.past:
                self.layers[:] = self._empty_layers()  # the whole prompt is computed anew
            if step.is_prompt:
                self._report_aside(call, step, report)
            return Rest()
        assert call.ids is not None
        self.transcript.append(call.ids[:, step.held - step.past :])
        if not step.is_prompt:
            self._checks.append(call.follows(step.past, self.transcript.pads))
            return Rest(step.held - step.past)
        rest = self._restore(call, step, report)
        step.trimmed = rest != Rest()
        step.prefill_from = perf_counter()
        return rest

    def _why_aside(self, module: nn.Module, call: ForwardCall, step: Step) -> str:
        if module is not self.setup.model:
            if not step.held:
                config: Any = module.config
                self.layers[:] = DynamicCache(config=config).layers
            return "this cache was made for another model"
        if self.identify() and step.held:
            return "the model changed after a part of this sequence was computed"
        if not step.held:
            self.layers[:] = self._empty_layers()
        if self.proof.obstacle:
            return self.proof.obstacle
        self._hooks = self.setup.state.foreign
        if reason := self.setup.state.hooks.reason(self._hooks):
            return reason
        if not step.held:
            self.transcript.start(call.pads())
        if self.transcript.columns != step.held:
            return "the cache holds K/V of tokens that it has not seen"
        return "" if bool(call.follows(step.past, self.transcript.pads)) else _NOT_TEXT

    def _empty_layers(self) -> list[Any]:
        """Ours where the model is proven, else those of a plain `DynamicCache`."""
        ours = None if self.proof.obstacle else growing_layers(self.setup.model)
        config: Any = self.setup.model.config
        return ours or DynamicCache(config=config).layers

    def _restore(self, call: ForwardCall, step: Step, report: Report) -> Rest:
        """Ask the store, put what it knows in place, and say what is left."""
        assert call.ids is not None
        pads, started = self.transcript.pads, perf_counter()
        ids = self.transcript.ids()
        self._make_room(step, call.ids)
        rows = [self._cut(ids[row, pad:], tail=True) for row, pad in enumerate(pads)]
        report.skipped = call.whole
        limit = step.held if call.whole else step.total - max(call.keep, 1)
        if step.past and not self.setup.state.hooks.is_known(self._hooks):
            limit = step.held  # should a hook change something, this part could not be done again
        plans = self._plan(rows, step, limit, report)
        report.lookup_ms += 1e3 * (perf_counter() - started)
        started = perf_counter()
        known = step.held
        reach = min(limit, *(pad + plan.reach for pad, plan in zip(pads, plans, strict=True)))
        if reach > step.held and any(pad < reach for pad in pads):
            filling = Filling(
                self.setup.store, self._origin.key, self.layers, self._layout, ids, pads, plans,
                reach, lambda error: self._trouble(error, report),
            )  # fmt: skip
            known = filling.run()
            report.bytes_read += filling.bytes_read
            self._known -= filling.bad  # so that they are written anew
            self._hold(known, step.held)
        report.read_ms += 1e3 * (perf_counter() - started)
        spans = [plan.spans(max(known - pad, 0)) for plan, pad in zip(plans, pads, strict=True)]
        rest = Rest(known - step.past)
        if moved := self._relocate(ids, step, known, limit, report):
            self._moved = moved
            self._exact_until = moved.start
            spans = [[*(span for span in row if span.stop <= known), *moved.spans] for row in spans]
            columns = moved.columns.to(call.ids.device)
            open_layers(self.layers, columns, step.total)
            mask = scatter_mask(self.setup.model, columns, step.total, len(pads))
            rest = Rest(columns=columns, mask=mask)
        report.approximate = self._exact_until is not None
        self._report(spans, [max(step.past - pad, 0) for pad in pads], report)
        return rest

    def _relocate(
        self, ids: Tensor, step: Step, known: int, limit: int, report: Report
    ) -> Moved | None:
        """What is found elsewhere, for whole prompts whose rows are alike."""
        if self.setup.settings.reuse != "anywhere" or step.past or limit <= known:
            return None
        if any(self.transcript.pads) or not bool((ids == ids[:1]).all()):
            return None
        mover = self.mover()
        try:
            return relocate(
                self.setup.model, self._origin, self.layers, self._layout, mover, ids, known, limit,
                self.setup.settings.strategy, report, lambda error: self._trouble(error, report),
            )  # fmt: skip
        except StoreError as error:
            self._trouble(error, report)
            return None

    def mover(self) -> KeyMover:
        """The model's proven rotation.

        Raises:
            UnsupportedModelError: Its K/V may not be moved.
        """
        assert self.identity is not None
        mover: KeyMover | str = self.proof.obstacle
        if not mover:
            mover = self.setup.state.mover(self.identity, self._layout)
        if isinstance(mover, str):
            raise UnsupportedModelError(
                f"reuse='anywhere' is not possible with {self.setup.model.__class__.__name__}: "
                f"{mover}. Use reuse='prefix'"
            )
        return mover

    def _make_room(self, step: Step, ids: Tensor) -> None:
        if not step.held:
            memory = self.setup.state.memory
            settle_all(self.layers, self._layout, ids.shape[0], step.total, ids.device, memory)
            return
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.reserve(step.total)

    def _plan(
        self, rows: list[list[Chunk]], step: Step, limit: int, report: Report
    ) -> list[RowPlan]:
        pads = self.transcript.pads
        tokens = [step.total - pad for pad in pads]
        held = [max(step.held - pad, 0) for pad in pads]
        why = report.skipped or "reuse is off"
        if self.setup.settings.reuse != "off" and limit > step.held:
            try:
                plans, self._known = find(self.setup.store, rows, tokens, held, self._origin.key)
                return plans
            except StoreError as error:
                self._trouble(error, report)
                why = str(error)
        return [plan_row(c, n, h, (), why) for c, n, h in zip(rows, tokens, held, strict=True)]

    def _hold(self, columns: int, held: int) -> None:
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                if not held:
                    for row, pad in enumerate(self.transcript.pads):
                        layer.blank(row, min(pad, columns))
                layer.hold(columns)

    # ------------------------------------------------------------------ a forward has come back

    def end(self, step: Step, report: Report) -> bool:
        """Hand over what is new. True if the forward must be done again, with nothing left out."""
        changed = self.setup.state.hooks.end()
        if changed:
            self.opaque = self.setup.state.hooks.reason(self._hooks)
        if changed and step.trimmed:
            return True
        if step.is_prompt:
            report.prefill_ms += 1e3 * (perf_counter() - step.prefill_from)
            report.skipped = self.opaque or report.skipped
        self._fed = step.total
        close_layers(self.layers)
        if not self.opaque:
            self._store_new(step, report)
        self._moved = None
        return False

    def _store_new(self, step: Step, report: Report) -> None:
        """Hand over chunks that are complete, certain and not in the store."""
        if self.length != step.total:
            self.opaque = "the model cached another number of tokens than it was given"
            return
        pads = self.transcript.pads
        certain = step.certain if self._exact_until is None else self._exact_until
        lengths = [max(min(certain, step.certain) - pad, 0) for pad in pads]
        complete = [self.setup.grid.complete(length) for length in lengths]
        whole_prompt = step.is_prompt and step.certain == step.total
        exact = self._exact_until is None
        if complete == self._complete and not whole_prompt:
            return  # no chunk ends here: nearly every step of decoding
        self._complete = complete
        if not all(bool(check) for check in self._checks):
            self.opaque = _NOT_TEXT
            return
        if numerics(self.setup.model) != self._numerics:
            self.opaque = "autocast, attention or matrix precision changed in the course of it"
            return
        self._checks.clear()
        ids = self.transcript.ids()
        tail = whole_prompt and exact and self.setup.settings.store_tail
        rows = [
            self._cut(ids[row, pad : pad + length], tail)
            for row, (pad, length) in enumerate(zip(pads, lengths, strict=True))
        ]
        entries = harvest(
            self.layers, self._layout, ids, pads, rows, self._known, self._origin,
            self.setup.settings,
        )  # fmt: skip
        if self._moved:
            size, salt = self.setup.grid.size, self._salt
            behind = approximate_chunks(ids[0].numpy(), self._moved.holes, size, salt)
            entries += harvest(
                self.layers, self._layout, ids[:1], [0], [behind], self._known, self._origin,
                self.setup.settings, "approximate",
            )  # fmt: skip
        size = sum(entry.nbytes for entry in entries)
        taken = 0
        try:
            taken = self.setup.store.write(entries) if entries else 0
        except StoreError as error:
            self._trouble(error, report)
        report.bytes_written += taken
        report.bytes_dropped += size - taken

    # ------------------------------------------------------------------ small parts

    @property
    def _layout(self) -> KVLayout:
        assert self.proof.layout is not None, "a sequence without a layout is opaque"
        return self.proof.layout

    def _cut(self, tokens: Tensor, tail: bool) -> list[Chunk]:
        return cut(tokens.numpy(), self.setup.grid, self._salt, tail)

    @property
    def _origin(self) -> Origin:
        assert self.identity is not None
        return Origin(self.setup.store, self.identity, self._salt, FORMAT)

    def _report_aside(self, call: ForwardCall, step: Step, report: Report) -> None:
        report.skipped = self.opaque
        step.prefill_from = perf_counter()
        rows = 1 if call.ids is None else call.ids.shape[0]
        span = Span(step.past, step.total, Kind.COMPUTED, reason=self.opaque)
        self._report([[span] for _ in range(rows)], [step.past] * rows, report)

    def _report(self, spans: list[list[Span]], past: list[int], report: Report) -> None:
        """Add this forward's spans, behind those of earlier parts of the same prompt if any."""
        if len(report.rows) != len(spans):
            report.rows = [RowReport(row) for row in spans]
        else:
            for row, new, begin in zip(report.rows, spans, past, strict=True):
                row.spans += [span for span in new if span.start >= begin]

    def _trouble(self, error: Exception, report: Report) -> None:
        """A store failed or held a bad blob: count it, and raise only if that was asked for."""
        report.note_error(error)
        if self.setup.settings.on_error == "raise" and isinstance(error, StoreError):
            raise error
