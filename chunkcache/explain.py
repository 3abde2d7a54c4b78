"""Explain: what a cache would find of a prompt, and why not more, without running the model.

Each chunk is asked for as a prompt's would be. The rest is looked up by its text as well (the
anchors that caches with `reuse="anywhere"` leave), so that text which is known, but not under the
key wanted, can be told from text that is new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from chunkcache.chunking import Chunk, Tokens, cut
from chunkcache.errors import StoreError
from chunkcache.explanation import Explanation, Finding
from chunkcache.index import Passage, is_exact, search
from chunkcache.matching import Piece
from chunkcache.plan import NOT_IN_STORE, Kind, RowPlan, plan_row
from chunkcache.prefill import TRAINING
from chunkcache.prompt import Prompt
from chunkcache.repair import Mask
from chunkcache.restore import blob_sizes
from chunkcache.seams import Decode, Seam, find_seams
from chunkcache.step import Setup
from chunkcache.stores.calls import calls_of_prompt

LAST_TOKEN = "the last token is always computed"
TAIL_NOT_IN_STORE = "not in the store (a shorter last chunk is kept only where a prompt ended)"
GAP_BEFORE = "in the store, but a chunk before it is missing"
OTHER_ROW = "in the store, but another row of the batch needs these columns computed"
OTHER_POSITION = "computed at another position"
OTHER_CUT = "cut into other chunks"
OTHER_CONTEXT = "computed behind other text"
INEXACT_CONTEXT = "computed behind moved text"
BLOB_GONE = "its text is known, but its K/V went from the store"
WOULD_MOVE = ": reuse='anywhere' would find it"


def explain(setup: Setup, prompt: Prompt, decode: Decode | None = None) -> Explanation:
    """What a cache with this setup would find of a prompt. Asks the store, and writes nothing.

    Args:
        setup: That of the cache.
        prompt: The prompt.
        decode: The tokenizer's, to find where the same text has other tokens.

    Raises:
        StoreError: The store failed, and `on_error="raise"` was asked for.
    """
    with calls_of_prompt() as calls:
        explanation = _explain(setup, prompt, decode)
    for error in calls.errors:  # of a tier or a server, without which the rest went on
        _raise_if_asked(setup, error)
    partly = (str(error) for error in calls.errors)
    return replace(explanation, errors=tuple(dict.fromkeys([*explanation.errors, *partly])))


def _explain(setup: Setup, prompt: Prompt, decode: Decode | None) -> Explanation:
    pads = prompt.as_call().pads()
    rows: list[Tokens] = [prompt.ids[row, pad:].numpy() for row, pad in enumerate(pads)]
    if why := _why_aside(setup, prompt):
        return Explanation(_all_computed(rows, why), skipped=why)
    if setup.settings.reuse == "off":
        return Explanation(_all_computed(rows, "reuse is off"))
    identity = setup.state.identity()
    origin = setup.origin(identity)
    layout = setup.state.proof(identity, setup.store).layout
    assert layout is not None, "a model without a layout is set aside"
    cuts = [cut(tokens, setup.grid, origin.salt, tail=True) for tokens in rows]
    try:
        sizes = blob_sizes(
            setup.store, (chunk.hash for chunks in cuts for chunk in chunks), origin.key
        )
    except StoreError as error:
        _raise_if_asked(setup, error)
        return Explanation(_all_computed(rows, "the store failed"), errors=(str(error),))
    there = {name for name, size in sizes.items() if size}
    plans = [
        plan_row(chunks, len(tokens), 0, there, NOT_IN_STORE)
        for chunks, tokens in zip(cuts, rows, strict=True)
    ]
    known = [max(min(plan.reach, plan.tokens - 1), 0) for plan in plans]
    passages = [Passage(t, start, len(t) - 1) for t, start in zip(rows, known, strict=True)]
    errors: tuple[str, ...] = ()
    pieces: list[list[Piece]] = [[] for _ in rows]
    try:
        found = search(origin, passages).pieces
        sizes |= blob_sizes(
            setup.store, (piece.chunk.hash for row in found for piece in row), origin.key
        )
        pieces = found
    except StoreError as error:
        _raise_if_asked(setup, error)
        errors = (str(error),)
    exact = [
        {piece for piece in found if is_exact(piece, tokens, setup.grid, origin.salt)}
        for found, tokens in zip(pieces, rows, strict=True)
    ]
    looks = [
        _Row(row, setup, sizes, *parts)
        for row, parts in enumerate(zip(pads, plans, known, pieces, exact, strict=True))
    ]
    # Rows go through the model together: what one has to compute is computed in all.
    computed = np.zeros(prompt.ids.shape[1], dtype=bool)
    for look in looks:
        computed[look.pad :] |= look.unknown()
    moved = {name for look in looks for name in look.moved_reads(computed)}
    reused = {name for look in looks for name in look.exact_reads(computed)}
    return Explanation(
        tuple(finding for look in looks for finding in look.findings(computed)),
        sum(sizes[name] for name in reused | moved),
        errors=errors,
        lossy=origin.lossy(layout),
        seams=tuple(seam for look in looks for seam in look.seams(rows[look.row], decode)),
    )


def _why_aside(setup: Setup, prompt: Prompt) -> str:
    if setup.model.training:
        return TRAINING
    state, call = setup.state, prompt.as_call()
    if obstacle := state.proof(state.identity(), setup.store).obstacle:
        return obstacle
    if not call.follows(0, call.pads()):
        return "attention_mask is not that of a text with padding on its left alone"
    return state.hooks.reason(state.foreign)


def _all_computed(rows: Sequence[Tokens], why: str) -> tuple[Finding, ...]:
    return tuple(
        Finding(0, len(tokens), Kind.COMPUTED, reason=why, row=row)
        for row, tokens in enumerate(rows)
        if len(tokens)
    )


def _raise_if_asked(setup: Setup, error: StoreError) -> None:
    if setup.settings.on_error == "raise":
        raise error


@dataclass(frozen=True, slots=True)
class _Row:
    """What is known of one row of the batch.

    Attributes:
        row: Its number.
        setup: Whether text may move.
        sizes: Bytes of each chunk's blob, by hash.
        pad: Columns of padding before it.
        plan: The row's chunks, and how far they are known.
        known: How many tokens from the start could be reused.
        pieces: What was found by its text behind those.
        exact: Those of them whose K/V would be taken as they are.
    """

    row: int
    setup: Setup
    sizes: Mapping[str, int]
    pad: int
    plan: RowPlan
    known: int
    pieces: list[Piece]
    exact: set[Piece]

    @property
    def _may_move(self) -> bool:
        return self.setup.settings.reuse == "anywhere"

    def _moving(self) -> list[Piece]:
        return [p for p in self.pieces if self._may_move and self.sizes[p.chunk.hash]]

    def unknown(self) -> Mask:
        """`[tokens]`, True where this row alone would have to be computed."""
        mask = np.ones(self.plan.tokens, dtype=bool)
        mask[: self.known] = False
        for piece in self._moving():
            mask[piece.start : piece.stop] = False
        return mask

    def moved_reads(self, computed: Mask) -> set[str]:
        """Hashes of chunks to be moved, where they spare the model one of these columns."""
        here = computed[self.pad :]
        return {p.chunk.hash for p in self._moving() if not here[p.start : p.stop].all()}

    def exact_reads(self, computed: Mask) -> set[str]:
        """Hashes of the chunks whose K/V would be taken as they are."""
        stop = self.known
        if not self._may_move:
            stop = min(stop, int(computed[self.pad :].argmax()))
        return {chunk.hash for chunk in self.plan.reads(stop)}

    def seams(self, tokens: Tokens, decode: Decode | None) -> list[Seam]:
        """Where the tokens of this row, `[tokens]`, part from stored ones, the text going on."""
        return find_seams(tokens, self.pieces, decode, self.row) if decode else []

    def findings(self, computed: Mask) -> list[Finding]:
        """The fate of every token, in order, when these columns are computed."""
        end, here = self.plan.tokens, computed[self.pad :]
        chunks = self.plan.chunks[::-1]  # of two that overlap, the first serves
        exact = [c for c in chunks if c.start < self.known and c.stop <= self.plan.reach]
        missing = [self._chunk(c, NOT_IN_STORE) for c in chunks if not self.sizes[c.hash]]
        there = [self._chunk(c, GAP_BEFORE) for c in chunks if self.sizes[c.hash]]
        by_text = [self._piece(piece, here) for piece in self.pieces]
        # What is said later of a token hides what was said before.
        said = [
            Finding(0, end, Kind.COMPUTED, reason=NOT_IN_STORE, row=self.row),
            *missing,
            *([*there, *by_text] if self._may_move else [*by_text, *there]),
            *(self._chunk(chunk, "", Kind.REUSED) for chunk in exact),
            Finding(max(end - 1, 0), end, Kind.COMPUTED, reason=LAST_TOKEN, row=self.row),
        ]
        speaker = np.zeros(end, dtype=np.int64)
        for number, finding in enumerate(said):
            speaker[finding.start : finding.stop] = number
        changes = (np.diff(speaker) != 0) | np.diff(here)
        edges = [0, *(np.flatnonzero(changes) + 1).tolist(), end]
        findings = [said[speaker[a]].part(a, b) for a, b in pairwise(edges) if a < b]
        return [
            replace(f, kind=Kind.COMPUTED, reason=OTHER_ROW)
            if f.kind is Kind.REUSED and here[f.start]
            else f
            for f in findings
        ]

    def _chunk(self, chunk: Chunk, why: str, kind: Kind = Kind.COMPUTED) -> Finding:
        if why == NOT_IN_STORE and chunk.stop - chunk.start < self.setup.grid.size:
            why = TAIL_NOT_IN_STORE
        size = self.sizes[chunk.hash]
        origin = "store" if size else ""
        return Finding(
            chunk.start, chunk.stop, kind, chunk.hash, origin, why, row=self.row, bytes=size
        )

    def _piece(self, piece: Piece, here: Mask) -> Finding:
        size, why = self.sizes[piece.chunk.hash], self._why_not_exact(piece)
        kind = Kind.COMPUTED
        if not size:
            why = BLOB_GONE
        elif not self._may_move:
            why += WOULD_MOVE
        elif here[piece.start : piece.stop].all():
            why = OTHER_ROW
        elif piece in self.exact:
            kind, why = Kind.REUSED, ""
        else:
            kind = Kind.MOVED
        return Finding(
            piece.start, piece.stop, kind, piece.chunk.hash, "", why,
            row=self.row, bytes=size, old_start=piece.old_start,
        )  # fmt: skip

    def _why_not_exact(self, piece: Piece) -> str:
        """Why text that is in the store is not found under a key of this prompt."""
        if piece.old_start != piece.start:
            return OTHER_POSITION
        if not piece.chunk.clean:
            return INEXACT_CONTEXT
        stop = piece.chunk.start + len(piece.chunk.tokens)
        for chunk in self.plan.chunks:
            if (chunk.start, chunk.stop) == (piece.chunk.start, stop):
                return GAP_BEFORE if chunk.hash == piece.chunk.hash else OTHER_CONTEXT
        return OTHER_CUT
