"""BackgroundLoad: K/V that travel while the model computes already.

The model needs a layer's K/V when it comes to that layer, not before. So a thread reads the chunks
of a prompt a few layers at a time, of all chunks the first ones first, and each layer waits for its
own part only. Checksums are taken as the bytes come in, and compared before the forward's outputs
are believed: should a blob be missing or damaged, the forward is done again.

CacheGen (https://arxiv.org/abs/2310.07240) and LMCache overlap loading and computing likewise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from contextvars import copy_context
from functools import partial
from time import perf_counter

import torch

from chunkcache.errors import StoreError
from chunkcache.kv.layers import GrowingLayer
from chunkcache.reuse.blobs import BlobReader, PendingChunk
from chunkcache.reuse.staging import Staging, in_groups
from chunkcache.stores.base import nbytes_of
from chunkcache.stores.locks import Latch, start_thread

# Read of each chunk at once: smaller groups cost more commands, larger ones a longer wait.
GROUP_BYTES = 1 << 20
# Less than this has been read before a thread would have started.
LEAST_BYTES = 4 << 20


class BackgroundLoad:
    """The reading of chunks into layers, begun and not waited for.

    Args:
        reader: Counts what has come, and is told what is wrong with it.
        chunks: What is read, straight to where it belongs, or by way of `staging`.
        layers: The layers it belongs to.
        staging: What brings it on, to layers on a device.

    Attributes:
        chunks: As given.
        waited_ms: Milliseconds that layers, and whoever finished, have waited.
        busy_ms: Milliseconds from the beginning of the reading to its end.

    Raises:
        RuntimeError: There are no more threads, or the interpreter is ending.
    """

    def __init__(
        self,
        reader: BlobReader,
        chunks: Sequence[PendingChunk],
        layers: Sequence[GrowingLayer],
        staging: Staging | None = None,
    ) -> None:
        self.waited_ms = self.busy_ms = 0.0
        self._reader, self.chunks = reader, chunks
        self._missing: set[int] = set()
        self._error: StoreError | None = None
        self._stopped = False
        self._staging = staging
        largest = max(chunks, key=lambda chunk: chunk.nbytes)
        sizes = [nbytes_of(layer) for layer in largest.runs]
        self._groups = staging.groups if staging else in_groups(sizes, GROUP_BYTES)
        self._here = [Latch() for _ in self._groups]
        self._end = Latch()
        self._pid = os.getpid()
        context = copy_context()  # in which calls to the store are counted for this prompt
        start_thread(partial(context.run, self._read), "chunkcache-load")
        for number, group in enumerate(self._groups):
            for layer in group:
                layers[layer].arriving = partial(self._wait_for, number)

    def finish(self) -> bool:
        """Wait for all of it, and check it. True if every chunk is here and as it must be."""
        self._wait(self._end)
        if self._staging:  # should a layer not have been used
            self._staging.wait_for(len(self._groups) - 1)
        if self._pid != os.getpid():
            self._error = StoreError("the process was forked while K/V were on their way")
        if self._error:
            self._reader.handle_error(self._error)
            return False
        for number, chunk in enumerate(self.chunks):
            self._reader.conclude(chunk, number not in self._missing)
        self._reader.discard()
        return not any(chunk.failure for chunk in self.chunks)

    def stop(self) -> None:
        """Read no further than the part that is on its way. The layers must not be used."""
        self._stopped = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what waits is no graph
    def _wait_for(self, group: int) -> None:
        """A layer of this group is used next."""
        self._wait(self._here[group])
        if self._staging:
            self._staging.wait_for(group)

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
            self._error = error.with_traceback(None)
            self._error.__cause__ = self._error.__context__ = None
        except Exception as error:  # in a thread, nobody else would notice
            self._error = StoreError(f"reading failed unexpectedly: {error!r}")
        finally:
            self.busy_ms = 1e3 * (perf_counter() - begun)
            for sign in (*self._here, self._end):  # nobody may wait for what does not come
                sign.open()
            if self._staging:
                self._staging.end()

    def _read_groups(self) -> None:
        parts = [[chunk.part(group) for chunk in self.chunks] for group in self._groups]
        with closing(self._reader.store.fetch([p for group in parts for p in group])) as answers:
            for turn, (here, group) in enumerate(zip(self._here, parts, strict=True)):
                if self._staging:
                    self._staging.begin(turn)
                for number, part in enumerate(group):
                    if self._stopped:
                        return
                    if not next(answers):
                        self._missing.add(number)
                    part.place.complete()  # type: ignore[attr-defined]
                if self._staging:
                    self._staging.send(turn)
                here.open()
