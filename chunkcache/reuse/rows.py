"""RowsPrefill: a batch for a model with recurrent states, whose rows are brought up one by one.

Rows with unequal padding, or of which unequal parts are known, go on from states at different
columns, which no single forward can. So each distinct row is read, computed and stored by itself,
without its padding, up to the first token whose output is wanted; these then go through the model
together. Copies of a row, as beam search makes them, are computed once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from chunkcache.kv.layers import allocate_all, growing, hold_all
from chunkcache.kv.states import put_states, take_states
from chunkcache.model.check import CACHE
from chunkcache.model.self_test import cache_of, takes
from chunkcache.report import Report
from chunkcache.reuse.conversation import Conversation
from chunkcache.reuse.hook import ForwardCall, TrimSpec
from chunkcache.reuse.pieces import run_pieces
from chunkcache.reuse.stateful import StatefulPrefill
from chunkcache.tokens.plan import WANTED, Kind, Span, plan_row


class RowsPrefill(StatefulPrefill):
    """Prefill for a batch of a model with states, behind nothing: one row after the other."""

    computes_together = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows: list[StatefulPrefill | None] = []  # what brings up each row; alike for copies

    # ------------------------------------------------------------------ what is known

    def plan(self, dry: bool = False) -> None:
        """See which rows there are; with `dry`, plan each as it will be."""
        self.report.skipped = self.full_reason
        ids = self.conversation.transcript.ids()
        distinct: dict[bytes, StatefulPrefill | None] = {}
        for row, pad in zip(ids, self.pads, strict=True):
            text = row[pad : self.outputs_from][None]
            name = text.numpy().tobytes()
            if name not in distinct:
                distinct[name] = self._of(text) if text.shape[1] else None
            self._rows.append(distinct[name])
        for prefill in distinct.values():
            if prefill and dry:
                prefill.take_prompt()
                prefill.plan(dry)
                self.sizes |= prefill.sizes
        if dry:
            self.plans = [
                replace(prefill.plans[0], tokens=self.total - pad)
                if prefill
                else plan_row([], self.total - pad, 0, (), WANTED)
                for prefill, pad in zip(self._rows, self.pads, strict=True)
            ]

    def _of(self, ids: Tensor, why: str = "") -> StatefulPrefill:
        """A prefill of one row, `[1, tokens]`; `why` it has to bypass the store, if it must."""
        conversation = Conversation(self.context)
        conversation.bypass_reason, conversation.marks = why, self.conversation.marks
        call = ForwardCall(ids, None, None, 1, "", "", device=self.call.place)
        return StatefulPrefill(conversation, self.module, call, Report(), again=bool(why))

    # ------------------------------------------------------------------ into the layers

    def load(self) -> None:
        """Compute each distinct row by itself, and put all of them into the batch's layers."""
        layers, layout, begin = self.conversation.layers, self.keys.layout, self.outputs_from
        device, memory = self.call.place, self.context.state.memory
        done = {prefill: self._done(prefill) for prefill in dict.fromkeys(self._rows) if prefill}
        self._rows = [prefill and done[prefill] for prefill in self._rows]
        allocate_all(layers, layout, len(self.pads), self.total, device, memory)
        states: list[list[Tensor] | None] = []
        for row, (pad, prefill) in enumerate(zip(self.pads, self._rows, strict=True)):
            if prefill is None:
                states.append(None)
                continue
            alone = prefill.conversation.layers
            states.append(take_states(alone))
            for layer, source in zip(growing(layers), growing(alone), strict=True):
                layer.place(row, pad, source.keys[0], source.values[0])
        hold_all(layers, begin, self.pads, 0)
        if any(states):
            put_states(layers, layout.states, states, device)

    def _done(self, prefill: StatefulPrefill) -> StatefulPrefill:
        """One row, computed; once more, without the store, where that was not to be believed."""
        assert prefill.call.ids is not None
        is_sound = self._compute(prefill)
        self.report.add(prefill.report)
        if not is_sound:
            why = prefill.conversation.bypass_reason or "what the store has was damaged"
            prefill = self._of(prefill.call.ids, why)
            self._compute(prefill)
            self.report.add(prefill.report)
        self.conversation.known |= prefill.conversation.known
        return prefill

    def _compute(self, prefill: StatefulPrefill) -> bool:
        trim = prefill.begin()
        assert prefill.call.ids is not None
        ids = prefill.call.ids.to(self.call.place)
        kwargs: dict[str, Any] = {"input_ids": ids, "use_cache": True}
        kwargs[CACHE] = cache_of(prefill.conversation.layers)
        if takes(self.module, "position_ids"):
            kwargs["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
        if takes(self.module, "logits_to_keep"):
            kwargs["logits_to_keep"] = 1
        self.module.forward(
            **run_pieces(self.module, kwargs, trim.skip, trim.cuts, prefill.end_piece)
        )
        return prefill.finish()

    # ------------------------------------------------------------------ what is left

    def trim(self) -> TrimSpec:
        """Leave the tokens whose outputs are wanted."""
        begin = self.outputs_from
        for pad, prefill in zip(self.pads, self._rows, strict=True):
            known = [*prefill.report.rows[0].spans] if prefill else []
            left = Span(max(begin - pad, 0), self.total - pad, Kind.COMPUTED, reason=WANTED)
            self.spans.append([*known, left])
        return TrimSpec(begin, (), self.conversation.number_from(self.call, self.past))

    def store(self) -> None:
        """As in `Prefill`; but each row has stored its whole pieces, if these alone are stored."""
        if not self.pieces.reproducible:
            super().store()

    def stop(self) -> None:
        """Give up half-way, after an interrupt: what is held must not be used any more."""
        for prefill in self._rows:
            if prefill:
                prefill.stop()
        super().stop()
