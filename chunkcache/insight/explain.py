"""Explain: what a cache would find of a prompt, and why not more, without running the model.

The prompt is planned as a real one is (`Prefill.plan`), and no blob is read. What the plan does not
find is looked up by its text as well, in every mode, in the index that caches with
`reuse="anywhere"` write: so known text under another key can be told from new text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from chunkcache.anywhere.index import Passage
from chunkcache.anywhere.moved import MovedText
from chunkcache.anywhere.prefill import AnywherePrefill, find_moved
from chunkcache.errors import StoreError
from chunkcache.insight.alike import repeats
from chunkcache.insight.elsewhere import sightings
from chunkcache.insight.explanation import Explanation, Finding
from chunkcache.insight.fates import RowFate
from chunkcache.insight.seams import Decode
from chunkcache.report import Report
from chunkcache.reuse.context import CacheContext
from chunkcache.reuse.conversation import Conversation
from chunkcache.reuse.prefill import Prefill
from chunkcache.reuse.prompt import Prompt
from chunkcache.tokens.chunking import Tokens
from chunkcache.tokens.plan import Kind


def explain(
    context: CacheContext,
    prefill_type: type[Prefill],
    prompt: Prompt,
    decode: Decode | None = None,
    elsewhere: bool = True,
) -> Explanation:
    """What a cache with this context would find of a prompt. Asks the store, and writes nothing.

    Args:
        context: That of the cache.
        prefill_type: The kind of prefill that the cache would use, whose plan is followed.
        prompt: The prompt.
        decode: The tokenizer's, to find where the same text has other tokens.
        elsewhere: Go through the whole store for what is not found (see `elsewhere.py`).

    Raises:
        StoreError: The store failed, and `on_error="raise"` was asked for.
    """
    report = Report()
    prefill = prefill_type(
        Conversation(context), context.model, prompt.as_call(context.model), report
    )
    with context.store_calls(report):
        if not prefill.take_prompt():
            reason = prefill.conversation.bypass_reason
            found = Explanation(_all_computed(prompt, reason), skipped=reason)
        else:
            prefill.plan(dry=True)
            found = _explain(prefill, prompt, decode, elsewhere)
    return replace(found, errors=tuple(report.errors))


def _explain(
    prefill: Prefill, prompt: Prompt, decode: Decode | None, elsewhere: bool
) -> Explanation:
    context, plans, pads = prefill.context, prefill.plans, prefill.pads
    if context.settings.reuse == "off" or prefill.lookup_failed:
        return Explanation(_all_computed(prompt, plans[0].missing))
    rows: list[Tokens] = [prompt.ids[row, pad:].numpy() for row, pad in enumerate(pads)]
    known = [max(min(plan.reach, plan.tokens - 1), 0) for plan in plans]
    texts = _by_text(prefill, rows, known)
    sizes = {chunk.hash: 0 for plan in plans for chunk in plan.chunks} | prefill.sizes
    looks = [
        RowFate(
            row, context, sizes, pad, plan, reach, text.known(), text.exact, prefill.damaged,
            text.short, continuation=prefill.continuation(plan),
        )
        for row, (pad, plan, reach, text) in enumerate(
            zip(pads, plans, known, texts, strict=True)
        )
    ]  # fmt: skip
    looks = [
        replace(look, repeats=repeats(tokens, look.missing()))
        for look, tokens in zip(looks, rows, strict=True)
    ]
    if elsewhere:
        try:
            wanted = [look.missing() for look in looks]
            cuts = [plan.chunks for plan in plans]
            seen = sightings(context, prefill.keys, rows, cuts, wanted)
            looks = [replace(look, seen=row) for look, row in zip(looks, seen, strict=True)]
        except StoreError as error:
            context.handle_store_error(error, prefill.report)
    computed = np.zeros(prompt.ids.shape, dtype=bool)
    for look in looks:
        computed[look.row, look.pad :] = look.unknown()
    if prefill.computes_together:
        computed[:] = computed.any(axis=0)
    exact, whole, moved = (
        set().union(*sets)
        for sets in zip(*(look.reads(computed[look.row]) for look in looks), strict=True)
    )
    # What serves whole is at hand for moving; what serves in part is read again.
    reads = [*exact, *(moved - whole)]
    return Explanation(
        tuple(finding for look in looks for finding in look.findings(computed[look.row])),
        sum(sizes[name] for name in reads),
        skipped=prefill.report.skipped,
        lossy=prefill.keys.lossy,
        seams=tuple(seam for look in looks for seam in look.seams(rows[look.row], decode)),
    )


def _by_text(prefill: Prefill, rows: Sequence[Tokens], known: Sequence[int]) -> list[MovedText]:
    """What the index knows of each row's text, whether `reuse` lets it be moved or not."""
    if isinstance(prefill, AnywherePrefill) and prefill.moved:
        by_row = {row: text for text in prefill.moved for row in text.passage.rows}
        return [by_row[row] for row in range(len(rows))]
    passages = [
        Passage(tokens, start, max(len(tokens) - 1, 0))
        for tokens, start in zip(rows, known, strict=True)
    ]
    try:
        return find_moved(prefill, passages)[0]
    except StoreError as error:
        prefill.context.handle_store_error(error, prefill.report)
        return [MovedText(passage, [], [], [], set()) for passage in passages]


def _all_computed(prompt: Prompt, why: str) -> tuple[Finding, ...]:
    lengths = prompt.mask.sum(dim=1).tolist()
    return tuple(
        Finding(0, length, Kind.COMPUTED, reason=why, row=row)
        for row, length in enumerate(lengths)
        if length
    )
