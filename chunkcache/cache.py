"""RedisChunkCache: the cache that users hand to `generate()`, and how Transformers sees it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from chunkcache.errors import PickleError, StoreError, UnsupportedCallError
from chunkcache.insight.audit import Audit, compare
from chunkcache.insight.explain import explain
from chunkcache.insight.explanation import Explanation
from chunkcache.insight.runs import run_both
from chunkcache.keys import INT8
from chunkcache.metrics import Meter
from chunkcache.model.check import check_model
from chunkcache.model.state import ModelState
from chunkcache.report import Report
from chunkcache.reuse.owner import Owner
from chunkcache.reuse.prefill import ForwardCall, PrefillAware, Rest, install
from chunkcache.reuse.prompt import Prompt
from chunkcache.reuse.sequence import Sequence
from chunkcache.reuse.step import Setup, Step
from chunkcache.settings import Settings
from chunkcache.stores.base import ChunkStore, ReadOnly
from chunkcache.tokens.chunking import Grid
from chunkcache.tokens.token_text import Decoder, check_decoder

_NOT_REACHED = (
    "no forward has been given this cache since generate() began: PEFT's prefix tuning, for one, "
    "puts a cache of its own in its place"
)


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

    _sequence: Sequence
    _step: Step
    _parked: bool  # generate() has begun and its prompt is awaited
    _again: bool  # the last forward is to be done again
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
        if not chosen.write:
            store = ReadOnly(store)
        grid = Grid(chosen.chunk_size, chosen.chunk_overlap)
        self._setup = Setup(inner, state, store, chosen, grid, tokenizer)
        self.report = Report(tokenizer=tokenizer)
        self._reported = 0
        self._step = Step(past=0, held=0, total=0, certain=0, is_prompt=False)
        self._owner = Owner()
        self._forget()
        anywhere = chosen.reuse == "anywhere"
        turns = anywhere or chosen.codec.startswith(INT8)
        if not inner.training and (turns or not state.is_known):
            self._sequence.identify()  # now, rather than within the time to the first token
            if anywhere and not self._setup.foreign_code:
                self._sequence.mover()  # or refuse the model at once
        state.caches.add(self)  # before the hook, which is taken off where there is none
        install(inner)

    @property
    def store(self) -> ChunkStore:
        """Where chunks are looked up and kept."""
        return self._setup.store

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._setup.settings

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
        self._sequence.check_edited()
        self._parked = not self._sequence.is_resized
        self._records_past = False
        self.report = Report(skipped=_NOT_REACHED, tokenizer=self._setup.tokenizer)

    @property
    def is_compileable(self) -> bool:
        """Never: masks would be built for the whole prompt before the hook has trimmed it."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns held; 0 between the start of `generate()` and its first forward."""
        return 0 if self._parked else super().get_seq_length(layer_idx)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the K/V of new tokens to a layer.

        Raises:
            UnsupportedCallError: `generate()` has begun, and no hook has announced its prompt.
        """
        if self._parked:  # and so it was told that nothing is held
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
            self._sequence.crop(self._sequence.length)

    def activate_past_recording(self) -> None:
        """Keep what `crop` needs to take tokens back, also in layers that come later."""
        self._records_past = True
        super().activate_past_recording()  # type: ignore[no-untyped-call]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, for beam search."""
        with self._change():
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]
            self._sequence.take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        with self._change():
            super().batch_repeat_interleave(repeats)
            rows = torch.arange(len(self._sequence.transcript.pads))
            self._sequence.take_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows given."""
        with self._change():
            super().batch_select_indices(indices)
            self._sequence.take_rows(indices)

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Around a change of all layers: half of it is as a forward that failed half-way."""
        before, self._owner.failed = self._owner.failed, True
        yield
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
        memo[id(self._setup)] = self._setup
        memo[id(self._setup.tokenizer)] = self._setup.tokenizer
        self._sequence.check_edited()
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        self._setup.state.caches.add(twin)
        return twin

    # ------------------------------------------------------------------ what the hook calls

    def begin_forward(self, module: nn.Module, call: ForwardCall) -> Rest:
        """Find out what is known of the prompt, fill the layers, and say what is left."""
        self._owner.begin_forward()
        starts, self._parked = self._parked, False
        again, self._again = self._again, False
        if self._owner.failed:  # half-way: some layers are ahead of others
            if self._sequence.length and not starts:
                self._owner.end_forward(failed=True)
                raise UnsupportedCallError(
                    "the last forward with this cache failed half-way, so what it holds is of no "
                    "use: call cache.reset() and pass the whole prompt"
                )
            self._forget()
        self._sequence.check_edited(thoroughly=starts or call.new > call.drafts + 1)
        held = past = self._sequence.length
        as_plain = False
        try:
            whole = starts and not self._continues(call, held)
            if whole:
                held, as_plain = self._continued(module, call, held)
        except UnsupportedCallError:
            self._owner.end_forward()  # what is held stays as it was
            raise
        if whole:
            held, past = self._keep(held), 0
        self._sequence.crop(held)
        total = past + call.new
        computed = total - held
        self._step = Step(
            past=past,
            held=held,
            total=total,
            certain=total - call.drafts,
            is_prompt=starts or not held or computed > call.drafts + 1,
            as_plain=as_plain,
            may_run_ahead=not past and not again and self._setup.runs_ahead,
        )
        if self._step.is_prompt:
            if not again and (starts or not past or past != self._reported):
                self.report = Report(tokenizer=self._setup.tokenizer)
            self._reported = total
        rest = self._sequence.begin(module, call, self._step, self.report)
        if self._records_past:  # a prompt's layers may be new ones
            self.activate_past_recording()
        return rest

    def end_forward(self, module: nn.Module) -> bool:
        """Keep the chunks that this forward has completed. True if it must be done again."""
        try:
            again = self._sequence.end(self._step, self.report)
        except StoreError:  # of storing: what is held is sound
            self._owner.end_forward()
            raise
        self._owner.end_forward()
        if again:
            why = self._sequence.opaque
            past = [max(self._step.past - pad, 0) for pad in self._sequence.transcript.pads]
            self.report = self.report.again(past)
            self._keep(self._step.past)  # which this forward was not given
            self._sequence.opaque, self._again = why, True
        else:
            self._meter.read(self.report, self._step.is_prompt)
        return again

    def fail_forward(self) -> None:
        """What is held is of no use now, unless it was refused because another call uses it."""
        if not self._owner.computes_here:
            return
        self._owner.end_forward(failed=True)
        # Perhaps it failed because of what the store gave: then that must not be there next time.
        self._sequence.has_arrived(self._step, self.report)

    def _continues(self, call: ForwardCall, held: int) -> bool:
        """Whether the ids given to `generate()` are only those behind what is held.

        Then the mask covers more than the ids, or, an all-ones mask being dropped, the positions
        do not start at 0.
        """
        if call.mask is not None and call.ids is not None:
            columns = call.mask.shape[-1]
            if columns not in (call.new, held + call.new):
                raise UnsupportedCallError(
                    f"attention_mask covers {columns} tokens, but the cache holds {held} and "
                    f"input_ids bring {call.new}: pass the whole prompt, or a mask over both"
                )
            return columns != call.new
        if not held:
            return False
        first = call.first_position()
        if first in (held, self._sequence.follows_at(held)):  # as a plain cache has it, or an image
            return True
        if first != 0 and call.ids is not None and not self._sequence.begins_like(call):
            why = "this model takes no position_ids"
            if first is not None:
                why = f"position_ids begin with {first}, and this cache holds {held} tokens"
            raise UnsupportedCallError(
                f"{why}, so it cannot be told whether input_ids are a new prompt or continue what "
                "the cache holds: call cache.reset() before a new prompt, pass the whole text to "
                "continue"
            )
        return False

    def _continued(self, module: nn.Module, call: ForwardCall, held: int) -> tuple[int, bool]:
        """Columns to keep of those held for a whole prompt, and whether its ids do not name them.

        Raises:
            UnsupportedCallError: It cannot be told.
        """
        if held and not self._sequence.edited:
            plain = self._sequence.plain_columns(module, call)
            if plain:
                return plain, True
        return (self._sequence.common_columns(call) if held else 0), False

    def _keep(self, columns: int) -> int:
        """Drop all that is held but the first columns."""
        if not columns:
            self._forget()
        elif columns < self._sequence.length:
            self.crop(columns - self._sequence.length)
        return columns

    def _forget(self) -> None:
        """Become empty, as new."""
        self._owner.failed = True  # until all of it is new
        if self._step.arrival:  # of a forward that was interrupted
            self._step.arrival.stop()
            self._step.arrival = None
        self._step.witness = None
        self._sequence = Sequence(self._setup)
        self._meter = Meter()
        self.layers = self._sequence.layers
        self._parked = self._again = self._owner.failed = False

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
        tokenizer = tokenizer or self._setup.tokenizer
        if tokenizer is not None:
            check_decoder(tokenizer)
        decode = None if tokenizer is None else tokenizer.decode
        return explain(self._reading, Prompt.of(input_ids, attention_mask), decode, elsewhere)

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
        fresh._setup, fresh._owner = self._reading, Owner()
        fresh._forget()
        full, cached = run_both(self._setup.model, fresh, prompt, continuation, new_tokens)
        # What it would have stored was not dropped for want of room.
        return compare(full, cached, prompt.mask, replace(fresh.report, bytes_dropped=0))

    @property
    def _reading(self) -> Setup:
        """The setup, with a store that takes nothing."""
        return replace(self._setup, store=ReadOnly(self.store))

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until no chunk waits any more: all are written, or given up where that failed.

        False if `timeout` seconds passed before.
        """
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
