"""Cache layers that can be filled from outside and grow without copying.

`DynamicLayer` concatenates the whole cache with each new token: 100 ms a token for 200 MB. These
layers keep room behind what they hold, write new tokens into it and hand out views. All else
(crop, reorder, repeat, select, reset) is inherited: whatever replaces `keys` with a tensor of its
own is noticed at the next update, which then moves to larger memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from chunkcache.kv.layout import BufferPool, KVLayout, LayerKV
from chunkcache.kv.transfer import copy_all, is_host

# Room for new tokens: at least this many, and this share of what is held.
SLACK_TOKENS = 128
SLACK_SHARE = 0.25


def with_room(tokens: int) -> int:
    """Tokens to allocate for a layer that is about to hold `tokens`."""
    return tokens + max(SLACK_TOKENS, math.ceil(tokens * SLACK_SHARE))


def flat_memory(
    size: int, dtype: torch.dtype, device: torch.device, memory: BufferPool | None = None
) -> Tensor:
    """Uninitialised flat memory for `size` numbers, on the CPU that of `memory` if it has any."""
    if torch.is_inference_mode_enabled():  # whose tensors do not count writes (see WriteCount)
        with torch.inference_mode(False):
            return flat_memory(size, dtype, device, memory)
    if not is_host(device) or not size:
        return torch.empty(size, dtype=dtype, device=device)
    nbytes = size * dtype.itemsize
    # Without a weak reference, which a compiled forward cannot follow.
    room = np.empty(nbytes, dtype=np.uint8) if memory is None else memory.take(nbytes)
    return torch.from_numpy(room).view(dtype)


class WriteCount:
    """Tells whether others wrote to our memory: PyTorch counts the in-place writes to a tensor.

    One object for all layers that lie in one memory, since their views share its counter.
    """

    def __init__(self, *memory: Tensor) -> None:
        self._memory = memory
        self.note()

    def note(self) -> None:
        """What has been written so far is ours."""
        self._counts = self._now()

    def differs(self) -> bool:
        """Whether something was written that was not noted."""
        return self._counts != self._now()

    def _now(self) -> list[int]:
        return [-1 if memory.is_inference() else memory._version for memory in self._memory]


class GrowingLayer(DynamicLayer):
    """A full-length cache layer with room to grow.

    `keys` and `values` are `[batch, kv_heads, tokens, head_dim]` views of larger memory. Both may
    be written to or replaced by others, as DynamicLayer's: `check_edited` tells.
    """

    keys: Any  # a Tensor once initialised, which the parent class cannot say
    values: Any

    def __init__(self, **_: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._key_room: Tensor | None = None
        self._value_room: Tensor | None = None
        # Of each room its bytes, heads, capacity and bytes per token, once somebody has asked.
        self._flat: list[tuple[memoryview, int, int, int]] = []
        # Where the next update writes, `[tokens]`, instead of behind what is held (see scatter.py).
        self.columns: Tensor | None = None
        # Called with keys and values before they are cached; may end the forward (see probes.py).
        self.intercept: Callable[[Tensor, Tensor], None] | None = None
        # Waits for what is held but still on its way (see `reuse/background.py`).
        self.arriving: Callable[[], None] | None = None
        # Whether others have written to what is held, or put tensors of their own there.
        self.edited = False
        self._in_a_graph = False  # written to by a compiled forward
        self._ours: tuple[Any, Any] = (None, None)  # keys and values as we left them
        self._writes: WriteCount | None = None
        # Whether the next update keeps the K/V that it overwrites in its first column, and these,
        # `[batch, kv_heads, 1, head_dim]` each (see check_token.py).
        self.keeps_first = False
        self.first: LayerKV | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: all but the bytes of memory that is not its own."""
        self.check_edited()
        return {**self.__dict__, "_flat": [], "_writes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy's tensors, each of which counts writes anew."""
        self.__dict__.update(state)
        if self.is_initialized and self.owns_storage():
            self._writes = WriteCount(*self._rooms)
            self.hold(self.get_seq_length())  # as views, which count together again
        elif self.is_initialized:
            self._writes = WriteCount(self.keys, self.values)

    def check_edited(self) -> bool:
        """Look whether others have changed what is held since `note_written`."""
        if self._in_a_graph:
            self._in_a_graph = False
            self.note_written()
        if self.is_initialized and not self.edited:
            keys, values = self._ours
            self.edited = (
                self.keys is not keys
                or self.values is not values
                or (self._writes is not None and self._writes.differs())
            )
        return self.edited

    def note_written(self) -> None:
        """What is held now is ours, however it came there."""
        if self.keys is not self._ours[0] or self.values is not self._ours[1]:
            self._ours = self.keys, self.values
            if not self.owns_storage():
                self._writes = WriteCount(self.keys, self.values)
        if self._writes is not None:
            self._writes.note()

    @property
    def _rooms(self) -> tuple[Tensor, Tensor]:
        """Memory of keys and of values, `[batch, kv_heads, capacity, head_dim]` each."""
        assert self._key_room is not None
        assert self._value_room is not None
        return self._key_room, self._value_room

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self._rooms[0].shape[2]

    def allocate(
        self, key_room: Tensor, value_room: Tensor, writes: WriteCount | None = None
    ) -> None:
        """Begin empty in the given memory, `[batch, kv_heads, capacity, head_dim]` each.

        `writes` is of the memory that it was cut from.
        """
        self._live_in(key_room, value_room, writes)
        self.hold(0)
        self.is_initialized = True

    def _live_in(
        self, key_room: Tensor, value_room: Tensor, writes: WriteCount | None = None
    ) -> None:
        self.dtype, self.device = key_room.dtype, key_room.device
        self._key_room, self._value_room = key_room, value_room
        self._writes = writes or WriteCount(key_room, value_room)
        self._flat = []

    def hold(self, tokens: int) -> None:
        """Declare that the first `tokens` of the room are filled."""
        self.keys, self.values = (room[:, :, :tokens] for room in self._rooms)
        self._ours = self.keys, self.values

    def place(self, row: int, column: int, keys: Tensor, values: Tensor) -> None:
        """Copy `[kv_heads, tokens, head_dim]` into one row's room, held or not (see `hold`)."""
        for room, new in zip(self._rooms, (keys, values), strict=True):
            room[row, :, column : column + new.shape[1]].copy_(new)

    def peek(self, row: int, column: int, tokens: int) -> LayerKV:
        """Views `[kv_heads, tokens, head_dim]` of one row's room, held or not."""
        keys, values = (room[row, :, column : column + tokens] for room in self._rooms)
        return keys, values

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values per token of a row."""
        return sum(r.shape[1] * r.shape[3] * r.element_size() for r in self._rooms)

    def stretch(self, row: int, column: int, chunks: int, tokens: int) -> list[Tensor]:
        """Views `[chunks, kv_heads, tokens, head_dim]` of one row's room, of keys and of values.

        What is written to them counts as ours (see `WriteCount`), whichever thread writes it.
        """
        return [
            room.data[row, :, column : column + chunks * tokens]
            .view(room.shape[1], chunks, tokens, room.shape[3])
            .transpose(0, 1)
            for room in self._rooms
            if room.shape[3]
        ]

    def one_row(self, row: int, column: int, tokens: int) -> GrowingLayer:
        """A layer of one row only, on the same memory, that holds `tokens` from `column` on."""
        layer = GrowingLayer()
        keys, values = (room[row : row + 1, :, column:] for room in self._rooms)
        layer.allocate(keys, values, self._writes)
        layer.hold(tokens)
        return layer

    def blank(self, row: int, start: int, stop: int) -> None:
        """Zero some of a row's columns: padding, which attention masks but multiplies by zero."""
        for room in self._rooms:
            room[row, :, start:stop].zero_()

    def runs(self, row: int, column: int, tokens: int) -> list[memoryview]:
        """The memory of one row's room behind `column`: where a blob's bytes belong, in its order.

        Keys of each head, then values of each head. Only on the CPU.
        """
        if not self._flat:
            for room in self._rooms:
                _, heads, capacity, dim = room.shape
                if not dim:  # the values of index keys
                    continue
                memory = room.view(torch.uint8).numpy().reshape(-1).data
                self._flat.append((memory, heads, capacity, dim * room.element_size()))
        return [
            memory[(head * capacity + column) * width : (head * capacity + column + tokens) * width]
            for memory, heads, capacity, width in self._flat
            for head in range(row * heads, (row + 1) * heads)
        ]

    def owns_storage(self) -> bool:
        """Whether what is held lies in the room, as it does unless others have replaced it."""
        return (
            self._key_room is not None
            and self._value_room is not None
            and _is_view(self.keys, self._key_room)
            and _is_view(self.values, self._value_room)
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[batch, kv_heads, tokens, head_dim]` and return views of all that is held."""
        if self.arriving is not None:
            self.arriving()
            self.arriving = None
        if self.intercept is not None:
            self.intercept(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._ours = self.keys, self.values
        if self.keeps_first:
            self._keep_first()
        if torch.compiler.is_compiling():  # a graph has no counters: what it writes is ours
            self._in_a_graph = True
            self._write(key_states, value_states, *args, **kwargs)
        else:
            self.check_edited()
            self._write(key_states, value_states, *args, **kwargs)
            self.note_written()
        return self.keys, self.values

    def _write(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.columns is not None:
            self._write_in_the_middle(key_states, value_states, self.columns)
            return
        if torch.is_grad_enabled():
            # Autograd needs what it was given as it was: no writing in place.
            super().update(key_states, value_states, *args, **kwargs)
            return
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        if not self._fits(key_states, value_states, held, total):
            self._move(key_states, value_states, held, total)
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, held:total].copy_(new)
        self.hold(total)

    def _keep_first(self) -> None:
        self.keeps_first = False
        held = self.get_seq_length()
        keys, values = (
            room[:, :, held : held + 1].clone()
            if self.columns is None
            else room.index_select(2, self.columns[:1].to(room.device))
            for room in self._rooms
        )
        self.first = keys, values

    def _write_in_the_middle(
        self, key_states: Tensor, value_states: Tensor, columns: Tensor
    ) -> None:
        held = self.get_seq_length()
        if not self._fits(key_states, value_states, held, held):
            self._move(key_states, value_states, held, held)
            self.hold(held)
        columns = columns.to(key_states.device)
        new = key_states.to(self.keys.dtype), value_states.to(self.values.dtype)
        if torch.is_grad_enabled():  # as in `update`
            self.keys = self.keys.index_copy(2, columns, new[0])
            self.values = self.values.index_copy(2, columns, new[1])
        else:
            self.keys.index_copy_(2, columns, new[0])
            self.values.index_copy_(2, columns, new[1])

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all, keeping what is held."""
        held = self.get_seq_length()
        tokens = max(held, tokens)
        if held and not self._fits(self.keys, self.values, held, tokens):
            self._move(self.keys, self.values, held, tokens)
            self.hold(held)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._key_room = self._value_room = self.columns = self._writes = None
        self._flat = []

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; the number is negative."""
        with self.changing():
            super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows."""
        with self.changing():
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        with self.changing():
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows given."""
        with self.changing():
            super().batch_select_indices(indices)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around a change that we make ourselves."""
        self.check_edited()
        yield
        if self.is_initialized:
            self.note_written()

    def _fits(self, keys: Tensor, values: Tensor, held: int, total: int) -> bool:
        """Whether what is held is where we left it, and the new tokens may be written behind it."""
        if self._key_room is None or self._value_room is None:
            return False
        return all(
            room.shape[2] >= total
            and room.shape[:2] == new.shape[:2]
            and room.shape[3] == new.shape[3]
            and room.device == new.device
            and room.dtype == torch.promote_types(room.dtype, new.dtype)
            # Memory made under torch.inference_mode may be written under it alone.
            and room.is_inference() <= torch.is_inference_mode_enabled()
            and (not held or _is_view(view, room))
            for room, new, view in (
                (self._key_room, keys, self.keys),
                (self._value_room, values, self.values),
            )
        )

    def _move(self, keys: Tensor, values: Tensor, held: int, total: int) -> None:
        """Take larger memory, on the device of the new tokens, and copy what is held there."""
        rooms = []
        for old, new in ((self.keys, keys), (self.values, values)):
            batch, heads, _, dim = new.shape
            shape = (batch, heads, with_room(total), dim)
            dtype = torch.promote_types(old.dtype, new.dtype) if held else new.dtype
            room = flat_memory(math.prod(shape), dtype, new.device).view(shape)
            if held:
                room[:, :, :held].copy_(old)
            rooms.append(room)
        self._live_in(rooms[0], rooms[1])


class IndexedLayer(GrowingLayer):
    """A layer of indexed attention: K/V, and the index keys by which each query chooses some.

    Attributes:
        index: Has these as keys, `[batch, 1, tokens, index_head_dim]`, and no values.
    """

    indexer_position_ids = None  # of models whose index has positions of its own: not supported

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.index = GrowingLayer()

    @property
    def is_indexer_initialized(self) -> bool:
        """Whether there are index keys: some layers use those of another."""
        return self.index.is_initialized

    @property
    def indexer_keys(self) -> Tensor | None:
        """Those held, `[batch, tokens, index_head_dim]`."""
        return self.index.keys[:, 0] if self.index.is_initialized else None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Append `[batch, tokens, index_head_dim]` and return all that is held."""
        new = indexer_key_states[:, None]
        held: Tensor = self.index.update(new, new[..., :0])[0]
        return held[:, 0]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.index.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; the number is negative."""
        super().crop(tokens_to_remove)
        if self.index.is_initialized:
            self.index.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows."""
        super().reorder_cache(beam_idx)
        self.index.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self.index.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows given."""
        super().batch_select_indices(indices)
        self.index.batch_select_indices(indices)


def with_indices(layers: Sequence[Any]) -> list[Any]:
    """All that caches something per token, in the order of a layout: layers, then index keys."""
    return [*layers, *(layer.index for layer in layers if isinstance(layer, IndexedLayer))]


def _is_view(view: Tensor, room: Tensor) -> bool:
    start = room.data_ptr() if view.numel() else 0  # an empty tensor lies nowhere
    return view.data_ptr() == start and view.stride() == room.stride()


def allocate_all(
    layers: Sequence[Any],
    layout: KVLayout,
    batch: int,
    tokens: int,
    device: torch.device,
    memory: BufferPool | None = None,
) -> None:
    """Give all layers room for `tokens` and some more, cut from one piece of memory.

    One large piece instead of two per layer: few large pages instead of many small ones.
    """
    room = with_room(tokens)
    numbers = batch * room * layout.token_bytes // layout.dtype.itemsize
    arena = flat_memory(numbers, layout.dtype, device, memory)
    writes = WriteCount(arena)
    at = 0

    def take(heads: int, dim: int) -> Tensor:
        nonlocal at
        shape = (batch, heads, room, dim)
        begin, at = at, at + math.prod(shape)
        return arena[begin:at].view(shape)

    for layer, shape in zip(with_indices(layers), layout.layers, strict=True):
        if shape is not None:
            layer.allocate(
                take(shape.key_heads, shape.key_dim),
                take(shape.value_heads, shape.value_dim),
                writes,
            )


def growing(layers: Sequence[Any]) -> list[GrowingLayer]:
    """Those of a cache's layers that are ours, and the index keys of some."""
    return [
        layer
        for number, layer in enumerate(with_indices(layers))
        if isinstance(layer, GrowingLayer) and (number < len(layers) or layer.is_initialized)
    ]


def reserve_all(layers: Sequence[Any], tokens: int) -> None:
    """Make room for `tokens` in all, keeping what is held."""
    for layer in growing(layers):
        layer.reserve(tokens)


def hold_all(layers: Sequence[Any], columns: int, pads: Sequence[int], start: int) -> None:
    """Declare that the first columns are filled, in each row but for its padding.

    Args:
        layers: The layers of a cache.
        columns: How many are filled.
        pads: Columns of left padding of each row, which are zeroed.
        start: The first column whose padding has not been.
    """
    for layer in growing(layers):
        for row, pad in enumerate(pads):
            if start < min(pad, columns):
                layer.blank(row, start, min(pad, columns))
        layer.hold(columns)


def are_edited(layers: Sequence[Any]) -> bool:
    """Whether others have changed what any of the layers holds."""
    return any(layer.check_edited() for layer in growing(layers))


def note_all_written(layers: Sequence[Any]) -> None:
    """What the layers hold now is ours, however it came there."""
    for layer in growing(layers):
        layer.note_written()


def all_runs(
    layers: Sequence[GrowingLayer], row: int, column: int, tokens: int
) -> list[list[memoryview]]:
    """Of each layer in turn, the memory of one row's room behind `column` (see `runs`)."""
    return [layer.runs(row, column, tokens) for layer in layers]


def peek_all(layers: Sequence[Any], row: int, column: int, tokens: int) -> list[LayerKV | None]:
    """Views of one row's room in all layers, held or not: `[kv_heads, tokens, head_dim]` each."""
    return [
        layer.peek(row, column, tokens) if _holds_kv(layer) else None
        for layer in with_indices(layers)
    ]


def place_all(layers: Sequence[Any], row: int, column: int, kv: Sequence[LayerKV | None]) -> None:
    """Copy `[kv_heads, tokens, head_dim]` of each layer into one row's room, in few steps."""
    tokens = next(pair[0].shape[1] for pair in kv if pair)
    targets, sources = (
        [part for pair in pairs if pair for part in pair]
        for pairs in (peek_all(layers, row, column, tokens), kv)
    )
    copy_all(targets, sources)


def row_slice(layers: Sequence[Any], row: int, start: int, stop: int) -> list[LayerKV | None]:
    """Views of one row's K/V in columns `start` to `stop`, each `[kv_heads, tokens, head_dim]`."""
    return [
        (layer.keys[row, :, start:stop], layer.values[row, :, start:stop])
        if _holds_kv(layer)
        else None
        for layer in with_indices(layers)
    ]


def _holds_kv(layer: Any) -> bool:
    return isinstance(layer, GrowingLayer) and layer.is_initialized


def row_runs(layers: Sequence[Any], row: int, start: int, stop: int) -> list[memoryview] | None:
    """The same as memory, in the order of a blob; `None` where it cannot be had without a copy."""
    found: list[memoryview] = []
    for layer in growing(layers):
        if not is_host(layer.device) or not layer.owns_storage():
            return None
        found += layer.runs(row, start, stop - start)
    return found
