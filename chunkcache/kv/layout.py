"""A chunk's K/V to bytes and back: one safetensors file per chunk, self-describing and checked.

The blob can be read by `safetensors.safe_open` alone. Tensors are `layers.<i>.keys` and
`layers.<i>.values`, each `[kv_heads, tokens, head_dim]`, keys as the model cached them (rotated
to their position). The header's metadata holds tokens, positions, layout, chunk hash and an
xxh3-128 checksum of all tensor data.

A chunk's blob can have one form only: whoever knows the chunk knows every byte of the header but
the checksum. So a blob is checked by comparing bytes, nothing in it is parsed or believed, and its
tensors can be read straight to where they belong. The format is
https://github.com/huggingface/safetensors#format, written here to be built in one pass.
"""

from __future__ import annotations

import json
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from chunkcache.errors import BlobError
from chunkcache.kv.transfer import copy_all, is_host

LAYOUT = "[kv_heads, tokens, head_dim]"
OUTPUTS_LAYOUT = "[tokens, hidden]"
STATES_LAYOUT = "as the layers cache them, of one row, after the last token"
# Tensor data begins on a cache line, whatever the header's length.
_ALIGNMENT = 64
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer caches per token: heads and widths of keys and of values."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    def token_elements(self) -> int:
        """Numbers cached per token."""
        return self.key_heads * self.key_dim + self.value_heads * self.value_dim


class Slot(NamedTuple):
    """One tensor of a blob; its bytes are `begin` to `end` of the tensor data."""

    name: str
    shape: tuple[int, ...]
    begin: int
    end: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class StateShape:
    """One state of one row: its name in a snapshot, its shape and data type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class KVLayout:
    """What all layers of a model cache: the shapes every blob of that model must have.

    `layers` has one entry per layer of the cache, `None` for layers that cache no K/V. `states` are
    those of recurrent and convolution layers.
    """

    dtype: torch.dtype
    layers: tuple[LayerShape | None, ...]
    states: tuple[StateShape, ...] = ()

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of K/V per token, all layers."""
        elements = sum(layer.token_elements() for layer in self.layers if layer)
        return elements * self.dtype.itemsize

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of a snapshot of all states."""
        return sum(math.prod(each.shape) * each.dtype.itemsize for each in self.states)

    def slots(self, tokens: int) -> list[Slot]:
        """The tensors of a chunk's blob, in order: each layer's keys and values as they are."""
        out = []
        end = 0
        for index, layer in enumerate(self.layers):
            if layer is None:
                continue
            for name, heads, dim in (
                ("keys", layer.key_heads, layer.key_dim),
                ("values", layer.value_heads, layer.value_dim),
            ):
                begin, end = end, end + heads * tokens * dim * self.dtype.itemsize
                shape = (heads, tokens, dim)
                out.append(Slot(f"layers.{index}.{name}", shape, begin, end, self.dtype))
        return out


LayerKV = tuple[Tensor, Tensor]
"""Keys and values of one layer, each `[kv_heads, tokens, head_dim]`."""

Arrange = Callable[[KVLayout, int], list[Slot]]
"""The tensors of a blob for so many tokens of a layout, without a gap between them."""

Buffer = npt.NDArray[np.uint8]


class BufferPool:
    """Hands out memory, and keeps it for the next one when nothing refers to it any more.

    Writing into memory that the system has just given costs as much as several copies, since it
    must be mapped and zeroed page by page.

    At most `pieces` pieces are kept, each of at most `most_bytes`.
    """

    def __init__(self, pieces: int = 1, most_bytes: int = 1 << 29) -> None:
        self.most_bytes = most_bytes
        self._spare: deque[Buffer] = deque(maxlen=pieces)  # its methods are atomic

    def take(self, nbytes: int) -> Buffer:
        """Uninitialised memory; what it held before is still in it."""
        # numpy asks the kernel for huge pages, which makes first writes several times faster.
        if not 0 < nbytes <= self.most_bytes:
            return np.empty(nbytes, dtype=np.uint8)
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = np.empty(0, dtype=np.uint8)
        if not nbytes <= len(buffer) <= 2 * nbytes:
            buffer = np.empty(nbytes, dtype=np.uint8)
        # What is made of an array keeps that very array alive, so its end is that of the last user.
        array = buffer[:nbytes]
        weakref.finalize(array, self._spare.append, buffer).atexit = False
        return array


# Blobs are gone as soon as they are written; here is room for those of a prompt.
_SPARE = BufferPool(pieces=16, most_bytes=20 << 20)
_NO_CHECKSUM = b"0" * 32
_CHECKSUM_MARK = b'"checksum":"xxh3_128:'
Checksum = xxhash.xxh3_128


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file of known tensors: all of it is known but their numbers and checksum.

    Attributes:
        layout: Layers, shapes and the data type of the numbers.
        tokens: Number of tokens in the chunk.
        header: All bytes before the tensor data, zeros standing where the checksum goes.
        size: Bytes of the whole blob.
        arrange: Which tensors it has.
    """

    layout: KVLayout
    tokens: int
    header: bytes
    size: int
    arrange: Arrange = KVLayout.slots

    @classmethod
    def of(
        cls,
        layout: KVLayout,
        tokens: Sequence[int],
        start: int,
        chunk_hash: str,
        arrange: Arrange = KVLayout.slots,
        shape: str = LAYOUT,
        **notes: str,
    ) -> TensorFile:
        """The form of the chunk with these token ids, whose first one stands at `start`.

        `shape` tells people what the tensors are; `notes` are more for the header's metadata.
        """
        # As json.dumps would write it, which takes ten times as long: each chunk has one.
        more = "".join(f",{json.dumps(name)}:{json.dumps(note)}" for name, note in notes.items())
        described = (
            f'{{"format":"pt","chunk_hash":"{chunk_hash}","tokens":"[{",".join(map(str, tokens))}]"'
            f',"positions":"{start}-{start + len(tokens)}","layout":"{shape}"{more}'
            f',"checksum":"xxh3_128:{_NO_CHECKSUM.decode()}"}}'
        )
        table, nbytes = _tensor_table(arrange, layout, len(tokens))
        text = f'{{"__metadata__":{described},{table}'.encode()
        offset = -(-(8 + len(text)) // _ALIGNMENT) * _ALIGNMENT
        header = (offset - 8).to_bytes(8, "little") + text.ljust(offset - 8)
        return cls(layout, len(tokens), header, offset + nbytes, arrange)

    def with_checksum(self, data: Iterable[memoryview]) -> bytes:
        """The header for these tensor data, given in order in any number of pieces."""
        checksum = Checksum()
        for piece in data:
            checksum.update(piece)
        return self._stamped(checksum)

    def check(self, header: bytes | bytearray | memoryview, data: Iterable[memoryview]) -> None:
        """Check a blob that was read.

        Raises:
            BlobError: It is not this chunk's, or it is damaged.
        """
        self._compare(header, self.with_checksum(data))

    def check_sum(self, header: bytes | bytearray | memoryview, checksum: Checksum) -> None:
        """The same, for tensor data whose checksum was taken as they arrived."""
        self._compare(header, self._stamped(checksum))

    def _stamped(self, checksum: Checksum) -> bytes:
        mark = _CHECKSUM_MARK + checksum.hexdigest().encode()
        return self.header.replace(_CHECKSUM_MARK + _NO_CHECKSUM, mark, 1)

    def _compare(self, header: bytes | bytearray | memoryview, expected: bytes) -> None:
        if header == expected:
            return
        at = self.header.index(_CHECKSUM_MARK) + len(_CHECKSUM_MARK)
        end = at + len(_NO_CHECKSUM)
        if header[:at] == expected[:at] and header[end:] == expected[end:]:
            raise BlobError("the blob is damaged: its checksum differs")
        raise BlobError("the blob is not of this chunk: its header differs")

    def data(self, blob: memoryview) -> Tensor:
        """What is behind the header of a whole blob in writable memory, `[nbytes]` uint8."""
        return torch.frombuffer(blob, dtype=torch.uint8)[len(self.header) :]

    def tensors(self, data: Tensor) -> list[Tensor]:
        """The tensors of a blob, in order, as views of its data, on whatever device that is."""
        return [
            data[slot.begin : slot.end].view(slot.dtype).view(slot.shape)
            if slot.begin < slot.end
            else torch.empty(slot.shape, dtype=slot.dtype)
            for slot in self.arrange(self.layout, self.tokens)
        ]

    def views(self, data: Tensor) -> list[LayerKV | None]:
        """The same by layer, for blobs that hold keys and values as they are."""
        parts = iter(self.tensors(data))
        return [(next(parts), next(parts)) if layer else None for layer in self.layout.layers]

    def build(self, tensors: Iterable[Tensor]) -> memoryview:
        """A blob in memory of its own, of its tensors in order; on any device, of any type."""
        every = [tensor.detach() for tensor in tensors]
        if not is_host(every[0].device):
            with suppress(torch.OutOfMemoryError):  # then without memory on the device
                data = self.gather(every)
                return self.build_from(lambda target: target.copy_(data))
        blob = _SPARE.take(self.size).data
        for target, tensor in zip(self.tensors(self.data(blob)), every, strict=True):
            target.copy_(tensor)
        return self._with_header(blob)

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """The data of a blob of these tensors, on their device."""
        device = tensors[0].device
        data = torch.empty(self.size - len(self.header), dtype=torch.uint8, device=device)
        copy_all(self.tensors(data), [tensor.detach() for tensor in tensors])
        return data

    def build_from(self, fill: Callable[[Tensor], object]) -> memoryview:
        """A blob in memory of its own, into which `fill` brings the data."""
        blob = _SPARE.take(self.size).data
        fill(self.data(blob))
        return self._with_header(blob)

    def _with_header(self, blob: memoryview) -> memoryview:
        offset = len(self.header)
        blob[:offset] = self.with_checksum([blob[offset:]])
        return blob

    def copy(self, data: Iterable[memoryview]) -> memoryview:
        """The same of the tensors' bytes, given in order in any number of pieces."""
        blob = _SPARE.take(self.size).data
        checksum = Checksum()
        at = len(self.header)
        for piece in data:
            target = blob[at : at + piece.nbytes]
            target[:] = piece
            checksum.update(target)  # while it is in the processor's cache
            at += piece.nbytes
        assert at == self.size
        blob[: len(self.header)] = self._stamped(checksum)
        return blob


@lru_cache(maxsize=64)
def _tensor_table(arrange: Arrange, layout: KVLayout, tokens: int) -> tuple[str, int]:
    """The header's entries for the tensors, with the closing brace, and the bytes of their data.

    Alike for all whole chunks.
    """
    slots = arrange(layout, tokens)
    table = {
        slot.name: {
            "dtype": _DTYPE_NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [slot.begin, slot.end],
        }
        for slot in slots
    }
    return json.dumps(table, separators=(",", ":"))[1:], slots[-1].end


def output_layout(dtype: torch.dtype, hidden: int) -> KVLayout:
    """Of a model's outputs: what it gives to its output embeddings, so many numbers a token."""
    return KVLayout(dtype, (LayerShape(1, hidden, 0, 0),))


def output_slots(layout: KVLayout, tokens: int) -> list[Slot]:
    """The one tensor of a chunk's outputs, `[tokens, hidden]`."""
    size = layout.token_bytes
    shape = (tokens, size // layout.dtype.itemsize)
    return [Slot("hidden", shape, 0, tokens * size, layout.dtype)]


def state_slots(layout: KVLayout, tokens: int) -> list[Slot]:
    """The tensors of a snapshot, behind a chunk of so many tokens: the states of one row."""
    slots, end = [], 0
    for state in layout.states:
        begin, end = end, end + math.prod(state.shape) * state.dtype.itemsize
        slots.append(Slot(state.name, state.shape, begin, end, state.dtype))
    return slots


def encode(form: TensorFile, layers: Iterable[LayerKV | None]) -> memoryview:
    """Build a blob that holds keys and values as they are.

    Args:
        form: The chunk's form.
        layers: Keys and values per layer, `None` for layers that cache nothing; on any device.
    """
    return form.build(part for kv in layers if kv for part in kv)
