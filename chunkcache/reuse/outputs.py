"""Outputs: last hidden states of known tokens, for calls that want logits of more than one.

A loss, a perplexity and the log-likelihood of an answer need the logits of tokens whose K/V are
known. What these are made of, the input of the model's output embeddings, is kept beside a chunk's
K/V, as its `@outputs`, by the calls that want it. A later call is trimmed as far as both are known,
and the model's head is given the rest (`model/head.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor

from chunkcache.kv.layout import KVLayout
from chunkcache.model.head import HeadInput
from chunkcache.reuse.blobs import BlobReader, PendingTensors
from chunkcache.reuse.context import CacheContext
from chunkcache.reuse.harvest import extra_entry
from chunkcache.reuse.hook import NO_LABEL, ForwardCall
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.stores.base import OUTPUTS, Entry
from chunkcache.stores.locks import Latch
from chunkcache.tokens.chunking import Chunk
from chunkcache.tokens.plan import RowPlan
from chunkcache.tokens.transcript import Transcript

_GRADIENTS = "gradients are enabled, which stored outputs have none of: use torch.no_grad()"
_REPRODUCIBLE = "reproducible=True computes outputs of all tokens in one forward"
_PADDING = (
    "labels count outputs of padding: set those of each row's padding, and of its first token, to "
    f"{NO_LABEL}"
)


def outputs_of(
    context: CacheContext,
    keys: KeySpace,
    call: ForwardCall,
    transcript: Transcript,
    total: int,
    handle_error: Callable[[Exception], None],
) -> Outputs | str:
    """The outputs of one call, or why they cannot be had from the store.

    Args:
        context: Model, store and settings.
        keys: Those of the chunks.
        call: The call, which wants logits of several tokens and nothing else of them.
        transcript: The tokens held, with those of the call.
        total: Columns once it is done.
        handle_error: Told of a failing store and of damaged blobs; may raise.
    """
    if context.pieces.reproducible:
        return _REPRODUCIBLE
    if keys.lossy:
        return f"the codec {keys.lossy} rounds, and outputs are not rounded"
    if torch.is_grad_enabled() and any(p.requires_grad for p in context.model.parameters()):
        return _GRADIENTS
    past = total - call.new
    if call.labels is not None and any(
        pad > past and bool((labels[: pad - past + 1] != NO_LABEL).any())
        for labels, pad in zip(call.labels, transcript.pads, strict=False)
    ):
        return _PADDING
    test = context.state.head_test(keys.identity, keys.layout, context.store)
    if test.bypass_reason or test.layout is None:
        return test.bypass_reason
    return Outputs(context, keys, test.layout, call, transcript, total, handle_error)


class Outputs:
    """The outputs of one call: those known, and those to be stored.

    Arguments are those of `outputs_of`, and the layout of the model's outputs.

    Attributes:
        value: The last part of their keys.
        limit: Column from which on all is computed.
        sizes: Bytes of the outputs that the store has, by the hash of their chunk.
    """

    def __init__(
        self,
        context: CacheContext,
        keys: KeySpace,
        layout: KVLayout,
        call: ForwardCall,
        transcript: Transcript,
        total: int,
        handle_error: Callable[[Exception], None],
    ) -> None:
        self.value = OUTPUTS
        self.sizes: dict[str, int] = {}
        self.limit = total - 1  # one token is computed in any case
        self._context, self._keys, self._layout, self._call = context, keys, layout, call
        self._transcript, self._total = transcript, total
        # Column from which on outputs are wanted.
        self._wanted = total - (call.new if call.full_reason else min(call.keep, call.new))
        self._reader = BlobReader(context.store, handle_error)
        self._before: Tensor | None = None  # `[batch, columns, hidden]` from there on
        self._input: HeadInput | None = None

    def settle(self, plans: Sequence[RowPlan]) -> str:
        """See how far outputs are known, as the store has it; why nothing is used, if they stop it.

        Rows are read together, so the one that is known least far decides.
        """
        reach = [self._reach(*row) for row in zip(self._transcript.pads, plans, strict=True)]
        self.limit = max(self._wanted, min(self.limit, *reach))
        known = (pad + plan.reach for pad, plan in zip(self._transcript.pads, plans, strict=True))
        held = max(plan.held + pad for pad, plan in zip(self._transcript.pads, plans, strict=True))
        if self._call.full_reason and self.limit <= held < min(known):
            return f"{self._call.full_reason}; the store has their K/V, and no outputs"
        return ""

    def _reach(self, pad: int, plan: RowPlan) -> int:
        for chunk in plan.chunks:
            if pad + chunk.stop > self._wanted and chunk.hash not in self.sizes:
                return pad + chunk.start
        return self._total

    def read(self, plans: Sequence[RowPlan], stop: int) -> int:
        """Bring the outputs of columns before `stop`, or lower the limit. Returns bytes read."""
        users: defaultdict[str, list[tuple[int, Chunk]]] = defaultdict(list)
        for row, (pad, plan) in enumerate(zip(self._transcript.pads, plans, strict=True)):
            for chunk in plan.reads(stop - pad):
                if max(pad + chunk.start, self._wanted) < min(pad + chunk.stop, stop):
                    users[chunk.hash].append((row, chunk))
        if not users:
            return 0
        reads = [self._pending(*places[0]) for places in users.values()]
        width = self._layout.token_bytes // self._layout.dtype.itemsize
        shape = len(self._transcript.pads), stop - self._wanted, width
        # Of padding nothing is known, and no number may look as if it were.
        self._before = torch.full(
            shape, torch.nan, dtype=self._layout.dtype, device=self._call.place
        )
        self._reader.read_tensors(reads)
        for read in reads:
            for row, chunk in users[read.chunk_hash]:
                if not read.failure:
                    self._place(row, chunk, read.tensors[0], stop)
                    continue
                self.sizes.pop(read.chunk_hash, None)  # so that they are written anew
                first = self._transcript.pads[row] + chunk.start
                self.limit = max(self._wanted, min(self.limit, first))
        return self._reader.bytes_read

    def _pending(self, row: int, chunk: Chunk) -> PendingTensors:
        form = self._keys.output_form(
            self._layout, self._tokens(row, chunk), chunk.start, chunk.hash
        )
        return PendingTensors(chunk.hash, form, self.sizes[chunk.hash], device=self._call.place)

    def _tokens(self, row: int, chunk: Chunk) -> list[int]:
        pad = self._transcript.pads[row]
        ids: list[int] = self._transcript.ids()[row, pad + chunk.start : pad + chunk.stop].tolist()
        return ids

    def _place(self, row: int, chunk: Chunk, hidden: Tensor, stop: int) -> None:
        assert self._before is not None
        first = self._transcript.pads[row] + chunk.start
        begin, end = max(first, self._wanted), min(first + len(hidden), stop)
        if begin < end:
            place = self._before[row, begin - self._wanted : end - self._wanted]
            place.copy_(hidden[begin - first : end - first])

    def behind(self, begin: int) -> HeadInput:
        """What gives the head the outputs before this column, the first that is computed."""
        known = begin - self._wanted
        before = self._before[:, :known] if self._before is not None and known > 0 else None
        self._input = HeadInput(
            self._context.model,
            (len(self._transcript.pads), self._total - begin),
            self._layout,
            before,
            self._call.new,
            self._call.logits_to_keep,
        )
        return self._input

    def are_taken(self) -> bool:
        """Whether the model has taken them as it should. If not, it is asked no more."""
        assert self._input is not None
        if self._input.trouble:
            self._context.state.distrust_head(self._keys.identity, self._input.trouble)
        return not self._input.trouble

    def entries(
        self,
        plans: Sequence[RowPlan],
        stored: Container[str],
        certain: int,
        may_copy: Latch,
    ) -> list[Entry]:
        """Those to be stored: of chunks that the store has, and that were computed as a whole.

        Args:
            plans: The chunks of each row.
            stored: Hashes of chunks whose K/V the store has, or was given.
            certain: Columns that nobody will take back.
            may_copy: As in `harvest`.
        """
        hidden = self._input.hidden if self._input else None
        if hidden is None:
            return []
        begin = self._total - hidden.shape[1]
        lengths = self._transcript.exact_lengths(certain)
        entries = []
        for row, (plan, length) in enumerate(zip(plans, lengths, strict=True)):
            before: list[str] = []
            pad = self._transcript.pads[row]
            for chunk in plan.chunks:
                before.append(self._keys.key(chunk.hash))
                is_here = begin <= pad + chunk.start and chunk.stop <= length
                if not is_here or chunk.hash in self.sizes or chunk.hash not in stored:
                    continue
                tokens = self._tokens(row, chunk)
                form = self._keys.output_form(self._layout, tokens, chunk.start, chunk.hash)
                first = pad + chunk.start - begin
                here = hidden[row, first : first + len(tokens)]
                pin = self._context.settings.pin
                entries.append(extra_entry(form, [here], chunk, before, pin, may_copy))
                self.sizes[chunk.hash] = entries[-1].nbytes
        return entries
