"""Arrival: K/V that travel while the model computes already.

The model needs a layer's K/V when it comes to that layer, not before. So a thread reads the chunks
of a prompt a few layers at a time, of all chunks the first ones first, and each layer waits for its
own part only. Checksums are taken as the bytes come in, and compared before the forward's outputs
are believed: should a blob be missing or damaged, the forward is done again (see `sequence.py`).

CacheGen (https://arxiv.org/abs/2310.07240) and LMCache overlap loading and computing likewise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

from chunkcache.errors import BlobError, StoreError
from chunkcache.kv.codec import Checksum
from chunkcache.kv.coding import Form
from chunkcache.kv.layers import GrowingLayer
from chunkcache.stores.base import ChunkStore, Part, nbytes_of
from chunkcache.stores.locks import Latch, start_thread

# Of each chunk, read at once: more commands for smaller groups, a longer wait for larger ones.
GROUP_BYTES = 1 << 20
# Less than this is there before a thread would have begun.
LEAST_BYTES = 4 << 20


@dataclass
class Incoming:
    """One chunk on its way.

    Attributes:
        form: The form of its blob, which must be direct (`Form.is_direct`).
        header: Memory for what stands before the tensor data.
        runs: Of each layer in turn, where its keys and values belong.
        error: What was wrong with it, once all is here.
        missing: Whether a part of it was not in the store.
        checksum: Of the tensor data that have come.
    """

    form: Form
    header: memoryview
    runs: list[list[memoryview]]
    error: BlobError | None = None
    missing: bool = False
    checksum: Checksum = field(default_factory=Checksum)

    def check(self) -> None:
        """Compare it with what it must be."""
        try:
            self.form.file.check_sum(self.header, self.checksum)
        except BlobError as error:
            self.error = error


class Arrival:
    """The reading of chunks into layers, begun and not waited for.

    Attributes:
        chunks: What is read.
        error: Why the store could not go on, if so. What has come is not looked at then.
        bytes_read: Bytes that have come.
        waited_ms: Milliseconds that layers, and whoever finished, have waited.
        busy_ms: Milliseconds from the beginning of the reading to its end.
    """

    def __init__(  # raises RuntimeError where no thread can be had
        self, store: ChunkStore, chunks: Sequence[Incoming], layers: Sequence[GrowingLayer]
    ) -> None:
        self.chunks = chunks
        self.error: StoreError | None = None
        self.bytes_read = 0
        self.waited_ms = self.busy_ms = 0.0
        self._store = store
        self._stopped = False
        largest = max(chunks, key=lambda chunk: chunk.form.file.size)
        self._groups = _groups([nbytes_of(layer) for layer in largest.runs])
        self._here = [Latch() for _ in self._groups]
        self._end = Latch()
        self._pid = os.getpid()
        context = copy_context()  # in which calls to the store are counted for this prompt
        start_thread(partial(context.run, self._read), "chunkcache-arrival")
        for here, group in zip(self._here, self._groups, strict=True):
            for number in group:
                layers[number].arriving = partial(self._wait, here)

    def finish(self) -> bool:
        """Wait for all of it. True if every chunk is here and as it must be."""
        self._wait(self._end)
        if self._pid != os.getpid():
            self.error = StoreError("the process was forked while K/V were on their way")
        if self.error:
            return False
        for chunk in self.chunks:
            if not chunk.missing:
                chunk.check()
        return not any(chunk.missing or chunk.error for chunk in self.chunks)

    def stop(self) -> None:
        """Read no further than the part that is on its way. The layers must not be used."""
        self._stopped = True

    def _wait(self, sign: Latch) -> None:
        if sign.is_open:
            return
        begun = perf_counter()
        try:
            sign.wait()
        except BaseException:  # interrupted: nobody wants the rest
            self.stop()
            raise
        self.waited_ms += 1e3 * (perf_counter() - begun)

    def _read(self) -> None:
        begun = perf_counter()
        try:
            self._read_groups()
        except StoreError as error:
            # Its frames refer to this object: as a circle, both would outlive the prompt.
            self.error = error.with_traceback(None)
            self.error.__cause__ = self.error.__context__ = None
        except Exception as error:  # in a thread, nobody else would notice
            self.error = StoreError(f"reading failed unexpectedly: {error!r}")
        finally:
            self.busy_ms = 1e3 * (perf_counter() - begun)
            for sign in (*self._here, self._end):  # nobody may wait for what does not come
                sign.open()

    def _read_groups(self) -> None:
        parts = [[_part(chunk, group) for chunk in self.chunks] for group in self._groups]
        flat = [part for group in parts for part in group]
        with closing(self._store.fetch(flat)) as answers:
            for here, group in zip(self._here, parts, strict=True):
                for chunk, part in zip(self.chunks, group, strict=True):
                    if self._stopped:
                        return
                    if next(answers):
                        self.bytes_read += nbytes_of(part.place)
                    else:
                        chunk.missing = True
                    for view in part.place[not part.start :]:  # the header is not in the sum
                        chunk.checksum.update(view)
                here.open()


def _groups(sizes: Sequence[int]) -> list[range]:
    """Numbers of layers that are read together, for layers of these sizes in bytes."""
    groups = []
    begin = total = 0
    for number, size in enumerate(sizes):
        if number > begin and total + size > GROUP_BYTES:
            groups.append(range(begin, number))
            begin, total = number, 0
        total += size
    return [*groups, range(begin, len(sizes))]


def _part(chunk: Incoming, group: range) -> Part:
    """A group of a chunk's layers; the header comes with the first."""
    before = sum(map(nbytes_of, chunk.runs[: group.start]))
    place = [view for number in group for view in chunk.runs[number]]
    if not group.start:
        return Part(chunk.form.key, 0, [chunk.header, *place])
    return Part(chunk.form.key, len(chunk.header) + before, place)
