"""Sequence: the tokens in a cache object's layers, and the way of one prompt through them.

What is known is recalled into the layers, the model computes the rest, and what is new is
harvested. A cache has one sequence at a time and takes a new one whenever it drops what it holds.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from chunkcache.errors import StoreError, UnsupportedCallError, UnsupportedModelError
from chunkcache.kv.coding import Codec
from chunkcache.kv.layers import GrowingLayer
from chunkcache.kv.rope import KeyMover
from chunkcache.kv.sample import Sample
from chunkcache.model.foreign import has_outer_hooks, hooks_registered
from chunkcache.model.identity import ModelIdentity, numerics
from chunkcache.model.proof import Proof, growing_layers
from chunkcache.model.scatter import close_layers
from chunkcache.report import Report, RowReport
from chunkcache.reuse.harvest import exact_lengths, harvest
from chunkcache.reuse.index import Origin
from chunkcache.reuse.prefill import ForwardCall, Rest, first_row, may_change
from chunkcache.reuse.recall import Recall
from chunkcache.reuse.restore import discard
from chunkcache.reuse.resume import check_anew, check_not_a_part, plain_columns
from chunkcache.reuse.step import Held, Setup, Step
from chunkcache.settings import OBSERVERS
from chunkcache.tokens.plan import COMPUTING, GAPS, HELD, Kind, Span
from chunkcache.tokens.transcript import Transcript

_EDITED = (
    "K/V in the cache were changed by others: what they made is used, and nothing of it is stored"
)
_NEW_HOOKS = "forward hooks were registered while these tokens were computed"
_NOT_TEXT = (
    "attention_mask and position_ids are not those of a text with padding on its left alone, whose "
    "positions count each row's tokens from 0"
)


class Sequence:
    """See the module. `layers` is the list that the cache object works on.

    `opaque` says why K/V of these tokens can be neither taken from the store nor put there; the
    model then computes as with a plain cache. `beyond` says so where more than tokens is held (as
    an image).
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.transcript = Transcript()
        self.opaque = self.beyond = ""
        self.edited = False
        self.identity: ModelIdentity | None = None
        self.proof = Proof()
        self.layers: list[Any] = self._new_layers()
        self._salt = b""
        self._codec = Codec()
        self._fed = 0
        self._surplus = 0  # columns held after a forward beyond those given: odd models
        self._ends_at: tuple[Tensor | None, int] = (None, 0)  # positions, and columns with them
        self._sample: Sample | None = None  # of the K/V held, as we left them
        self._known: set[str] = set()
        self._complete: list[int] = []
        self._checks: list[Tensor | bool] = []
        self._foreign_code = ""
        self._hooks_registered = 0
        self._numerics = ""

    @property
    def length(self) -> int:
        """Columns whose K/V are held."""
        for layer in self.layers:
            if isinstance(layer, CacheLayerMixin):
                return int(layer.get_seq_length())
        return self._fed  # recurrent layers do not count

    def identify(self) -> bool:
        """Look at the model. True if it is no longer the one that computed what is held."""
        state = self.setup.state
        self._hooks_registered = hooks_registered()
        identity, foreign_code = state.identity(), self.setup.foreign_code
        if (identity, foreign_code) == (self.identity, self._foreign_code):
            return False
        changed = self.identity not in (None, identity)
        self.identity, self._foreign_code = identity, foreign_code
        self._numerics = numerics(self.setup.model)
        if foreign_code:  # which may go again: no verdict on the model
            self.proof = Proof(foreign_code)
            return changed
        self.proof = state.proof(identity, self.setup.store)
        if not self.proof.obstacle:
            origin = self.setup.origin(identity)
            self._salt, self._codec = origin.salt, origin.codec
        return changed

    @property
    def is_resized(self) -> bool:
        """Whether others have changed how many tokens the layers hold.

        Nobody can tell then which ones, so that the object does as a `DynamicCache` does.
        """
        return self.edited and self.length != self.transcript.columns

    def check_edited(self, thoroughly: bool = False) -> None:
        """Look whether others have changed K/V that are held, since the last forward.

        `thoroughly` is at the values too, which takes a millisecond.
        """
        growing = [layer for layer in self.layers if isinstance(layer, GrowingLayer)]
        if any(layer.check_edited() for layer in growing) or (
            thoroughly and self._sample is not None and self._sample.differs(self.layers)
        ):
            self.edited = True
            self.opaque = _EDITED
            self._sample = None

    def crop(self, columns: int) -> None:
        """The layers hold the first `columns` alone."""
        self.transcript.crop(columns)
        if self._sample is not None:
            self._sample.crop(columns)

    def take_rows(self, rows: Tensor) -> None:
        """The layers hold these rows of what they held."""
        self.transcript.take_rows(rows)
        self._sample = None

    def follows_at(self, held: int) -> int:
        """Position of the token behind the `held` columns, in the first row."""
        positions, columns = self._ends_at
        if positions is None:
            return held - (self.transcript.pads or [0])[0]
        return int(first_row(positions)[-1]) + 1 + held - columns

    def plain_columns(self, module: nn.Module, call: ForwardCall) -> int:
        """Columns to keep as a `DynamicCache` would, as `reuse.resume` has it.

        Raises:
            UnsupportedCallError: It cannot be told, or the positions are for something else.
        """
        held = self.length
        if self.transcript.columns != held and not self._surplus:
            raise UnsupportedCallError(
                "this cache holds K/V of tokens that no forward of the model has brought, so it "
                "cannot be told whether a whole prompt continues them: call cache.reset() before a "
                "new prompt; to continue, pass input_ids of the new tokens alone and an "
                "attention_mask over all"
            )
        columns = 0
        if self.beyond or call.beyond:
            columns = plain_columns(module, call, self.transcript, held, self.follows_at(held))
        if not columns:
            check_anew(module, call)
        return columns

    def begins_like(self, call: ForwardCall) -> bool:
        """Whether the ids given and those held have a beginning in common."""
        assert call.ids is not None
        return self.transcript.common_columns(call.ids, self.transcript.pads) > 0

    def common_columns(self, call: ForwardCall) -> int:
        """Columns of a whole prompt that are held, the last ones that must be computed left out."""
        if call.opaque or call.whole:
            return 0
        if not self.edited and (self.opaque or self.identify() or self.proof.obstacle):
            return 0
        assert call.ids is not None
        pads = call.pads()
        common = self.transcript.common_columns(call.ids, pads)
        if self.edited:
            check_not_a_part(common, call, self.length)
        common = min(common, call.new - max(call.keep, 1))
        if not self.edited:
            if not self._followed:
                return 0
            ends = call.text_columns(0, pads), self.transcript.text_until
            common = min(common, *(end for end in ends if end is not None))
        return max(0, common)

    # ------------------------------------------------------------------ a forward begins

    def begin(self, module: nn.Module, call: ForwardCall, step: Step, report: Report) -> Rest:
        """Fill the layers with what is known. Returns what is left to compute."""
        with self.setup.store_calls(report):
            rest = self._prepare(module, call, step, report)
        if step.is_prompt:
            for layer in self.layers:
                if isinstance(layer, GrowingLayer) and not self.edited:
                    layer.note_written()
        return rest

    def _prepare(self, module: nn.Module, call: ForwardCall, step: Step, report: Report) -> Rest:
        self.opaque = self.opaque or call.opaque
        self.beyond = self.beyond or call.beyond
        if step.is_prompt:
            self.opaque = self.opaque or self._why_aside(module, call, step)
            if not self.setup.state.ranks.all(not self.opaque):
                self.opaque = (
                    self.opaque or "another process of this model falls back to normal prefill"
                )
        if self.opaque:
            if step.held > step.past and not (step.as_plain or self.edited):
                self._empty(self._new_layers())  # the whole prompt is computed anew
                step.held = step.past
            self._record(call, step)
            if step.is_prompt:
                self._report_aside(call, step, report)
            return Rest(step.held - step.past)
        assert call.ids is not None
        self.transcript.append(call.ids[:, step.held - step.past :])
        if not step.is_prompt:
            if self.transcript.text_until is None:
                self._checks.append(call.follows(step.past, self.transcript.pads))
            self._checks += [self._is_untyped(*item) for item in call.types.items()]
            return Rest(step.held - step.past)
        rest, spans = self._recall(call, step, report)
        self._report_exactness(report)
        pads = self.transcript.pads
        self._report(spans, [max(step.past - pad, 0) for pad in pads], report)
        for row, ids, pad in zip(report.rows, self.transcript.ids(), pads, strict=True):
            row.ids = ids[pad:].numpy()
        step.trimmed = rest.skip > 0 or rest.columns is not None
        step.computed = sum(s.tokens for row in spans for s in row if s.kind in COMPUTING)
        step.prefill_from = perf_counter()
        return rest

    def _why_aside(self, module: nn.Module, call: ForwardCall, step: Step) -> str:
        if module is not self.setup.model:
            if not step.held:
                config: Any = module.config
                self._empty(DynamicCache(config=config).layers)
            return "this cache was made for another model"
        if self.identify() and step.held:
            return "the model changed after a part of this sequence was computed"
        if not step.held:
            self._empty(self._new_layers())
        if self.proof.obstacle:
            return self.proof.obstacle
        if not step.held:
            self.transcript.start(call.pads())
        if self.transcript.columns != step.held:
            return "the cache holds K/V of tokens that it has not seen"
        if step.past and call.mask is not None and len(self.transcript.pads) == len(call.mask):
            self.transcript.more_padding(call.pads())
        for name, types in call.types.items():
            if not bool(self._is_untyped(name, types)):
                self.beyond = may_change(name)
                return self.beyond
        columns = call.text_columns(step.past, self.transcript.pads)
        if not self._followed or columns <= min(self.transcript.pads):
            return _NOT_TEXT
        if columns < step.total:
            known = self.transcript.text_until
            self.transcript.text_until = columns if known is None else min(known, columns)
        return ""

    @property
    def _followed(self) -> bool:
        """Whether all forwards since the last prompt were those of text."""
        return all(bool(check) for check in self._checks)

    def _is_untyped(self, name: str, types: Tensor) -> Tensor | bool:
        """Whether token type ids are zero, and zeros mean nothing to the model."""
        assert self.identity is not None
        return not self.setup.state.zeros_matter(self.identity, name) and (types == 0).all()

    def _record(self, call: ForwardCall, step: Step) -> None:
        """Take down the tokens of a forward that is not known by them alone."""
        if not step.held:
            self.transcript.start(call.pads())
        if len(self.transcript.pads) != call.shape[0]:
            return
        if call.ids is None:
            self.transcript.append_unnamed(call.new)
        else:
            self.transcript.append(call.ids[:, step.held - step.past :])
        if call.positions is not None:
            self._ends_at = call.positions[..., -1:], step.total

    def _empty(self, layers: list[Any]) -> None:
        """Hold nothing, in these new layers."""
        self.layers[:] = layers
        self._sample = None

    def _new_layers(self) -> list[Any]:
        """Ours where the model is proven, else those of a plain `DynamicCache`."""
        ours = None if self.proof.obstacle else growing_layers(self.setup.model)
        config: Any = self.setup.model.config
        return ours or DynamicCache(config=config).layers

    def _recall(
        self, call: ForwardCall, step: Step, report: Report
    ) -> tuple[Rest, list[list[Span]]]:
        """Bring what is known into the layers. Returns what is left, and each token's fate."""
        assert call.ids is not None
        gaps = "" if self.transcript.text_until is None else GAPS
        report.skipped = call.whole or gaps
        limit = step.held if call.whole else step.total - max(call.keep, 1)
        # Hooks should not see what is thrown away.
        hooked = self.setup.state.foreign or has_outer_hooks(self.setup.model)
        step.may_run_ahead &= not hooked and self.setup.gauge.trusts_store
        mover = None
        if self.setup.settings.reuse == "anywhere" and limit > step.held and not gaps:
            try:
                mover = self.mover()
            except UnsupportedModelError as error:  # its attention was changed since it was made
                self.setup.trouble(error, report)
        held = self._held
        return Recall(self.setup, held, step, limit, mover, call.ids.device, report).run()

    def mover(self) -> KeyMover:
        """The model's proven rotation.

        Raises:
            UnsupportedModelError: Its K/V may not be moved.
        """
        assert self.identity is not None
        mover: KeyMover | str = self.proof.obstacle
        if not mover:
            mover = self.setup.state.mover(self.identity, self._held.layout, self.setup.store)
        if isinstance(mover, str):
            raise UnsupportedModelError(
                f"reuse='anywhere' is not possible with {self.setup.model.__class__.__name__}: "
                f"{mover}. Use reuse='prefix'"
            )
        return mover

    # ------------------------------------------------------------------ a forward has come back

    def end(self, step: Step, report: Report) -> bool:
        """Hand over what is new. True if the forward must be done again, with nothing left out."""
        self.check_edited()
        sound = self.has_arrived(step, report)
        prefill_ms = 1e3 * (perf_counter() - step.prefill_from)
        if not sound or not self._agrees(step):
            report.prefill_ms += prefill_ms
            return True
        self.opaque = self.opaque or self._distrust.get(self._digest, "")
        if step.is_prompt:
            report.prefill_ms += prefill_ms
            self.setup.gauge.note_computed(step.computed, prefill_ms)
            report.skipped = self.opaque or report.skipped
        self._fed = step.total
        self._surplus = self.length - step.total
        close_layers(self.layers)
        if not self.opaque:
            with self.setup.store_calls(report):
                self._store_new(step, report)
        if step.is_prompt:
            self._sample = None if self.opaque else Sample(self.layers)
        return False

    def _agrees(self, step: Step) -> bool:
        """Whether the model computes what the store gave, as far as one token can tell.

        Until it does again, nothing is stored: that may have been a change of the model which its
        identity does not show, or what the store has was made by a changed one.
        """
        witness, step.witness = step.witness, None  # which holds on to layers
        if witness is None:
            return True
        difference = witness.difference()
        if self.setup.state.ranks.all(self.edited or difference <= witness.bound):
            self._distrust.pop(self._digest, None)
            return True
        self.opaque = self._distrust[self._digest] = (
            "K/V from the store were not those that the model computes (off by "
            f"{difference:.1e}, rounding explains {witness.bound:.0e}): it was changed in a "
            "way that its identity does not show, or a changed one has stored them. Nothing is "
            "stored until a prompt agrees with the store again; if none does, use another namespace"
        )
        close_layers(self.layers)
        return False

    def has_arrived(self, step: Step, report: Report) -> bool:
        """Whether all K/V that the model was promised have come, and are what they must be.

        Waits for them; what is damaged is removed.
        """
        arrival = step.arrival
        if arrival is None:
            return True
        sound = arrival.finish()
        step.arrival = None  # not before: who is interrupted here still has to stop it
        step.prefill_from += arrival.waited_ms / 1e3  # which was not computing
        report.read_ms += arrival.waited_ms
        self.setup.gauge.note_read(arrival.bytes_read, arrival.busy_ms)
        if not sound:
            self.setup.gauge.note_unsound()
        report.hidden_ms += max(0.0, arrival.busy_ms - arrival.waited_ms)
        report.bytes_read += arrival.bytes_read
        damaged = [chunk for chunk in arrival.chunks if chunk.error]
        with self.setup.store_calls(report):
            for error in filter(None, [arrival.error, *(chunk.error for chunk in damaged)]):
                self.setup.trouble(error, report)
            discard(
                self.setup.store,
                [chunk.form.key for chunk in damaged],
                lambda error: self.setup.trouble(error, report),
            )
        return sound

    def _store_new(self, step: Step, report: Report) -> None:
        """Hand over chunks that are complete, certain and not in the store."""
        if self.length != step.total:
            self.opaque = "the model cached another number of tokens than it was given"
            return
        held = self._held
        complete = [self.setup.grid.complete(length) for length in exact_lengths(held, step)]
        if complete == self._complete and not step.is_whole_prompt:
            return  # no chunk ends here: nearly every step of decoding
        self._complete = complete
        if not step.is_prompt:
            self.check_edited(thoroughly=True)
            if self.edited:
                return
            self._sample = Sample(self.layers)
        if not self._followed:
            self.opaque = _NOT_TEXT
            return
        if hooks_registered() != self._hooks_registered and not self._vouched:
            self.opaque = _NEW_HOOKS
            return
        if numerics(self.setup.model) != self._numerics:
            self.opaque = "autocast, attention or matrix precision changed in the course of it"
            return
        self._checks.clear()
        entries = harvest(self.setup, held, step) if self.setup.settings.write else []
        size = sum(entry.nbytes for entry in entries)
        taken = 0
        try:
            taken = self.setup.store.write(entries) if entries else 0
        except StoreError as error:
            self.setup.trouble(error, report)
        report.bytes_written += taken
        report.bytes_dropped += size - taken

    # ------------------------------------------------------------------ small parts

    @property
    def _vouched(self) -> bool:
        return self.setup.settings.hooks == OBSERVERS

    @property
    def _digest(self) -> str:
        return self.identity.digest if self.identity else ""

    @property
    def _distrust(self) -> dict[str, str]:
        return self.setup.state.distrust

    @property
    def _held(self) -> Held:
        assert self.identity is not None
        assert self.proof.layout is not None, "a sequence without a layout is opaque"
        origin = Origin(self.setup.store, self.identity, self._salt, self._codec)
        return Held(self.layers, self.proof.layout, self.transcript, origin, self._known)

    def _report_exactness(self, report: Report) -> None:
        report.approximate = not self.transcript.is_exact
        report.lossy = self._codec.name if self.transcript.lossy_from is not None else ""

    def _report_aside(self, call: ForwardCall, step: Step, report: Report) -> None:
        report.skipped = self.opaque
        if step.past:
            self._report_exactness(report)
        step.prefill_from = perf_counter()
        rows, begin, held = call.shape[0], step.past, step.held
        pads = self.transcript.pads if step.past else []
        spans = []
        for pad in pads if len(pads) == rows else [0] * rows:
            edges = [max(column - pad, 0) for column in (begin, held, step.total)]
            row = [Span(edges[1], edges[2], Kind.COMPUTED, reason=self.opaque)]
            if held > begin:
                row.insert(0, Span(edges[0], edges[1], Kind.REUSED, origin=HELD))
            spans.append(row)
        is_first = not report.rows
        self._report(spans, [row[0].start for row in spans], report)
        given = () if call.ids is None else call.ids.cpu()
        for known, ids in zip(report.rows, given, strict=False):
            if is_first:
                known.ids = ids.numpy().copy()  # callers write the next token into theirs
            elif known.ids is not None:
                known.ids = np.concatenate([known.ids, ids.numpy()])

    def _report(self, spans: list[list[Span]], past: list[int], report: Report) -> None:
        """Add this forward's spans, behind those of earlier parts of the same prompt if any."""
        if len(report.rows) != len(spans):
            report.rows = [RowReport(row) for row in spans]
        else:
            for row, new, begin in zip(report.rows, spans, past, strict=True):
                row.spans += [span for span in new if span.start >= begin]
