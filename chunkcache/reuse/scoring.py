"""ScoringPrefill: a call that wants logits of several tokens, of which some may be known.

It is trimmed like a prompt, as far as the store has both K/V and outputs (see `outputs.py`).
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Any

from chunkcache.model.scatter import close_layers
from chunkcache.reuse.hook import TrimSpec
from chunkcache.reuse.outputs import Outputs, outputs_of
from chunkcache.reuse.prefill import Beside, Prefill
from chunkcache.stores.base import Entry
from chunkcache.stores.locks import Latch


class ScoringPrefill(Prefill):
    """Prefill for calls that want logits of several tokens: reuses K/V where outputs are known."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outputs: Outputs | None = None

    # ------------------------------------------------------------------ what is known

    def plan(self, dry: bool = False) -> None:
        """As in `Prefill`; before, see whether outputs may be had at all."""
        found = outputs_of(
            self.context, self.keys, self.call, self.conversation.transcript, self.total,
            self._handle,
        )  # fmt: skip
        if isinstance(found, Outputs):
            self._outputs = found
        else:
            self.no_outputs = found
        super().plan(dry)

    @property
    def full_reason(self) -> str:
        """Why all is computed, or `""`."""
        return "" if self._outputs else super().full_reason

    @property
    def limit(self) -> int:
        """Column from which on outputs are not known."""
        return max(self.held, self._outputs.limit) if self._outputs else super().limit

    @property
    def _beside(self) -> Beside | None:
        return self._outputs

    def _settle(self, dry: bool) -> None:
        if self._outputs is None:
            super()._settle(dry)
        else:
            self.report.skipped = self._outputs.settle(self.plans) or self.report.skipped

    # ------------------------------------------------------------------ into the layers

    def load(self) -> None:
        """Bring the outputs; where that fails, more is computed. Then the K/V."""
        if self._outputs and min(self.stops) > self.held:
            began = perf_counter()
            self.report.bytes_read += self._outputs.read(self.plans, min(self.stops))
            self.report.read_ms += 1e3 * (perf_counter() - began)
            self.stops = [min(stop, self.limit) for stop in self.stops]
        super().load()

    # ------------------------------------------------------------------ what is left

    def trim(self) -> TrimSpec:
        """As in `Prefill`, with what the head is given beside."""
        trim = super().trim()
        if self._outputs:
            trim = replace(trim, head=self._outputs.behind(self.past + trim.skip))
        return trim

    def _wanted_cuts(self, begin: int) -> set[int]:
        return set() if self._outputs else super()._wanted_cuts(begin)

    # ------------------------------------------------------------------ the model has computed

    def _agrees(self) -> bool:
        if not super()._agrees():
            return False
        if self._outputs and not self._outputs.are_taken():
            close_layers(self.conversation.layers)
            return False
        return True

    def _more_entries(self, certain: int, may_copy: Latch) -> list[Entry]:
        if self._outputs is None:
            return []
        return self._outputs.entries(self.plans, self.conversation.known, certain, may_copy)
