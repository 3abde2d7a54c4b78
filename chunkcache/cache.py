"""RedisChunkCache: the cache that users hand to `generate()`, and how Transformers sees it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from chunkcache.errors import PickleError, SettingError, StoreError, UnsupportedCallError
from chunkcache.insight.audit import Audit, compare
from chunkcache.insight.runs import run_both
from chunkcache.insight.sampling import sample_audit
from chunkcache.keys import INT8
from chunkcache.kv.states import state_layers
from chunkcache.metrics import Meter
from chunkcache.model.check import check_model
from chunkcache.model.head import tap
from chunkcache.model.state import ModelState
from chunkcache.report import Report
from chunkcache.reuse.context import CacheContext, Indexer
from chunkcache.reuse.conversation import Conversation
from chunkcache.reuse.hook import ForwardCall, PrefillAware, TrimSpec, install
from chunkcache.reuse.owner import Owner
from chunkcache.reuse.prefill import Prefill
from chunkcache.reuse.prompt import Prompt
from chunkcache.reuse.rows import RowsPrefill
from chunkcache.reuse.scoring import ScoringPrefill
from chunkcache.reuse.stateful import StatefulPrefill
from chunkcache.settings import Settings
from chunkcache.stores.base import ChunkStore, ReadOnly
from chunkcache.tokens.token_text import Decoder, check_decoder

if TYPE_CHECKING:
    from chunkcache.insight.explanation import Explanation

_NOT_REACHED = (
    "generate() has not passed this cache to the model: PEFT's prefix tuning, for one, puts a "
    "cache of its own in its place"
)


def _reuse_anywhere() -> tuple[type[Prefill], Indexer]:
    """What `reuse="anywhere"` puts in the place of prefix reuse, which does without all of it."""
    from chunkcache.anywhere.index import index_entries
    from chunkcache.anywhere.prefill import AnywherePrefill

    return AnywherePrefill, index_entries


class RedisChunkCache(DynamicCache, PrefillAware):
    """A `DynamicCache` that finds the K/V of known text in a store and keeps new ones there.

    ```python
    cache = RedisChunkCache(model, "redis://localhost:6379/0")
    out = model.generate(**inputs, past_key_values=cache)
    print(cache.report)
    ```

    The same object passed to a later `generate()` continues the conversation. A prompt that does
    not continue what the cache holds keeps the common beginning and drops the rest.

    Args:
        model: The model that will be called. A PEFT or compiled wrapper is looked through.
        store: A URL, a list of them (tiers, the nearest first), an open `ChunkStore`, or `None` for
            the one that `CHUNKCACHE_URL` names, else the embedded one.
        tokenizer: The model's, with which `report` shows the prompt's text in Jupyter.
        settings: Keyword arguments as in `Settings`.

    Attributes:
        report: What was reused of the last prompt.

    Raises:
        UnsupportedModelError: The model has no K/V cache that could be filled.
        UnsupportedCallError: The model's generation settings exclude a cache of the user's.
        SettingError: A setting or the URL cannot work.
    """

    _conversation: Conversation
    _prefill: Prefill | None = None  # while a prompt's forward runs; None in decoding steps
    _awaits_prompt: bool  # generate() has begun, and is told that nothing is held
    _repeats: bool  # the next forward repeats the last one
    _records_past = False  # drafts may have to be taken back

    def __init__(
        self,
        model: nn.Module,
        store: ChunkStore | str | list[str] | None = None,
        *,
        tokenizer: Decoder | None = None,
        **settings: Any,
    ) -> None:
        inner = check_model(model)
        if tokenizer is not None:
            check_decoder(tokenizer)
        chosen = Settings.load(**settings)
        super().__init__(config=inner.config)  # type: ignore[arg-type]
        self.layers: list[Any]
        state = ModelState.of(inner)
        if not isinstance(store, ChunkStore):
            store = state.open(store, **chosen.of_store)
        if not chosen.write and not isinstance(store, ReadOnly):
            store = ReadOnly(store)
        anywhere = chosen.reuse == "anywhere"
        self._prefill_type, indexer = _reuse_anywhere() if anywhere else (Prefill, None)
        self._context = CacheContext(inner, state, store, chosen, indexer, tokenizer)
        self.report = Report(tokenizer=tokenizer)
        self._reported_until = 0  # columns: a prompt that comes in parts has one report
        self._owner = Owner()  # the thread and the call of generate() that use this object
        self._forget()
        turns = anywhere or chosen.codec.startswith(INT8)
        if not inner.training and (turns or not state.is_known):
            self._conversation.identify()  # now, rather than within the time to the first token
            if not self._context.foreign_code:
                self._prefill_type.check_model(self._conversation)
        state.caches.add(self)  # before the hook, which is taken off where there is none
        install(inner)

    @property
    def store(self) -> ChunkStore:
        """Where chunks are looked up and kept."""
        return self._context.store

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._context.settings

    # ------------------------------------------------------------------ what Transformers calls

    @property
    def _is_user_defined(self) -> bool:
        """`generate()` sets this as it starts: the only sign that a prompt, not a token, comes."""
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        # Seem empty until the prompt has been seen. Told a length, generate() would cut off that
        # many ids unseen, whether or not they are those whose K/V are held.
        self._owner.begin_call(self)
        if self._owner.failed:
            self._forget()
        self._conversation.note_edits()
        self._awaits_prompt = not self._conversation.is_resized
        self._records_past = False
        self.report = Report(skipped=_NOT_REACHED, tokenizer=self._context.tokenizer)

    @property
    def is_compileable(self) -> bool:
        """Never: masks would be built for the whole prompt before the hook has trimmed it."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns held; 0 between the start of `generate()` and its first forward."""
        return 0 if self._awaits_prompt else super().get_seq_length(layer_idx)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the K/V of new tokens to a layer.

        Raises:
            UnsupportedCallError: `generate()` has begun, and no hook has announced its prompt.
        """
        if self._awaits_prompt:  # and so it was told that nothing is held
            raise UnsupportedCallError(
                "this cache was made for another model object than the one that generates (one "
                "loaded again, perhaps), or within enabled(), which has ended: make a new one with "
                "RedisChunkCache(model, ...) for the model that you call"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reset(self) -> None:
        """Forget the tokens held. The store keeps what it has."""
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; the number is negative, as in `DynamicCache`."""
        with self._change():
            super().crop(tokens_to_remove)
            self._conversation.crop(self._conversation.length)

    def activate_past_recording(self) -> None:
        """Keep what `crop` needs to take tokens back, also in layers that come later."""
        self._records_past = True
        super().activate_past_recording()  # type: ignore[no-untyped-call]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, for beam search."""
        with self._change():
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]
            self._conversation.take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        with self._change():
            super().batch_repeat_interleave(repeats)
            rows = torch.arange(len(self._conversation.transcript.pads))
            self._conversation.take_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows given."""
        with self._change():
            super().batch_select_indices(indices)
            self._conversation.take_rows(indices)

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Around a change of all layers: interrupted half-way, it counts as a failed forward."""
        before, self._owner.failed = self._owner.failed, True
        self._conversation.note_edits()
        yield
        self._conversation.note_states()
        self._owner.failed = before

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled.

        Raises:
            PickleError: Always; it says what to pass to another process instead.
        """
        raise PickleError.of(self)

    def __copy__(self) -> Self:
        """Another object on the same layers."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy what is held; model, store and tokenizer stay shared."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo[id(self._context)] = self._context
        memo[id(self._context.tokenizer)] = self._context.tokenizer
        self._conversation.note_edits()
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin._conversation.note_states()  # copies count writes anew
        self._context.state.caches.add(twin)
        return twin

    # ------------------------------------------------------------------ what the hook calls

    def begin_forward(self, module: nn.Module, call: ForwardCall) -> TrimSpec:
        """Find out what is known of the prompt, fill the layers, and say what is left."""
        self._owner.begin_forward()
        starts, self._awaits_prompt = self._awaits_prompt, False
        again, self._repeats = self._repeats, False
        conversation = self._conversation
        if self._owner.failed:  # half-way: some layers are ahead of others
            if conversation.length and not starts:
                self._owner.end_forward(failed=True)
                raise UnsupportedCallError(
                    "the last forward with this cache failed half-way, so what it holds cannot be "
                    "used: call cache.reset() and pass the whole prompt"
                )
            conversation = self._forget()
        held = past = conversation.length
        is_prompt = starts or not held or call.new > call.drafts + 1
        if is_prompt:
            call = conversation.look(call)
        else:
            conversation.note_edits()
        as_plain = is_whole_prompt = False
        try:
            is_whole_prompt = starts and not conversation.continues(call)
            if is_whole_prompt:
                held, as_plain = conversation.kept_columns(module, call)
                if self.settings.prepared_only and not as_plain:
                    held = 0  # it was repaired for what was asked then
        except UnsupportedCallError:
            self._owner.end_forward()  # what is held stays as it was
            raise
        if is_whole_prompt:
            conversation, past = self._keep(held), 0
        conversation.crop(held)
        total = past + call.new
        if is_prompt:
            if not again and (starts or not past or past != self._reported_until):
                self.report = Report(tokenizer=self._context.tokenizer)
            self._reported_until = total
            if self._records_past:  # drafts, which nobody will ask for again
                call = replace(call, scores=False)
            if call.scores:
                tap(module)
            kind = self._kind_of(call, held)
            self._prefill = kind(
                conversation, module, call, self.report,
                past=past, held=held, as_plain=as_plain, again=again,
            )  # fmt: skip
            trim = self._prefill.begin()
        else:
            self._prefill = None
            trim = conversation.begin_step(call, past)
        if self._records_past:  # a prompt's layers may be new ones
            self.activate_past_recording()
        return trim

    def _kind_of(self, call: ForwardCall, held: int = 0) -> type[Prefill]:
        """The kind of prefill of a call behind so many columns that are held."""
        if state_layers(self.layers):
            is_one_row = call.shape[0] == 1 and not call.pads()[0]
            return StatefulPrefill if held or is_one_row else RowsPrefill
        if call.scores and self._prefill_type is Prefill:
            return ScoringPrefill
        return self._prefill_type

    def end_piece(self, columns: int) -> None:
        """Look at a piece of the forward."""
        if self._prefill is not None:
            self._prefill.end_piece(columns)

    def end_forward(self) -> bool:
        """Check the forward's outputs, and store chunks that it completed.

        True if the forward must be done again without trimming: K/V from the store were missing,
        damaged or not the model's.
        """
        prefill = self._prefill
        try:
            if prefill is None:
                self._conversation.end_step(self.report)
            again = prefill is not None and not prefill.finish()
        except StoreError:  # of storing: what is held is sound
            self._owner.end_forward()
            raise
        self._owner.end_forward()
        if prefill is not None and again:
            why = self._conversation.bypass_reason
            past = [max(prefill.past - pad, 0) for pad in self._conversation.transcript.pads]
            self.report = self.report.again(past)
            in_pieces = self._conversation.in_pieces
            conversation = self._keep(prefill.past)
            conversation.bypass_reason = why  # which this forward was not given
            conversation.in_pieces = in_pieces
            self._repeats = True
        else:
            self._meter.read(self.report, prefill is not None)
            self._prefill = None
            if prefill is not None and self.settings.audit_rate and self.report.moved:
                self._sample_audit()
        return again

    def _sample_audit(self) -> None:
        """Audit this prompt, if chance has it."""
        conversation = self._conversation
        ids = conversation.transcript.ids()
        if conversation.bypass_reason or ids.shape[1] != conversation.length:
            return
        columns = torch.arange(ids.shape[1])
        mask = (columns >= torch.tensor(conversation.transcript.pads)[:, None]).long()
        sample_audit(
            self._context.model, self.settings, conversation.layers, Prompt(ids.clone(), mask)
        )

    def fail_forward(self) -> None:
        """The forward raised: what is held cannot be used, unless another call owns the cache."""
        if not self._owner.computes_here:
            return
        self._owner.end_forward(failed=True)
        if self._prefill is not None:
            # Perhaps it failed because of what the store gave: then that must not be there next
            # time.
            self._prefill.has_arrived()

    def _keep(self, columns: int) -> Conversation:
        """Drop all that is held but the first columns. Returns the conversation that goes on."""
        conversation = self._conversation
        if not columns:
            return conversation if conversation.is_new else self._forget()
        if columns < conversation.length:
            if conversation.states:
                with self._change():
                    conversation.go_back(columns)
            else:
                self.crop(columns - conversation.length)
        return conversation

    def _forget(self) -> Conversation:
        """Become empty, as new."""
        self._owner.failed = True  # until all of it is new
        if self._prefill is not None:  # of a forward that was interrupted
            self._prefill.stop()
            self._prefill = None
        self._conversation = Conversation(self._context)
        self._meter = Meter()
        self.layers = self._conversation.layers
        self._awaits_prompt = self._repeats = self._owner.failed = False
        return self._conversation

    # ------------------------------------------------------------------ what users call

    def explain(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        tokenizer: Decoder | None = None,
        elsewhere: bool = True,
    ) -> Explanation:
        """What the store has of a prompt, and why not more: a dry run.

        Tells what a cache with these settings that holds nothing would do. The model is not run,
        and nothing is written.

        Args:
            input_ids: Token ids, `[batch, tokens]` or `[tokens]`: a tensor, an array or lists.
            attention_mask: Of the same shape, 0 at padding.
            tokenizer: The prompt's; by default the cache's. With it, `seams` tells where the same
                text has other tokens in the store.
            elsewhere: Say also of what is not found whether the store has it for another model,
                namespace, codec or chunk size. That goes through all keys of the store.

        Raises:
            SettingError: These are not a prompt, or that is no tokenizer.
            StoreError: The store failed, and `on_error="raise"` was asked for.
        """
        from chunkcache.insight.explain import explain

        tokenizer = tokenizer or self._context.tokenizer
        if tokenizer is not None:
            check_decoder(tokenizer)
        decode = None if tokenizer is None else tokenizer.decode
        prompt = Prompt.of(input_ids, attention_mask)
        kind = self._kind_of(prompt.as_call(self._context.model))
        return explain(self._reading, kind, prompt, decode, elsewhere)

    def audit(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        continuation: Any = None,
        new_tokens: int = 32,
    ) -> Audit:
        """How far a prompt that goes through this cache is from a full run of the model.

        Runs the prompt and what follows it twice: with a plain `DynamicCache`, and with a cache of
        these settings on this store that holds nothing yet. What this object holds stays as it
        is, and nothing is written.

        Args:
            input_ids: Token ids, `[batch, tokens]` or `[tokens]`: a tensor, an array or lists.
            attention_mask: Of the same shape, 0 at padding, which must be on the left.
            continuation: `[batch, new]` ids behind the prompt, at which outputs are compared too.
                By default those that the full run finds likeliest.
            new_tokens: How many of those.

        Raises:
            SettingError: An argument that cannot work.
            UnsupportedCallError: The model is in training mode, or takes no cache.
            StoreError: The store failed, and `on_error="raise"` was asked for.
        """
        prompt = Prompt.of(input_ids, attention_mask)
        fresh = copy.copy(self)
        fresh._context, fresh._owner, fresh._prefill = self._reading, Owner(), None
        fresh._forget()
        full, cached = run_both(self._context.model, fresh, prompt, continuation, new_tokens)
        # What it would have stored was not dropped for want of room.
        return compare(full, cached, prompt.mask, replace(fresh.report, bytes_dropped=0))

    @property
    def _reading(self) -> CacheContext:
        """The context with a read-only store, for `explain` and `audit`."""
        return replace(self._context, store=ReadOnly(self.store))

    def mark(self, position: int) -> None:
        """Keep a snapshot of recurrent states at the chunk end before a position of the prompt.

        For models that have such states: later prompts with these first tokens go on from there.
        Worth it where many prompts part: behind a system prompt, or a document. Holds until
        `reset()`, or a prompt that does not continue what is held.

        Args:
            position: Tokens from the start of the prompt.

        Raises:
            SettingError: That is no position.
        """
        if isinstance(position, bool) or not isinstance(position, int) or position < 1:
            raise SettingError(f"mark({position!r}): a position is a whole number of at least 1")
        self._conversation.marks.add(position)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until no chunk waits any more: all are written, or given up where that failed.

        False if `timeout` seconds passed before.
        """
        self._conversation.let_copy()
        return self.store.flush(timeout)

    def close(self) -> None:
        """Write what is pending and let go of the memory. The store stays open for other caches."""
        self.flush(self.settings.read_timeout)
        self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
