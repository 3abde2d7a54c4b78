"""Blobs on their way from the store: read, checked, and removed where they are damaged.

All reading of K/V is here, whether a prompt waits for it, text is moved, or K/V arrive while the
model computes (`background.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress

import numpy as np
import torch
from torch import Tensor

from chunkcache.errors import BlobError, SealedBlobError, StoreError
from chunkcache.kv.codec import BlobForm
from chunkcache.kv.layout import Checksum, LayerKV
from chunkcache.kv.transfer import host_memory, is_host
from chunkcache.stores.base import ChunkStore, Part, Place, batches, nbytes_of

_CPU = torch.device("cpu")
GONE = "it was gone from the store before it was read"
INTERRUPTED = "it did not come in one go"
NO_MEMORY = "the device has no memory left to bring it there"
WRONG_SIZE = "the blob is damaged: its length is wrong"


class PendingChunk:
    """The blob of one chunk, and the memory that it is read into.

    A blob that is a header and then the very bytes of the layers may be read straight to where
    they belong; any other goes into memory of its own.

    Attributes:
        chunk_hash: The chunk's hash.
        form: The form of the blob.
        nbytes: Bytes that it has.
        runs: Of each layer in turn, where its keys and values belong; empty for memory of its own.
        device: Where they are wanted.
        kv: Keys and values per layer, once they have come into memory of its own.
        failure: Why it cannot be used, once that is known.
    """

    def __init__(
        self,
        chunk_hash: str,
        form: BlobForm,
        nbytes: int,
        runs: Sequence[Sequence[memoryview]] = (),
        device: torch.device = _CPU,
    ) -> None:
        self.chunk_hash, self.form, self.nbytes, self.runs = chunk_hash, form, nbytes, runs
        self.device = device
        self.kv: list[LayerKV | None] = []
        self.failure = ""
        self._head = memoryview(b"")  # what stands before the tensor data, or all of it
        self._memory: Tensor | None = None  # that of `_head`, on its way to a device
        self._checksum = Checksum()
        self._checked = 0  # bytes that it was taken of

    @property
    def is_direct(self) -> bool:
        """Whether it is read straight to where it belongs."""
        return bool(self.runs)

    def part(self, layers: range | None = None) -> Part:
        """All of it, or what belongs to some of the layers; the header comes with the first."""
        if layers is None or not layers.start:
            size = len(self.form.file.header) if self.runs else self.nbytes
            self._memory = None if is_host(self.device) else host_memory(size, self.device)
            self._head = (
                np.empty(size, dtype=np.uint8) if self._memory is None else self._memory.numpy()
            ).data
        if not self.runs:
            return Part(self.form.key, 0, [self._head])
        chosen = self.runs if layers is None else self.runs[layers.start : layers.stop]
        views = [view for run in chosen for view in run]
        if layers is None or not layers.start:
            return Part(self.form.key, 0, _Target(self, [self._head, *views], len(self._head)))
        start = len(self._head) + sum(map(nbytes_of, self.runs[: layers.start]))
        return Part(self.form.key, start, _Target(self, views, 0))

    def note_bytes(self, piece: memoryview) -> None:
        """Take the checksum of bytes of the tensor data, in order."""
        self._checksum.update(piece)
        self._checked += piece.nbytes

    def check(self) -> None:
        """Make sure that what has come is the chunk.

        Raises:
            SealedBlobError: It is sealed with another key.
            BlobError: It is not this chunk's, or it is damaged.
        """
        if not self.runs:
            self.kv = self.form.decode(self._head, self.device, self._memory)
            self._head, self._memory = memoryview(b""), None
            return None
        file = self.form.file
        if self._checked == self.nbytes - len(self._head):
            with suppress(BlobError):  # a part came twice, perhaps: only all of it tells
                return file.check_sum(self._head, self._checksum)
        return file.check(self._head, [view for run in self.runs for view in run])


class StagedChunk(PendingChunk):
    """The same, read into memory that is used again: it is checked as it comes, or not at all."""

    def check(self) -> None:
        """As in `PendingChunk`."""
        if self._checked == self.nbytes - len(self._head):
            self.form.file.check_sum(self._head, self._checksum)
        else:  # that says nothing of what the store has
            self.failure = INTERRUPTED


class PendingTensors(PendingChunk):
    """The same of a value beside a chunk's K/V: `tensors`, in order, once they have come."""

    tensors: Sequence[Tensor] = ()

    def check(self) -> None:
        """As in `PendingChunk`."""
        self.tensors = self.form.decode_tensors(self._head, self.device, self._memory)
        self._head, self._memory = memoryview(b""), None


class _Target(Place):
    """Where a part of a blob goes. Its checksum is taken while it is in the processor's cache."""

    def __init__(self, chunk: PendingChunk, views: Sequence[memoryview], head: int) -> None:
        super().__init__(views)
        self._chunk, self._head, self._seen = chunk, head, 0

    def filled(self, pieces: Sequence[memoryview]) -> None:
        """Add what is behind the header to the checksum."""
        for piece in pieces:
            header = self._head - self._seen
            self._chunk.note_bytes(piece if header <= 0 else piece[header:])
            self._seen += piece.nbytes

    def complete(self) -> None:
        """All is filled: for stores that do not call `filled` as bytes come in."""
        if not self._seen:
            self.filled(self)


class BlobReader:
    """Reads the chunks of one prompt.

    Args:
        store: Where they are.
        handle_error: Told of a failing store and of damaged blobs; may raise.

    Attributes:
        bytes_read: Bytes of blobs that have come.
        bytes_saved: How many bytes the codec saved: those of the K/V as the model has them, less.
        bad: Hashes of chunks whose blob is missing or damaged.
    """

    def __init__(self, store: ChunkStore, handle_error: Callable[[Exception], None]) -> None:
        self.store = store
        self.handle_error = handle_error
        self.bytes_read = self.bytes_saved = 0
        self.bad: set[str] = set()
        self._damaged: list[str] = []

    def read(self, chunks: Sequence[PendingChunk]) -> Generator[PendingChunk]:
        """Yield each chunk when it has come, or when it is known that it will not.

        The iteration may end early. `discard` is to be called afterwards.
        """
        # What is read straight to where it belongs takes no memory of its own.
        for batch in batches(chunks, lambda chunk: 0 if chunk.is_direct else chunk.nbytes):
            done = 0
            try:
                with closing(self.store.fetch([chunk.part() for chunk in batch])) as answers:
                    for chunk, is_here in zip(batch, answers, strict=True):
                        self.conclude(chunk, is_here)
                        done += 1
                        yield chunk
            except StoreError as error:
                self.handle_error(error)
                for chunk in batch[done:]:
                    chunk.failure = str(error)
                    yield chunk

    def read_tensors(self, values: Sequence[PendingTensors]) -> None:
        """Bring values, but for those whose size tells that they are damaged; these are removed."""
        for value in values:
            if not value.form.may_have(value.nbytes):
                self.reject(value, BlobError(WRONG_SIZE))
        with closing(self.read([value for value in values if not value.failure])) as answers:
            for _ in answers:
                pass
        self.discard()

    def conclude(self, chunk: PendingChunk, is_here: bool) -> None:
        """Check a chunk that has come, or take note that it has not."""
        if not is_here:
            chunk.failure = GONE
            self.bad.add(chunk.chunk_hash)
            return
        self.bytes_read += chunk.nbytes
        self.bytes_saved += chunk.form.saved(chunk.nbytes)
        try:
            chunk.check()
        except BlobError as error:
            self.reject(chunk, error)
        except torch.OutOfMemoryError:
            chunk.failure = NO_MEMORY

    def reject(self, chunk: PendingChunk, error: BlobError) -> None:
        """Take note that a blob is not what it must be."""
        chunk.failure = str(error)
        if not isinstance(error, SealedBlobError):  # which is good for others
            self.bad.add(chunk.chunk_hash)
            self._damaged.append(chunk.form.key)
        self.handle_error(error)

    def discard(self) -> None:
        """Remove what is damaged: others would read it too, or take it for what is written anew."""
        damaged, self._damaged = self._damaged, []
        try:
            if damaged:
                self.store.delete(damaged)
        except StoreError as error:
            self.handle_error(error)
