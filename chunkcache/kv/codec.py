"""Codec: how a chunk's K/V become the bytes that a store keeps, and K/V again.

Up to three steps. Numbers, as they are or fewer bits of them, make a safetensors file (`layout.py`,
`quantise.py`); it may be compressed (`compress.py`), and sealed (`seal.py`). The reader knows the
codec from the key, and the chunk. So it knows all of the file but its numbers and their checksum,
and the size of what every step must give; whatever else a blob is, it is a miss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chunkcache.keys import BF16, INT8, PLAIN, SEALED, ZSTD
from chunkcache.kv.compress import compress, decompress, most_bytes
from chunkcache.kv.layout import (
    OUTPUTS_LAYOUT,
    STATES_LAYOUT,
    KVLayout,
    LayerKV,
    TensorFile,
    output_slots,
    state_slots,
)
from chunkcache.kv.quantise import decode_int8, encode_int8, int8_slots
from chunkcache.kv.rope import KeyRotation
from chunkcache.kv.seal import OVERHEAD, Seal
from chunkcache.kv.transfer import Snapshot, is_host, upload

_TEXT = "@token_ids"  # no sealed text may stand for a blob
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Codec:
    """How all chunks of one cache are written and read.

    Attributes:
        name: One of the codecs of `Settings`.
        seal: The keys that seal blobs, if they are sealed.
        rotation: Turns keys to position 0 and back for int8, where the model's rule is known.
    """

    name: str = PLAIN
    seal: Seal | None = None
    rotation: KeyRotation | None = None

    @property
    def numbers(self) -> str:
        """The codec's name without compression."""
        return self.name.removesuffix(ZSTD)

    @property
    def format(self) -> str:
        """The first part of a key: who does not know it looks for other keys."""
        return self.name + (SEALED if self.seal else "")

    @property
    def world(self) -> str:
        """What every hash depends on, beside model and namespace; `""` for the plain codec.

        K/V that were computed behind rounded ones are not those of the tokens before them alone, so
        no other codec may find them. And an index entry names chunks of one format.
        """
        if self.format == PLAIN:
            return ""
        return self.format + (f" {_digest(self.rotation)}" if self.rotation else "")

    def is_exact(self, dtype: torch.dtype) -> bool:
        """Whether K/V of that type come back bit by bit."""
        return self.numbers == PLAIN or (self.numbers == BF16 and dtype == torch.bfloat16)

    def form(
        self, layout: KVLayout, tokens: Sequence[int], start: int, chunk_hash: str, key: str
    ) -> BlobForm:
        """The form of one chunk.

        Args:
            layout: What the model's layers cache.
            tokens: Its token ids.
            start: Position of the first.
            chunk_hash: Its hash.
            key: Its key in the store.
        """
        if self.numbers == PLAIN:
            file = TensorFile.of(layout, tokens, start, chunk_hash)
        elif self.numbers == BF16:
            half = replace(layout, dtype=torch.bfloat16)
            file = TensorFile.of(half, tokens, start, chunk_hash)
        else:
            turned = "position 0" if self.rotation else "as cached"
            file = TensorFile.of(layout, tokens, start, chunk_hash, int8_slots, keys=turned)
        return BlobForm(self, layout, start, key, file)

    def output_form(
        self, layout: KVLayout, tokens: Sequence[int], start: int, chunk_hash: str, key: str
    ) -> BlobForm:
        """The form of one chunk's outputs, whose numbers are kept as they are.

        Arguments are those of `form`; the layout is that of outputs.
        """
        file = TensorFile.of(layout, tokens, start, chunk_hash, output_slots, OUTPUTS_LAYOUT)
        return BlobForm(self._exact, layout, start, key, file)

    def state_form(
        self, layout: KVLayout, tokens: Sequence[int], start: int, chunk_hash: str, key: str
    ) -> BlobForm:
        """The form of the states behind one chunk, whose numbers are kept as they are."""
        file = TensorFile.of(layout, tokens, start, chunk_hash, state_slots, STATES_LAYOUT)
        return BlobForm(self._exact, layout, start, key, file)

    @property
    def _exact(self) -> Codec:
        """The same, but that numbers are kept as they are."""
        plain = PLAIN + (ZSTD if self.name.endswith(ZSTD) else "")
        return replace(self, name=plain, rotation=None)

    def hide(self, text: str, key: str) -> str:
        """Text for the metadata under a key that only those may read who can read the blob."""
        return self.seal.seal_text(text, key + _TEXT) if self.seal else text

    def reveal(self, text: str, key: str) -> str:
        """What was hidden. Raises BlobError where that is not possible."""
        return self.seal.open_text(text, key + _TEXT) if self.seal else text


@dataclass(frozen=True, slots=True)
class BlobForm:
    """How one chunk becomes a blob: a `TensorFile`, compressed or sealed where that is asked for.

    Attributes:
        codec: How it is written.
        layout: What the model's layers cache.
        start: Position of the first token.
        key: Its key in the store.
        file: The form of the safetensors file in it.
    """

    codec: Codec
    layout: KVLayout
    start: int
    key: str
    file: TensorFile

    @property
    def is_direct(self) -> bool:
        """Whether the blob is a header, and then the very bytes of the layers."""
        as_it_is = self.file.layout == self.layout and self.codec.numbers != INT8
        return as_it_is and self.codec.format == self.codec.numbers

    def may_have(self, nbytes: int) -> bool:
        """Whether a sound blob can be so large."""
        if self.nbytes is not None:
            return nbytes == self.nbytes
        return 0 < nbytes - self._overhead <= most_bytes(self.file.size)

    @property
    def nbytes(self) -> int | None:
        """Bytes of a sound blob; `None` where that depends on its numbers."""
        return None if self.codec.name.endswith(ZSTD) else self.file.size + self._overhead

    @property
    def _overhead(self) -> int:
        """Bytes that sealing adds."""
        return OVERHEAD if self.codec.seal else 0

    def saved(self, nbytes: int) -> int:
        """How much smaller a blob of so many bytes is than one of the plain codec."""
        tokens, head = self.file.tokens, len(self.file.header)
        return max(0, head + tokens * self.layout.token_bytes - nbytes)

    def encode(self, layers: Sequence[LayerKV | None]) -> memoryview:
        """Build the blob, in memory of its own.

        Args:
            layers: Keys and values per layer, each `[kv_heads, tokens, head_dim]`, `None` for
                layers that cache nothing; on any device.
        """
        return self.encode_tensors(self.numbers(layers))

    def encode_tensors(self, tensors: Iterable[Tensor]) -> memoryview:
        """The same of the file's tensors, in order."""
        return self._wrapped(self.file.build(tensors))

    def encode_later(self, tensors: Sequence[Tensor]) -> Callable[[], memoryview]:
        """What builds the blob, in any thread, of tensors on a device as they are now."""
        snapshot = Snapshot(self.file.gather(tensors))
        return lambda: self._wrapped(self.file.build_from(snapshot.copy_to))

    def numbers(self, layers: Sequence[LayerKV | None]) -> list[Tensor]:
        """The file's tensors of keys and values, in order, perhaps still of another type."""
        if self.codec.numbers == INT8:
            return encode_int8(self.file, layers, self.start, self.codec.rotation)
        return [part for kv in layers if kv for part in kv]

    def _wrapped(self, blob: memoryview) -> memoryview:
        """A file compressed and sealed, as the codec has it."""
        codec = self.codec
        if codec.name.endswith(ZSTD):
            blob = compress(blob, len(self.file.header), self._width)
        return codec.seal.seal(blob, self.key) if codec.seal else blob

    def decode(
        self, blob: memoryview, device: torch.device = _CPU, memory: Tensor | None = None
    ) -> list[LayerKV | None]:
        """The keys and values of a blob in the layout's data type, perhaps as views of it.

        Args:
            blob: It.
            device: Where they are wanted; the blob goes there as it is, in one copy.
            memory: The blob's memory, `[nbytes]` uint8, if it is pinned.

        Raises:
            SealedBlobError: It is sealed with another key.
            BlobError: It is not this chunk's, or it is damaged.
        """
        file, data = self.file, self._data(blob, device, memory)
        if self.codec.numbers == INT8:
            return decode_int8(file, data, self.start, self.codec.rotation)
        dtype = self.layout.dtype
        return [kv and (kv[0].to(dtype), kv[1].to(dtype)) for kv in file.views(data)]

    def decode_tensors(
        self, blob: memoryview, device: torch.device = _CPU, memory: Tensor | None = None
    ) -> list[Tensor]:
        """The same, as the file's tensors, in order."""
        return self.file.tensors(self._data(blob, device, memory))

    def _data(self, blob: memoryview, device: torch.device, memory: Tensor | None) -> Tensor:
        """What is behind the header of the file in a blob, `[nbytes]` uint8."""
        plain = self._unwrapped(blob)
        if memory is not None and plain is blob:
            data = memory[len(self.file.header) :]
        else:
            data = self.file.data(plain)
        return data if is_host(device) else upload(data, device)

    def _unwrapped(self, blob: memoryview) -> memoryview:
        """The file in a blob, checked."""
        codec, file, head = self.codec, self.file, len(self.file.header)
        if codec.seal:
            blob = codec.seal.open(blob, self.key)
        if codec.name.endswith(ZSTD):
            blob = decompress(blob, file.size, head, self._width)
        file.check(blob[:head], [blob[head:]])
        # torch warns of memory that may not be written, though nobody writes to it here.
        return memoryview(bytearray(blob)) if blob.readonly else blob

    @property
    def _width(self) -> int:
        """Bytes of the numbers that are sorted by significance before they are compressed."""
        slots = self.file.arrange(self.file.layout, self.file.tokens)
        return min(slot.dtype.itemsize for slot in slots)


def _digest(rotation: KeyRotation) -> str:
    """SHA-256 over the rules by which keys were turned: with others they cannot be turned back."""
    digest = hashlib.sha256()
    for layer in rotation.layers:
        for turn in (layer.keys, layer.values) if layer else ():
            what = turn and (turn.first, turn.interleaved, turn.sign, turn.inv_freq.tolist())
            digest.update(repr(what).encode())
    return digest.hexdigest()
