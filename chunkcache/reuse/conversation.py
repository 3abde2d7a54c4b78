"""Conversation: the tokens whose K/V a cache object holds, in which layers, and whose they are.

It lives as long as tokens are held: a prompt (`Prefill`) takes it over and leaves it longer, and
each token written behind is added here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from chunkcache.errors import StoreError, UnsupportedCallError
from chunkcache.kv.layers import are_edited, note_all_written
from chunkcache.kv.sample import Sample
from chunkcache.kv.states import crop_kv, state_writes
from chunkcache.kv.transfer import to_host
from chunkcache.model.foreign import hooks_registered
from chunkcache.model.identity import ModelIdentity, numerics
from chunkcache.model.scatter import close_layers
from chunkcache.model.self_test import SelfTest, growing_layers, rope_type, switches_at, takes
from chunkcache.model.weights import DYNAMIC
from chunkcache.report import Report
from chunkcache.reuse.context import CacheContext
from chunkcache.reuse.harvest import NOTHING_FOUND, Found, Shorter, harvest
from chunkcache.reuse.hook import NOTHING_TRIMMED, ForwardCall, TrimSpec, first_row, may_change
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.reuse.resume import check_anew, check_not_a_part, plain_columns
from chunkcache.reuse.states import States
from chunkcache.stores.base import Entry
from chunkcache.stores.locks import OPEN, Latch
from chunkcache.tokens.chunking import cut
from chunkcache.tokens.transcript import Transcript

_EDITED = (
    "K/V in the cache were changed by others: the model uses them as they are, and they are not "
    "stored"
)
_NEW_HOOKS = "forward hooks were registered while these tokens were computed"
_NOWHERE = 1 << 62  # behind all columns
_NOT_TEXT = (
    "attention_mask and position_ids are not those of a text with padding on its left alone, whose "
    "positions count each row's tokens from 0"
)
_NOT_NUMBERED = (
    "there is padding on the left and no position_ids, so that Transformers counts padding as "
    "tokens, and K/V depend on how much of it there is: pass position_ids that count each row's "
    "tokens from 0, as generate() does"
)


class Conversation:
    """What one cache object holds: the layers, their tokens, and the model that computed them.

    Attributes:
        context: Model, store and settings.
        layers: The list that the cache object works on.
        transcript: The tokens whose K/V they hold.
        bypass_reason: Why K/V of these tokens can be neither taken from the store nor put there;
            the model then computes as with a plain cache.
        beyond: What else than tokens the K/V depend on (as an image), in words, or `""`.
        edited: Whether others have changed what is held.
        self_test: Whether K/V of the model may be reused, as far as it was looked at.
        keys: Under which keys chunks are found and kept, once the model may have any.
        states: Snapshots of recurrent and convolution states, of a model that has such.
        marks: Positions at which the user wants such.
        known: Hashes of chunks that are in the store or on their way there.
        shorter: Chunks in the store that longer ones of the same text may replace.
        in_pieces: Whether the prompt may be computed in several forwards; the self-test has shown
            that the model can.
        prompt_until: So many columns, from the first on, have the K/V of a prompt. What is behind
            was computed by itself where that makes a difference, behind K/V with other RoPE
            frequencies, or, where bits shall be the same, not in whole pieces.
        surplus: Columns that the layers hold beyond the tokens given: some models cache more.
    """

    def __init__(self, context: CacheContext) -> None:
        self.context = context
        self.transcript = Transcript()
        self.bypass_reason = self.beyond = ""
        self.edited = False
        self.keys: KeySpace | None = None
        self._model_keys: KeySpace | None = None  # the same for prompts by themselves
        self.states: States | None = None
        self.marks: set[int] = set()
        self.known: set[str] = set()
        self.shorter: Shorter = {}
        self.in_pieces = False
        self.prompt_until = self._not_limited
        self.surplus = 0
        # What the model was when it was looked at last.
        self._identity: ModelIdentity | None = None
        self._is_identified = False  # for the present prompt
        self.self_test = SelfTest()
        self._foreign_code = self._numerics = ""
        self._switch = 0  # prompts of more tokens have other RoPE frequencies, if there are such
        self._hooks_registered = 0
        self._may_copy = OPEN  # chunks from a device to the host
        # What is held, as it was left.
        self.layers: list[Any] = self._new_layers()
        self._fed = 0  # columns given so far
        self._certain = 0  # columns given that assisted generation will not take back
        self._is_long = False  # whether RoPE frequencies are those of long prompts
        self._ends_at: tuple[Tensor | None, int] = (None, 0)  # last positions, and columns then
        self._sample: Sample | None = None  # of the K/V, to notice edits by others
        self._states_left: list[tuple[Tensor, int]] = []  # the states, likewise, after a forward
        # Decoding steps only note their checks on the device; `may_store` reads them.
        self._complete: list[int] = []  # chunks of rows that differ, when it looked last
        self._checks: list[Tensor | bool] = []

    @property
    def length(self) -> int:
        """Columns whose K/V are held."""
        for layer in self.layers:
            if isinstance(layer, CacheLayerMixin):
                return int(layer.get_seq_length())
        return self._fed  # recurrent layers do not count

    def is_as_a_prompt(self, columns: int) -> bool:
        """Whether K/V of the first columns are those that a prompt of these tokens has."""
        return columns <= self.prompt_until

    @property
    def _not_limited(self) -> int:
        """The largest `prompt_until` of columns of which nothing is known yet."""
        return 0 if self.context.pieces.reproducible else _NOWHERE

    @property
    def least(self) -> int:
        """Tokens at the end of a prompt that are always computed.

        The last one; with recurrent states two, since some models with such compute a token by
        itself in another way.
        """
        return 2 if self.states else 1

    @property
    def least_piece(self) -> int:
        """Tokens that a piece of a prompt has at least."""
        return 2 if self.self_test.steps_differ else 1

    @property
    def is_new(self) -> bool:
        """Whether no forward has been given it yet."""
        return not (self._fed or self.length or self.transcript.pads or self.bypass_reason)

    # ------------------------------------------------------------------ whose tokens these are

    def identify(self) -> bool:
        """Look at the model, once for each prompt (see `look`).

        True if it is no longer the one that computed what is held.
        """
        if self._is_identified:
            return False
        state, self._is_identified = self.context.state, True
        self._hooks_registered = hooks_registered()
        identity, foreign_code = state.identity(), self.context.foreign_code
        if (identity, foreign_code) == (self._identity, self._foreign_code):
            return False
        changed = self._identity not in (None, identity)
        self._identity, self._foreign_code = identity, foreign_code
        self._numerics = numerics(self.context.model)
        self._switch = switches_at(self.context.model)
        if foreign_code:  # which may go again: no verdict on the model
            self.self_test = SelfTest(foreign_code)
            return changed
        self.self_test = state.self_test(identity, self.context.store)
        if not self.self_test.bypass_reason:
            assert self.self_test.layout is not None
            self._model_keys = self.context.keyspace(identity, self.self_test.layout)
            self.keys = self._model_keys
            if self.self_test.layout.states and self.states is None:
                self.states = States(
                    self.context, self.self_test.layout, self.self_test.cuts_windows
                )
        return changed

    def choose_keys(self) -> None:
        """Have chunks found by those prompts alone whose tokens are computed alike.

        Long prompts may have other RoPE frequencies. Where bits shall be the same, a batch is by
        itself: what other rows hold, and where each begins, decides in which products a row is
        computed.
        """
        assert self._model_keys is not None
        mark = b"long " if self._is_long else b""
        rows, pads = self.transcript.ids(), self.transcript.pads
        if self.context.pieces.reproducible and (len(pads) > 1 or pads[0]):
            mark += repr(pads).encode() + rows.numpy().tobytes()
        self.keys = self._model_keys.apart(mark)

    @property
    def distrust(self) -> str:
        """Why the store is not believed in what it has of this model, or `""`."""
        return self.context.state.distrust.get(self._digest, "")

    @distrust.setter
    def distrust(self, reason: str) -> None:
        distrust = self.context.state.distrust
        if reason:
            distrust[self._digest] = reason
        else:
            distrust.pop(self._digest, None)

    @property
    def _digest(self) -> str:
        return self._identity.digest if self._identity else ""

    def look(self, call: ForwardCall) -> ForwardCall:
        """Look at a prompt that comes, and thoroughly at what is held.

        Returns the call with what will be looked at on the host. One wait for a GPU.
        """
        self._is_identified = False
        away = call.away
        return call.on_host(dict(zip(away, self._bring(away.values()), strict=True)))

    def _bring(self, more: Iterable[Tensor] = ()) -> list[Tensor]:
        """Look thoroughly at what is held. Returns these tensors on the host.

        All that is looked at comes there in one copy. Looking at values takes a millisecond.
        """
        sample = self._sample.differences(self.layers) if self._sample is not None else []
        pieces, flags = self.transcript.pieces, [*self._checks, *sample]
        tensors = [flag for flag in flags if isinstance(flag, Tensor)]
        brought = iter(to_host([*pieces, *tensors, *more]))
        self.transcript.pieces = [next(brought) for _ in pieces]
        known = [bool(next(brought) if isinstance(flag, Tensor) else flag) for flag in flags]
        checks = len(self._checks)
        self._checks = [all(known[:checks])]
        self.note_edits(any(known[checks:]))
        return list(brought)

    def note_edits(self, values_differ: bool = False) -> None:
        """Take down whether others have changed K/V that are held, since the last forward."""
        if values_differ or are_edited(self.layers) or self._are_states_edited():
            self.edited = True
            self.bypass_reason = _EDITED
            self._sample = None

    def note_states(self) -> None:
        """What the states are now was made of them by the model, or by a change of all layers."""
        if self.states:
            self._states_left = state_writes(self.layers)

    def _are_states_edited(self) -> bool:
        if not self.states:
            return False
        now, left = state_writes(self.layers), self._states_left
        return len(now) != len(left) or any(
            one is not other or count != before
            for (one, count), (other, before) in zip(now, left, strict=True)
        )

    @property
    def is_resized(self) -> bool:
        """Whether others have changed how many tokens the layers hold.

        Nobody can tell then which ones, so that the object does as a `DynamicCache` does.
        """
        return self.edited and self.length != self.transcript.columns

    # ------------------------------------------------------------------ generate() brings a prompt

    def continues(self, call: ForwardCall) -> bool:
        """Whether the ids given to `generate()` are only those behind what is held.

        Then the mask covers more than the ids, or, an all-ones mask being dropped, the positions
        do not start at 0.

        Raises:
            UnsupportedCallError: It cannot be told.
        """
        held = self.length
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
        if first in (held, self._follows_at(held)):  # as a plain cache has it, or an image
            return True
        if first != 0 and call.ids is not None and not self._begins_like(call):
            why = "this model takes no position_ids"
            if first is not None:
                why = f"position_ids begin with {first}, and this cache holds {held} tokens"
            raise UnsupportedCallError(
                f"{why}, so it cannot be told whether input_ids are a new prompt or continue what "
                "the cache holds: call cache.reset() before a new prompt, pass the whole text to "
                "continue"
            )
        return False

    def kept_columns(self, module: nn.Module, call: ForwardCall) -> tuple[int, bool]:
        """How many of the columns held a whole prompt begins with, so that they can be kept.

        Also whether they are kept as a `DynamicCache` would, though ids alone do not name them
        (images, embeddings).

        Raises:
            UnsupportedCallError: It cannot be told, or the positions are for something else.
        """
        held = self.length
        if not held:
            return 0, False
        if not self.edited and (columns := self._plain_columns(module, call, held)):
            return columns, True
        return self._common_columns(call), False

    def _plain_columns(self, module: nn.Module, call: ForwardCall, held: int) -> int:
        """Columns to keep as a `DynamicCache` would; see `resume.py`."""
        if self.transcript.columns != held and not self.surplus:
            raise UnsupportedCallError(
                "this cache holds K/V of tokens that no forward of the model has brought, so it "
                "cannot be told whether a whole prompt continues them: call cache.reset() before a "
                "new prompt; to continue, pass input_ids of the new tokens alone and an "
                "attention_mask over all"
            )
        columns = 0
        if self.beyond or call.beyond:
            columns = plain_columns(module, call, self.transcript, held, self._follows_at(held))
        if not columns:
            check_anew(module, call)
        return columns

    def _common_columns(self, call: ForwardCall) -> int:
        """Columns with the same tokens, the last ones that must be computed left out."""
        if call.bypass_reason or call.full_reason:
            return 0
        if not self.edited and (
            self.bypass_reason or self.identify() or self.self_test.bypass_reason
        ):
            return 0
        assert call.ids is not None
        pads = call.pads()
        common = self.transcript.common_columns(call.ids, pads)
        if self.edited:
            check_not_a_part(common, call, self.length)
        common = min(common, call.new - max(call.keep, 1 if self.edited else self.least))
        if not self.edited:
            if not self._followed:
                return 0
            ends = call.text_columns(0, pads), self.transcript.text_until
            common = min(common, *(end for end in ends if end is not None))
        common = self.context.pieces.usable(min(common, self.prompt_until))
        if self._is_long != self._is_long_at(call.new, pads):
            return 0
        if self.states and common < self.length:
            common = self.states.nearest(common)
        return max(0, common)

    def _begins_like(self, call: ForwardCall) -> bool:
        assert call.ids is not None
        return self.transcript.common_columns(call.ids, self.transcript.pads) > 0

    def _follows_at(self, held: int) -> int:
        """Position of the token behind the `held` columns, in the first row."""
        positions, columns = self._ends_at
        if positions is None:
            return held - (self.transcript.pads or [0])[0]
        return int(first_row(positions)[-1]) + 1 + held - columns

    def begin_prompt(self, module: nn.Module, call: ForwardCall, past: int, held: int) -> None:
        """Look at a prompt, and set `bypass_reason` where it must be computed in full.

        Args:
            module: The model that was called.
            call: The prompt.
            past: Columns that stand before the ids given.
            held: Columns that are held; more than `past` where a whole prompt was given.
        """
        self.let_copy()
        self._may_copy = Latch()
        self.beyond = self.beyond or call.beyond
        self.bypass_reason = (
            self.bypass_reason or call.bypass_reason or self._why_bypass(module, call, past, held)
        )
        if not self.context.state.ranks.all(not self.bypass_reason):
            self.in_pieces = False
            self.bypass_reason = (
                self.bypass_reason or "another process of this model falls back to normal prefill"
            )

    def _why_bypass(self, module: nn.Module, call: ForwardCall, past: int, held: int) -> str:
        total = past + call.new
        if module is not self.context.model:
            if not held:
                config: Any = module.config
                self._empty(DynamicCache(config=config).layers)
            return "this cache was made for another model"
        self.in_pieces = False
        if self.identify() and held:
            return "the model changed after a part of this sequence was computed"
        if not held:
            self.empty()
        if self.self_test.bypass_reason:
            return self.self_test.bypass_reason
        if not held:
            self.transcript.start(call.pads())
        if self.transcript.columns != held:
            return "the cache holds K/V of tokens that it has not seen"
        if past and call.mask is not None and len(self.transcript.pads) == len(call.mask):
            self.transcript.more_padding(call.pads())
        for name, types in call.types.items():
            if not bool(self._is_untyped(name, types)):
                self.beyond = may_change(name)
                return self.beyond
        columns = call.text_columns(past, self.transcript.pads)
        if not self._followed or columns <= min(self.transcript.pads):
            unnumbered = call.positions is None and any(self.transcript.pads)
            return _NOT_NUMBERED if unnumbered and takes(module, "position_ids") else _NOT_TEXT
        if columns < total:
            if self.states:  # what is masked is kept from them in a forward of all tokens alone
                return _NOT_TEXT
            known = self.transcript.text_until
            self.transcript.text_until = columns if known is None else min(known, columns)
        self.in_pieces = True
        return self._why_too_long(held, total)

    def _why_too_long(self, held: int, total: int) -> str:
        """Look whether RoPE frequencies are those of long prompts; why that cannot be handled."""
        is_long = self._is_long_at(total)
        reproducible = self.context.pieces.reproducible
        other = f"prompts of more than {self._switch:,} tokens have other RoPE frequencies"
        if held and is_long != self._is_long:  # what comes now is behind K/V of the others
            self.prompt_until = min(self.prompt_until, held)
            return other if reproducible else ""
        self._is_long = is_long
        if is_long:  # pieces that end before the switch would have others
            self.in_pieces = False
        if is_long and rope_type(self.context.model) == DYNAMIC:
            return f"{other} at each length (RoPE type 'dynamic')"
        return other if is_long and (reproducible or self.states) else ""

    def _is_long_at(self, columns: int, pads: list[int] | None = None) -> bool:
        """Whether so many columns are a long prompt, with this padding or that of what is held."""
        if not 0 < self._switch < columns:  # the padding of beams may be on a device
            return False
        pads = self.transcript.pads if pads is None else pads
        return self._switch < columns - min(pads, default=0)

    def empty(self) -> None:
        """Hold nothing, in layers that fit the model."""
        self._empty(self._new_layers())

    def _empty(self, layers: list[Any]) -> None:
        self.layers[:] = layers
        self._sample = None
        self._states_left = []

    def _new_layers(self) -> list[Any]:
        """Ours where the model has passed its self-test, else those of a plain `DynamicCache`."""
        ours = None if self.self_test.bypass_reason else growing_layers(self.context.model)
        config: Any = self.context.model.config
        return ours or DynamicCache(config=config).layers

    def record(self, call: ForwardCall, past: int, held: int) -> None:
        """Take down the tokens of a forward that bypasses the store."""
        if not held:
            self.transcript.start(call.pads())
        if len(self.transcript.pads) != call.shape[0]:
            return
        if call.ids is None:
            self.transcript.append_unnamed(call.new)
        else:
            self.transcript.append(call.ids[:, held - past :])
        if call.positions is not None:
            self._ends_at = call.positions[..., -1:], past + call.new

    # ------------------------------------------------------------------ one token after another

    def begin_step(self, call: ForwardCall, past: int) -> TrimSpec:
        """A decoding step begins: take down its tokens. Never waits for a GPU."""
        self.let_copy()
        self._fed, self._certain = past + call.new, past + call.new - call.drafts
        if self.self_test.steps_differ or self._is_long != self._is_long_at(self._fed):
            self.prompt_until = min(self.prompt_until, past)
        self.bypass_reason = self.bypass_reason or call.bypass_reason
        self.beyond = self.beyond or call.beyond
        if self.bypass_reason:
            self.record(call, past, past)
            return NOTHING_TRIMMED
        assert call.ids is not None
        self.transcript.append(call.ids)
        if self.transcript.text_until is None:
            padding = self.transcript.padding(call.place)
            self._checks.append(call.follows(past, padding))
        self._checks += [self._is_untyped(*item) for item in call.types.items()]
        return TrimSpec(number_from=self.number_from(call, past))

    def number_from(self, call: ForwardCall, past: int) -> int | None:
        """The position of the first id given, for models that may not number them right."""
        is_numbered = call.positions is not None or not self.states
        return None if is_numbered or any(self.transcript.pads) else past

    def end_step(self, report: Report) -> None:
        """A decoding step has come back: store the chunks that it has completed, if any."""
        self.context.gauge.look()
        self.note_states()
        self.note_edits()
        self.bypass_reason = self.bypass_reason or self.distrust
        self.end_forward(self._fed)
        if not self.bypass_reason and self.may_store(self._fed, self._certain):
            self.store(self._certain, report, more=self._step_states)
        self.tell(report)

    def _step_states(self, may_copy: Latch) -> list[Entry]:
        """A snapshot at the end of the chunk that a decoding step has completed, if one is due."""
        certain = min(self._certain, self.prompt_until)
        if not self.states or self.transcript.pads != [0] or certain < self._fed:
            return []
        assert self.keys is not None
        row = self.transcript.ids()[0].numpy()
        chunks = cut(row, self.context.grid, self.keys.salt)
        self.states.take_step(self.layers, self._fed, chunks)
        exact = self.transcript.exact_lengths(certain)[0]
        return self.states.entries(self.keys, chunks, row, self.known, exact, may_copy)

    def tell(self, report: Report) -> None:
        """Report a reason to store nothing more that was found after the prompt was computed."""
        if self.bypass_reason and self.bypass_reason != report.skipped:
            report.not_stored = self.bypass_reason

    def let_copy(self) -> None:
        """The first token is there: what was computed before it may be copied from the device."""
        self._may_copy.open()

    # ------------------------------------------------------------------ a forward has come back

    def end_forward(self, total: int) -> None:
        """Any forward has come back: the layers should hold `total` columns now."""
        self._fed = total
        self.surplus = self.length - total
        close_layers(self.layers)

    def end_prompt(self) -> None:
        """Remember what the K/V are, to see later whether others have changed them."""
        self._sample = None if self.bypass_reason else Sample(self.layers)

    def note_written(self) -> None:
        """What is in the layers now is ours, and no edit by others."""
        if not self.edited:
            note_all_written(self.layers)
            self.note_states()

    def store(
        self,
        certain: int,
        report: Report,
        tail: bool = False,
        found: Found = NOTHING_FOUND,
        more: Callable[[Latch], list[Entry]] | None = None,
    ) -> None:
        """Hand over chunks that are complete, certain and not in the store, if there are any.

        Args:
            certain: Columns that nobody will take back.
            report: Takes what was done.
            tail: Store a last, shorter chunk too.
            found: What the prompt has found that bears on it.
            more: Gives entries that stand behind these; told when copying delays no answer.

        Raises:
            StoreError: The store failed, and `on_error="raise"` was asked for.
        """
        assert self.keys is not None
        certain, tail = self._storable(certain, tail)
        with self.context.store_calls(report):
            entries = harvest(
                self.context, self.keys, self.layers, self.transcript, self.known, self.shorter,
                certain, tail, found, self._may_copy,
            )  # fmt: skip
            entries += more(self._may_copy) if more else []
            size, taken = sum(entry.nbytes for entry in entries), 0
            try:
                taken = self.context.store.write(entries) if entries else 0
            except StoreError as error:
                self.context.handle_store_error(error, report)
            report.bytes_written += taken
            report.bytes_dropped += size - taken

    def may_store(self, total: int, certain: int, prompt: bool = False, tail: bool = False) -> bool:
        """Whether a chunk is complete that may be stored; sets `bypass_reason` if none may.

        `prompt`: these are columns of a prompt. `tail`: its last, shorter chunk counts.
        """
        if self.length != total:
            self.bypass_reason = "the model cached more or fewer tokens than it was given"
            return False
        certain, tail = self._storable(certain, tail)
        lengths = self.transcript.distinct_lengths(certain)
        complete = [self.context.grid.complete(length) for length in lengths]
        if complete == self._complete and not tail:
            return False  # no chunk ends here: nearly every step of decoding
        self._complete = complete
        if not prompt:
            self._bring()
            if self.edited:
                return False
            self._sample = Sample(self.layers)
        if not self._followed:
            self.bypass_reason = _NOT_TEXT
        elif hooks_registered() != self._hooks_registered and not self.context.vouches_for_hooks:
            self.bypass_reason = _NEW_HOOKS
        elif numerics(self.context.model) != self._numerics:
            self.bypass_reason = (
                "autocast, attention or matrix precision changed within this sequence"
            )
        else:
            self._checks.clear()
            return self.context.settings.write
        return False

    def _storable(self, certain: int, tail: bool) -> tuple[int, bool]:
        """Columns whose K/V others may have, and whether their last, shorter chunk is one."""
        # No prompt can go on from a tail without a state, nor is a tail a whole piece.
        tail = tail and not self.states and not self.context.pieces.reproducible
        return min(certain, self.prompt_until), tail

    @property
    def _followed(self) -> bool:
        """Whether mask, positions and types of all steps were those of text, as `_bring` saw."""
        return all(map(bool, self._checks))

    def _is_untyped(self, name: str, types: Tensor) -> Tensor | bool:
        """Whether token type ids are zero, and zeros mean nothing to the model."""
        assert self._identity is not None
        return not self.context.state.zeros_matter(self._identity, name) and (types == 0).all()

    # ------------------------------------------------------------------ changes by Transformers

    def go_back(self, columns: int) -> None:
        """Hold the first columns alone again, at which a snapshot of the states is held."""
        assert self.states is not None
        crop_kv(self.layers, columns)
        self.states.put(self.layers, columns)
        self.crop(columns)

    def crop(self, columns: int) -> None:
        """The layers hold the first `columns` alone."""
        self.transcript.crop(columns)
        if columns <= self.prompt_until:
            pieces = self.context.pieces
            self.prompt_until = pieces.floor(columns) if pieces.reproducible else _NOWHERE
        if self.states:
            self.states.forget(columns)
        if self._sample is not None:
            self._sample.crop(columns)

    def take_rows(self, rows: Tensor) -> None:
        """The layers hold these rows of what they held."""
        self.transcript.take_rows(rows)
        self.prompt_until = min(self.prompt_until, self._not_limited)  # bits are of the batch
        if self.states:
            self.states.forget()
        self._sample = None
