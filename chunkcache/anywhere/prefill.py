"""AnywherePrefill: a prompt whose text may have stood elsewhere when its K/V were computed.

Behind the exact beginning of each row, runs of known text are put in place, their keys rotated to
their new positions, and repaired as `repair` says. What is left to the model is then scattered:
columns that some row does not know or has to compute again. They go through it in one pass, in
every row (see `model/scatter.py`); what a row knows of them already is computed again, which is
never less exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkcache.anywhere.index import Passage, is_exact, search
from chunkcache.anywhere.matching import SHORTEST_RUN, runs
from chunkcache.anywhere.moved import NOT_PREPARED, MovedText
from chunkcache.anywhere.probes import Probes
from chunkcache.anywhere.relocate import fill_matches
from chunkcache.errors import RepairError, StoreError, UnsupportedModelError
from chunkcache.kv.layers import GrowingLayer
from chunkcache.kv.rope import KeyRotation
from chunkcache.model.scatter import open_layers, scatter_mask
from chunkcache.repair import Head, Mask
from chunkcache.reuse.conversation import Conversation
from chunkcache.reuse.harvest import Found
from chunkcache.reuse.hook import TrimSpec
from chunkcache.reuse.prefill import Prefill
from chunkcache.stores.base import Entry
from chunkcache.tokens.chunking import Chunk, Tokens, keyed_hash
from chunkcache.tokens.plan import NOT_IN_STORE, Kind, computed_too


class AnywherePrefill(Prefill):
    """Prefill that reuses text wherever it stood before.

    Attributes:
        moved: What is known of the distinct rows by their text.
    """

    no_outputs = "reuse='anywhere' keeps no outputs"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.moved: list[MovedText] = []
        self._rotation: KeyRotation | None = None
        # Start and stop of each stretch of tokens that were found nowhere, row by row.
        self._fresh: list[list[tuple[int, int]]] = []

    @staticmethod
    def check_model(conversation: Conversation) -> None:
        """Raise UnsupportedModelError if the model's K/V may not be moved."""
        verified_rotation(conversation)

    # ------------------------------------------------------------------ what is known

    def plan(self, dry: bool = False) -> None:
        """Ask which chunks are known where they stand, and then which text is known elsewhere."""
        if self.limit > self.held and self.conversation.transcript.text_until is None:
            try:
                self._rotation = verified_rotation(self.conversation)
            except UnsupportedModelError as error:  # its attention was changed since it was made
                self._handle(error)
        super().plan(dry)
        self._search()

    def _look_up(self, rows: Sequence[Sequence[Chunk]], held: Sequence[int]) -> str:
        """As in `Prefill`. Of prepared documents alone, the beginning is found by its text, too.

        What earlier prompts have left where this one begins would be exact, but where documents
        are moved otherwise: then the answer would depend on who asked what before.
        """
        why = super()._look_up(rows, held)
        if not self.context.settings.prepared_only:
            return why
        self.conversation.known |= self.sizes.keys()  # which need not be written again
        self.sizes = {}
        return why if self.lookup_failed else NOT_PREPARED

    def _follow_branches(self, dry: bool) -> None:
        if not self.context.settings.prepared_only:
            super()._follow_branches(dry)

    @property
    def _reads_together(self) -> bool:
        return self._rotation is None

    def _search(self) -> None:
        """Look up the text behind the exact beginnings, and what of it saves computing a column."""
        if self._rotation is None or self.context.settings.reuse == "off":
            return
        began = perf_counter()
        passages = _passages(self.conversation.transcript.ids(), self.pads, self.stops, self.limit)
        try:
            self.moved, stale = find_moved(self, passages)
            self.stale |= stale
        except StoreError as error:
            self._handle(error)
            self.moved = []
        computed = self._any_row(lambda text: text.unknown(text.found))
        for text in self.moved:
            here = computed[text.passage.pad :]
            text.wanted = [p for p in text.found if not here[p.start : p.stop].all()]
        self.report.lookup_ms += 1e3 * (perf_counter() - began)

    def _any_row(self, mask_of: Callable[[MovedText], Mask]) -> Mask:
        """`[columns]`, True where a mask is in any of the rows."""
        mask = np.zeros(self.total, dtype=bool)
        for text in self.moved:
            mask[text.passage.pad :] |= mask_of(text)
        return mask

    # ------------------------------------------------------------------ into the layers

    def load(self) -> None:
        """Bring what is known into the layers: the exact beginnings, then what is moved."""
        super().load()
        assert self._loader is not None
        if self._rotation is None:
            return
        if self._loader.failed:
            self._search()  # behind what is left of them
        began = perf_counter()
        placed = fill_matches(
            self._reader, self.conversation.layers, self._rotation,
            [(text.passage, text.wanted) for text in self.moved],
            self.sizes, self.forms, self._loader.at_hand,
        )  # fmt: skip
        for text in self.moved:
            text.placed = [match for match in text.wanted if match in placed]
        self._count_read()
        self.report.move_ms += 1e3 * (perf_counter() - began)
        if any(text.placed for text in self.moved):
            for layer in self.conversation.layers:
                if isinstance(layer, GrowingLayer):
                    layer.hold(self.total)
                    for text in self.moved:
                        _blank(layer, text)
            for text in self.moved:
                text.again = self._pick(text)

    def _pick(self, text: MovedText) -> Mask:
        """What the strategy picks; should its probes fail on this model, the heads of the runs."""
        passage, repair = text.passage, self.context.settings.strategy
        if not text.moving():
            return text.moved()
        layers = [
            layer.one_row(passage.rows[0], passage.pad, len(passage.tokens))
            if isinstance(layer, GrowingLayer)
            else layer
            for layer in self.conversation.layers
        ]
        ids, known = torch.from_numpy(passage.tokens)[None], ~text.unknown(text.placed)
        spans = [(run[0].start, run[-1].stop) for run in runs(text.moving())]
        model = self.context.model
        probes = Probes(model, layers, ids, torch.from_numpy(known), passage.start, spans)
        try:
            picked = repair.pick(probes)
        except Exception as error:  # a probe runs a model in a way its authors did not foresee
            self._handle(RepairError(f"repair {repair} failed, head:4 was used: {error}"))
            picked = Head().pick(probes)
        self.report.charged += probes.charged
        return picked & text.moved()

    # ------------------------------------------------------------------ what is left

    def trim(self) -> TrimSpec:
        """Declare what is known to be held. Returns what is left to compute."""
        if not any(text.placed for text in self.moved):
            trim = super().trim()
            begin = self.past + trim.skip
            self._fresh = [[(max(begin - pad, 0), self.total - pad)] for pad in self.pads]
            return trim
        transcript, pads = self.conversation.transcript, self.pads
        computed = self._any_row(lambda text: text.again | text.unknown(text.placed))
        columns = torch.from_numpy(np.flatnonzero(computed))
        self.spans, self._fresh = [[] for _ in pads], [[] for _ in pads]
        for text in self.moved:
            here, start = computed[text.passage.pad :], text.passage.start
            spans, inexact_from = text.spans(here), text.inexact_from(here)
            again = sum(span.tokens for span in spans if span.kind is Kind.RECOMPUTED)
            self.report.charged += len(text.passage.rows) * again
            for row in text.passage.rows:
                reused = [s for s in self.plans[row].spans(start) if s.stop <= start]
                self.spans[row] = computed_too(reused, computed[pads[row] :]) + spans
                self._fresh[row] = text.not_found()
                if transcript.inexact_from[row] is None:
                    transcript.inexact_from[row] = inexact_from
        self._hold(self.total)
        if taken := np.flatnonzero(~computed[self.held :]).tolist():
            self._note_rounding(self.held + taken[0])
        exact = min(self.stops)
        if rows := self._checked_rows(exact):
            columns = torch.cat([torch.tensor([exact - 1]), columns])
        columns = columns.to(self.call.place)
        open_layers(self.conversation.layers, columns, self.total)
        self._add_check_token(exact - 1, rows)
        first = torch.tensor(pads, device=columns.device)[:, None]
        mask = scatter_mask(self.context.model, columns, self.total, len(pads), pads)
        positions = (columns - first).clamp(min=0)
        return TrimSpec(columns=columns - self.past, positions=positions, mask=mask)

    # ------------------------------------------------------------------ the model has computed

    def _found(self, certain: int) -> Found:
        """Chunks that were computed behind moved ones, and index entries to correct."""
        grid, salt, transcript = self.context.grid, self.keys.salt, self.conversation.transcript
        chunks: list[list[Chunk]] = []
        lengths = transcript.exact_lengths(certain)
        for row, (pad, length) in enumerate(zip(self.pads, lengths, strict=True)):
            exact = max((stop for _, stop in grid.spans(length)), default=0)
            tokens = transcript.ids()[row, pad:].numpy()
            chunks.append([])
            for start, stop in self._fresh[row]:
                begin, end = max(start, exact), min(stop, certain - pad)
                chunks[-1] += _approximate(tokens, begin, end, grid.size, salt)
        return Found(chunks, self.stale)


def verified_rotation(conversation: Conversation) -> KeyRotation:
    """The model's rotation, verified by its self-test.

    Raises:
        UnsupportedModelError: Its K/V may not be moved.
    """
    context = conversation.context
    rotation: KeyRotation | str = conversation.self_test.bypass_reason
    if not rotation:
        assert conversation.keys is not None
        keys = conversation.keys
        rotation = context.state.verified_rotation(keys.identity, keys.layout, context.store)
    if isinstance(rotation, str):
        raise UnsupportedModelError(
            f"reuse='anywhere' is not possible with {context.model.__class__.__name__}: "
            f"{rotation}. Use reuse='prefix'"
        )
    return rotation


def find_moved(
    prefill: Prefill, passages: Sequence[Passage]
) -> tuple[list[MovedText], dict[str, Entry]]:
    """What the store knows of passages of a prompt by their text, and index entries to correct.

    Raises:
        StoreError: The store failed.
    """
    context, keys, sizes = prefill.context, prefill.keys, prefill.sizes
    prepared = context.settings.prepared_only
    found = search(context.store, keys, passages, prepared)
    chunks = {match.chunk.hash: match.chunk for matches in found.matches for match in matches}
    names = [name for name in chunks if name not in sizes]
    if names:
        nbytes = context.store.sizes([keys.key(name) for name in names])
        sizes |= dict(zip(names, nbytes, strict=True))
        # Exact ones among them are not written again, which would make them a prompt's.
        prefill.conversation.known |= {name for name in names if sizes[name]}
    for name, chunk in chunks.items():
        if name not in prefill.forms:
            prefill.note_form(name, keys.form(chunk.tokens.tolist(), chunk.start, name))
    moved = [
        MovedText(
            passage,
            [match for match in matches if sizes[match.chunk.hash]],
            [match for match in matches if not sizes[match.chunk.hash]],
            short,
            {p for p in matches if is_exact(p, passage.tokens, context.grid, keys.salt)},
            NOT_PREPARED if prepared else NOT_IN_STORE,
        )
        for passage, matches, short in zip(passages, found.matches, found.short, strict=True)
    ]
    return moved, found.stale


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


def _blank(layer: GrowingLayer, text: MovedText) -> None:
    """Zero what is not known: memory may hold anything, and a masked NaN is still a NaN."""
    pad = text.passage.pad
    where = torch.from_numpy(pad + np.flatnonzero(text.unknown(text.placed))).to(layer.device)
    for row in text.passage.rows:
        layer.keys[row].index_fill_(1, where, 0)
        layer.values[row].index_fill_(1, where, 0)


def _approximate(tokens: Tokens, start: int, stop: int, size: int, salt: bytes) -> list[Chunk]:
    """Chunks for tokens that were computed behind moved ones.

    Their K/V are not those of their prefix, so their hashes can never be those of exact chunks:
    they are found by their text alone.
    """
    chunks = []
    for begin in range(start, stop if stop - start >= SHORTEST_RUN else start, size):
        end = min(begin + size, stop)
        before = np.ascontiguousarray(tokens[:end], dtype="<i8").tobytes()
        place = begin.to_bytes(8, "little")
        digest = keyed_hash(salt, b"chunkcache/approximate/2", place, before)
        chunks.append(Chunk(begin, end, digest.hex()))
    return chunks
