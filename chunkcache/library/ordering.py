"""order: documents in the order whose beginning the store knows best. Exact: nothing is moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import permutations
from math import perm
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import nn

from chunkcache.cache import RedisChunkCache
from chunkcache.errors import SettingError, StoreError
from chunkcache.model.check import check_model
from chunkcache.model.state import ModelState
from chunkcache.report import Report
from chunkcache.reuse.context import CacheContext
from chunkcache.reuse.continuations import WINDOW, Branch, find_continuations
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.stores.base import ChunkStore
from chunkcache.tokens.chunking import Chunk, Tokens, cut
from chunkcache.tokens.plan import NOT_IN_STORE, RowPlan, plan_row
from chunkcache.tokens.texts import TextOrIds, TextReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CHUNKS = 1 << 13  # asked for at once
MOST_KNOWN = 64  # beginnings that are followed further

Document = TypeVar("Document", bound=TextOrIds)
Order = tuple[int, ...]


def order(
    documents: Iterable[Document],
    model: nn.Module,
    store: ChunkStore | str | list[str] | None = None,
    *,
    prefix: TextOrIds | None = None,
    separator: TextOrIds = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> list[Document]:
    """The documents in the order of which the store has the longest exact beginning.

    For prompts in which the order does not matter: what is reused then is reused exactly.

    ```python
    texts = chunkcache.order(texts, model, url, prefix=system, separator="\\n\\n", tokenizer=tok)
    prompt = system + "\\n\\n".join(texts) + question
    ```

    All orders are compared where they are few (six documents of 200 tokens, say), in two round
    trips; of more documents, those that go on from known beginnings, in two round trips for every
    document or two that is known. Of orders that are known as far, the first in the order given is
    taken, so documents that the store knows nothing of stay as they are.

    Args:
        documents: Texts, or token ids `[tokens]`.
        model: As in `RedisChunkCache`.
        store: Likewise.
        prefix: What stands before the first document in the prompt: a text, before which the
            tokenizer puts what it puts before a prompt, or token ids; `None` as in `add_documents`.
        separator: What stands between two documents.
        tokenizer: The model's, for texts. If all is text, the prompt is read as a whole, so that
            tokens which join two documents are right.
        settings: As in `Settings`: those of the cache that will read the prompt.

    Raises:
        SettingError: A document or a setting cannot work, such as a text without `tokenizer`.
        UnsupportedModelError: The model has no K/V cache that could be filled.
        StoreError: The store failed, with `on_error="raise"`. Otherwise the order given is kept.
    """
    if isinstance(documents, str | bytes) or not isinstance(documents, Iterable):
        raise SettingError(
            "documents must be an iterable of texts or of token ids, not one "
            f"{type(documents).__name__}: put a single document into a list"
        )
    given = list(documents)
    inner = check_model(model)
    prompt_of = _prompt_maker(given, TextReader(inner, tokenizer), prefix, separator)
    cache = RedisChunkCache(model, store, **settings)
    chosen, state, report = cache.settings, ModelState.of(inner), Report()
    context = CacheContext(inner, state, cache.store, chosen)
    keys = context.model_keys()
    best: Order = ()
    if keys is not None and len(given) > 1 and chosen.reuse != "off":
        try:
            with context.store_calls(report):
                best = _best(len(given), prompt_of, context, keys)
        except StoreError as error:
            context.handle_store_error(error, report)
    rest = (number for number in range(len(given)) if number not in best)
    return [given[number] for number in (*best, *rest)]


def _prompt_maker(
    given: Sequence[TextOrIds], reader: TextReader, prefix: TextOrIds | None, separator: TextOrIds
) -> Callable[[Order], Tokens]:
    """What gives the token ids, `[tokens]`, of prefix and documents in some order."""
    parts = [reader.read(each, f"document {place}") for place, each in enumerate(given)]
    begin, between = reader.read_prefix(prefix), np.zeros(0, dtype=np.int64)
    if not isinstance(separator, str) or separator:
        between = reader.read(separator, "separator")
    if given and all(isinstance(each, str) for each in (*given, prefix or "", separator)):
        lead = reader.read_prefix("")
        texts, before = [str(each) for each in given], str(prefix or "")

        def read_whole(order: Order) -> Tokens:
            text = before + str(separator).join(texts[number] for number in order)
            ids = reader.read(text, "prefix")
            spelled_out = np.array_equal(ids[: len(lead)], lead)
            return ids if spelled_out else np.concatenate([lead, ids])

        return read_whole

    def join(order: Order) -> Tokens:
        joined = [part for number in order for part in (between, parts[number])][1:]
        return np.concatenate([begin, *joined])

    return join


def _best(
    count: int, prompt_of: Callable[[Order], Tokens], context: CacheContext, keys: KeySpace
) -> Order:
    """The longest known order, or the documents at the beginning of one.

    Orders are made longer from beginnings that are known to their end, so many documents at once
    as chunks may be asked for.
    """
    best: Order = ()
    longest, known = 0, [best]
    chunks = max(len(prompt_of(tuple(range(count)))) // context.grid.stride, 1)
    while known:
        left = count - len(known[0])
        more = max(
            (n for n in range(1, left + 1) if perm(left, n) * len(known) * chunks <= MOST_CHUNKS),
            default=1,
        )
        tried = [
            begin + others
            for begin in known
            for others in permutations([n for n in range(count) if n not in begin], more)
        ]
        prompts = list(map(prompt_of, tried))
        reaches = _reaches(prompts, context, keys)
        for each, reach in zip(tried, reaches, strict=True):
            if reach > longest:
                best, longest = each, reach
        if more == left:
            break
        # What ends less than a window behind its last chunk cannot be looked up, but longer.
        known = [
            each
            for each, ids, reach in zip(tried, prompts, reaches, strict=True)
            if reach > len(ids) - WINDOW
        ][:MOST_KNOWN]
    return best


def _reaches(prompts: Sequence[Tokens], context: CacheContext, keys: KeySpace) -> list[int]:
    """How many tokens of each prompt the store knows from its start, in two round trips."""
    cuts = [cut(ids, context.grid, keys.salt, tail=True) for ids in prompts]
    hashes = list(dict.fromkeys(chunk.hash for chunks in cuts for chunk in chunks))
    sizes = context.store.sizes([keys.key(name) for name in hashes])
    there = {name for name, size in zip(hashes, sizes, strict=True) if size}
    plans = [
        plan_row(chunks, len(ids), 0, there, NOT_IN_STORE)
        for chunks, ids in zip(cuts, prompts, strict=True)
    ]
    if context.pieces.reproducible:
        return [plan.reach for plan in plans]
    return [
        max([plan.reach, *(chunk.stop for chunk in longer)])
        for plan, longer in zip(plans, _continued(plans, prompts, context, keys), strict=True)
    ]


def _continued(
    plans: Sequence[RowPlan], prompts: Sequence[Tokens], context: CacheContext, keys: KeySpace
) -> list[list[Chunk]]:
    """Stored chunks that go on where the known chunks of each prompt end."""
    branches = [Branch.of(plan, ids, len(ids)) for plan, ids in zip(plans, prompts, strict=True)]
    found, _ = find_continuations(context.store, keys, branches)
    names = list(dict.fromkeys(each.chunk.hash for row in found for each in row))
    sizes = context.store.sizes([keys.key(name) for name in names]) if names else []
    gone = {name for name, size in zip(names, sizes, strict=True) if not size}
    return [[each.chunk for each in row if each.chunk.hash not in gone] for row in found]
