"""Explain: what a cache would find of a prompt, and why not more, without running the model.

Each chunk is asked for as a prompt's would be. The rest is looked up by its text as well (the
anchors that caches with `reuse="anywhere"` leave), so that text which is known, but not under the
key wanted, can be told from text that is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from chunkcache.errors import StoreError
from chunkcache.gain import NO_GAIN
from chunkcache.insight.alike import repeats
from chunkcache.insight.elsewhere import sightings
from chunkcache.insight.explanation import Explanation, Finding
from chunkcache.insight.fates import RowFate
from chunkcache.kv.coding import Form
from chunkcache.reuse.index import Passage, is_exact, search
from chunkcache.reuse.prefill import TRAINING
from chunkcache.reuse.prompt import Prompt
from chunkcache.reuse.restore import blob_sizes
from chunkcache.reuse.step import Setup
from chunkcache.stores.base import calls_of_prompt
from chunkcache.tokens.chunking import Tokens, cut
from chunkcache.tokens.matching import Piece
from chunkcache.tokens.plan import NOT_IN_STORE, OFF, Kind, plan_row
from chunkcache.tokens.seams import Decode


def explain(
    setup: Setup, prompt: Prompt, decode: Decode | None = None, elsewhere: bool = True
) -> Explanation:
    """What a cache with this setup would find of a prompt. Asks the store, and writes nothing.

    Args:
        setup: That of the cache.
        prompt: The prompt.
        decode: The tokenizer's, to find where the same text has other tokens.
        elsewhere: Go through the whole store for what is not found (see `elsewhere.py`).

    Raises:
        StoreError: The store failed, and `on_error="raise"` was asked for.
    """
    with calls_of_prompt() as calls:
        explanation = _explain(setup, prompt, decode, elsewhere)
    for error in calls.errors:  # of a tier or a server, without which the rest went on
        _raise_if_asked(setup, error)
    partly = (str(error) for error in calls.errors)
    return replace(explanation, errors=tuple(dict.fromkeys([*explanation.errors, *partly])))


def _explain(setup: Setup, prompt: Prompt, decode: Decode | None, elsewhere: bool) -> Explanation:
    pads = prompt.as_call().pads()
    rows: list[Tokens] = [prompt.ids[row, pad:].numpy() for row, pad in enumerate(pads)]
    if why := _why_aside(setup, prompt):
        return Explanation(_all_computed(rows, why), skipped=why)
    if setup.settings.reuse == "off":
        return Explanation(_all_computed(rows, OFF))
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
    damaged = {
        chunk.hash
        for chunks, tokens in zip(cuts, rows, strict=True)
        for chunk in chunks
        if _is_damaged(
            origin.form(layout, tokens[chunk.start : chunk.stop].tolist(), chunk.start, chunk.hash),
            sizes[chunk.hash],
        )
    }
    sizes |= dict.fromkeys(damaged, 0)
    there = {name for name, size in sizes.items() if size}
    plans = [
        plan_row(chunks, len(tokens), 0, there, NOT_IN_STORE)
        for chunks, tokens in zip(cuts, rows, strict=True)
    ]
    known = [max(min(plan.reach, plan.tokens - 1), 0) for plan in plans]
    passages = [Passage(t, start, len(t) - 1) for t, start in zip(rows, known, strict=True)]
    errors: tuple[str, ...] = ()
    pieces: list[list[Piece]] = [[] for _ in rows]
    short = pieces
    try:
        found = search(origin, passages)
        held = {piece.chunk.hash: piece.chunk for row in found.pieces for piece in row}
        sizes |= blob_sizes(setup.store, held, origin.key)
        damaged |= {
            name
            for name, chunk in held.items()
            if _is_damaged(
                origin.form(layout, chunk.tokens.tolist(), chunk.start, name), sizes[name]
            )
        }
        sizes |= dict.fromkeys(damaged, 0)
        pieces, short = found.pieces, found.short
    except StoreError as error:
        _raise_if_asked(setup, error)
        errors = (str(error),)
    exact = [
        {piece for piece in row if is_exact(piece, tokens, setup.grid, origin.salt)}
        for row, tokens in zip(pieces, rows, strict=True)
    ]
    looks = [
        RowFate(row, setup, sizes, *parts, damaged=damaged)
        for row, parts in enumerate(zip(pads, plans, known, pieces, exact, strict=True))
    ]
    looks = [
        replace(look, short=few, repeats=repeats(tokens, look.missing()))
        for look, tokens, few in zip(looks, rows, short, strict=True)
    ]
    if elsewhere:
        try:
            wanted = [look.missing() for look in looks]
            seen = sightings(origin, setup.settings, rows, cuts, wanted)
            looks = [replace(look, seen=row) for look, row in zip(looks, seen, strict=True)]
        except StoreError as error:
            _raise_if_asked(setup, error)
            errors = (*errors, str(error))
    # Rows go through the model together: what one has to compute is computed in all.
    computed = np.zeros(prompt.ids.shape[1], dtype=bool)
    for look in looks:
        computed[look.pad :] |= look.unknown()
    moved = {name for look in looks for name in look.moved_reads(computed)}
    reused = {name for look in looks for name in look.exact_reads(computed)}
    nbytes = sum(sizes[name] for name in reused | moved)
    findings = tuple(finding for look in looks for finding in look.findings(computed))
    if setup.settings.reuse == "prefix":
        hits = sum(finding.tokens for finding in findings if finding.hit)
        if not setup.gauge.expects_gain(hits, nbytes, setup.settings.min_gain):
            findings, nbytes = tuple(map(_left_out, findings)), 0
    return Explanation(
        findings,
        nbytes,
        errors=errors,
        lossy=origin.lossy(layout),
        seams=tuple(seam for look in looks for seam in look.seams(rows[look.row], decode)),
    )


def _is_damaged(form: Form, size: int) -> bool:
    return size > 0 and not form.may_have(size)


def _why_aside(setup: Setup, prompt: Prompt) -> str:
    if setup.model.training:
        return TRAINING
    state, call = setup.state, prompt.as_call()
    identity = state.identity()
    if reason := setup.foreign_code:
        return reason
    if obstacle := state.proof(identity, setup.store).obstacle:
        return obstacle
    if not call.follows(0, call.pads()):
        return "attention_mask is not that of a text with padding on its left alone"
    return ""


def _all_computed(rows: Sequence[Tokens], why: str) -> tuple[Finding, ...]:
    return tuple(
        Finding(0, len(tokens), Kind.COMPUTED, reason=why, row=row)
        for row, tokens in enumerate(rows)
        if len(tokens)
    )


def _left_out(finding: Finding) -> Finding:
    return replace(finding, kind=Kind.COMPUTED, reason=NO_GAIN) if finding.hit else finding


def _raise_if_asked(setup: Setup, error: StoreError) -> None:
    if setup.settings.on_error == "raise":
        raise error
