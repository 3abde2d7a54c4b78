"""Staging: K/V on their way to a device, while the model computes there already.

What a thread reads of a few layers, of all chunks, comes into a pinned buffer. From there it goes
over in one copy, on a stream of its own, and is spread over the layers there; an event says when
that is done. A layer has what is computed next wait for that event on the device: the host waits
for bytes of the store alone. Buffers are used in turns, so that pinned memory is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chunkcache.kv.layers import GrowingLayer, flat_memory
from chunkcache.kv.transfer import copy_all, host_memory, is_host

# Brought at once, of all chunks: smaller groups cost more steps, larger ones a longer wait.
STAGED_BYTES = 32 << 20
# Pinned at most, in all buffers together.
MOST_BYTES = 1 << 30
BUFFERS = 2  # one is filled while the other is on its way


class Target(NamedTuple):
    """Where a chunk belongs: a row's columns from `column` on."""

    row: int
    column: int
    tokens: int


class Staging:
    """The way of a prompt's K/V to a device: made, and waited for, by the thread that computes.

    Args:
        layers: The layers, with room on one device.
        targets: Where each chunk belongs.

    Attributes:
        groups: Numbers of the layers that come together.
        runs: Of each chunk and layer the memory that its bytes are to be read into, as of a
            `PendingChunk`. Groups take turns in it: see `begin`.

    Raises:
        OutOfMemoryError: The device has no room for its buffers.
        RuntimeError: It has no streams, or no memory can be pinned for it.
    """

    def __init__(self, layers: Sequence[GrowingLayer], targets: Sequence[Target]) -> None:
        device = layers[0].device
        module = torch.get_device_module(device)
        if is_host(device) or not hasattr(module, "Stream"):
            raise RuntimeError(f"{device} has no streams")
        self._module, self._layers, self._targets = module, layers, targets
        tokens = sum(target.tokens for target in targets)
        widths = [layer.token_bytes for layer in layers]
        self.groups = in_groups([width * tokens for width in widths], STAGED_BYTES)
        self._sizes = [tokens * sum(widths[group.start : group.stop]) for group in self.groups]
        size = max(self._sizes)
        buffers = min(BUFFERS, len(self.groups))
        if size * buffers > MOST_BYTES:
            raise RuntimeError("too much would be pinned")
        self._pinned = [host_memory(size, device) for _ in range(buffers)]
        if not all(buffer.is_pinned() for buffer in self._pinned):
            raise RuntimeError(f"no memory can be pinned for {device}")
        self._side = module.Stream(device)
        with module.stream(self._side):  # which alone uses this memory
            self._there = [flat_memory(size, torch.uint8, device) for _ in self._pinned]
        self._side.wait_stream(module.current_stream(device))  # that had the layers' memory before
        self._arrived: list[Any] = []  # an event for each group that was sent
        self.runs: list[list[list[memoryview]]] = [[] for _ in targets]
        for number, group in enumerate(self.groups):
            memory, at = self._pinned[number % buffers].numpy().data, 0
            for runs, target in zip(self.runs, targets, strict=True):
                for width in widths[group.start : group.stop]:
                    runs.append([memory[at : at + width * target.tokens]])
                    at += width * target.tokens

    def begin(self, group: int) -> None:
        """Wait until the memory of this group, which others had before, may be written to."""
        if group >= len(self._pinned):
            self._arrived[group - len(self._pinned)].synchronize()

    def send(self, group: int) -> None:
        """All of this group has come: have it brought to the layers. Waits for nothing."""
        buffer, size = group % len(self._pinned), self._sizes[group]
        there = self._there[buffer][:size]
        with self._module.stream(self._side):
            there.copy_(self._pinned[buffer][:size], non_blocking=True)
            pairs = list(self._spread(there, self.groups[group]))
            copy_all([target for target, _ in pairs], [source for _, source in pairs])
            self._arrived.append(self._side.record_event())

    def wait_for(self, group: int) -> None:
        """Have the device do what comes now once this group, if it was sent, has arrived."""
        if group < len(self._arrived):
            self._module.current_stream(self._layers[0].device).wait_event(self._arrived[group])

    def end(self) -> None:
        """Wait until nothing is on its way any more: memory must not be given back before."""
        self._side.synchronize()

    def _spread(self, there: Tensor, group: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Where parts of a group's bytes belong, and the parts, `[chunks, heads, tokens, dim]`."""
        at = 0
        for chunks in _stretches(self._targets):
            row, column, tokens = chunks[0]
            rooms = [
                room
                for number in group
                for room in self._layers[number].stretch(row, column, len(chunks), tokens)
            ]
            nbytes = sum(room.nbytes for room in rooms)
            data = there[at : at + nbytes].view(len(chunks), -1)
            at += nbytes
            begin = 0
            for room in rooms:
                size = room.nbytes // len(chunks)
                part = data[:, begin : begin + size].view(room.dtype)
                begin += size
                yield room, part.view(room.shape)


def _stretches(targets: Sequence[Target]) -> list[list[Target]]:
    """Chunks of one size that stand behind each other, taken together."""
    stretches: list[list[Target]] = []
    for target in targets:
        last = stretches[-1][-1] if stretches else None
        if last and target == (last.row, last.column + last.tokens, last.tokens):
            stretches[-1].append(target)
        else:
            stretches.append([target])
    return stretches


def in_groups(sizes: Sequence[int], most: int) -> list[range]:
    """Numbers of layers that are read together, for layers of these sizes in bytes."""
    groups = []
    begin = total = 0
    for number, size in enumerate(sizes):
        if number > begin and total + size > most:
            groups.append(range(begin, number))
            begin, total = number, 0
        total += size
    return [*groups, range(begin, len(sizes))]
