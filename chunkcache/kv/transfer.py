"""Bytes between the host and a device: one copy for the tensors of a whole chunk.

A copy costs a device's driver some 10 µs whatever its size, and one of memory that is not pinned
makes the host wait. So what belongs together goes as one piece of memory, by way of pinned memory
where the device has that, and is spread over the layers on the device itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def is_host(device: torch.device) -> bool:
    """Whether tensors there are the host's own memory."""
    return device.type == "cpu"


def host_memory(nbytes: int, device: torch.device | None = None) -> Tensor:
    """Uninitialised memory of the host, `[nbytes]` uint8, on its way to or from a device.

    Pinned if the device can do that. PyTorch then keeps it until copies that use it are done.
    """
    if device is not None and not is_host(device) and device.type != "mps":
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except (RuntimeError, NotImplementedError):  # it cannot, or there is none left
            pass
    return torch.from_numpy(np.empty(nbytes, dtype=np.uint8))


def upload(data: Tensor, device: torch.device) -> Tensor:
    """A copy of flat memory of the host on a device, where it is in order with all that follows.

    The host waits for nothing if the memory is pinned, or may be.
    """
    if not data.is_pinned():
        pinned = host_memory(data.numel(), device)
        if not pinned.is_pinned():
            return data.to(device)
        data = pinned.copy_(data)
    return data.to(device, non_blocking=True)


def to_host(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same tensors on the host: one copy, and one wait, for all that lie on one device."""
    found = list(tensors)
    away: defaultdict[torch.device, list[int]] = defaultdict(list)
    for number, tensor in enumerate(found):
        if not is_host(tensor.device):
            away[tensor.device].append(number)
    for numbers in away.values():
        numbers.sort(key=lambda n: -found[n].itemsize)  # each begins at a multiple of its size
        flat = [found[n].detach().reshape(-1).view(torch.uint8) for n in numbers]
        brought = torch.split(torch.cat(flat).cpu(), [part.numel() for part in flat])
        for n, part in zip(numbers, brought, strict=True):
            found[n] = part.view(found[n].dtype).view(found[n].shape)
    return found


class Snapshot:
    """Flat memory on a device as it is now, to be brought to the host later, by any thread.

    Args:
        data: `[nbytes]` uint8 that nobody writes to any more.
    """

    def __init__(self, data: Tensor) -> None:
        self._data = data
        module = torch.get_device_module(data.device)
        self._written = stream.record_event() if (stream := _stream(module)) else None

    def copy_to(self, target: Tensor) -> None:
        """Copy it to memory of the host. Waits for this copy alone, where there are streams."""
        module = torch.get_device_module(self._data.device)
        if self._written is None:
            target.copy_(self._data)
            return
        side = module.Stream(self._data.device)
        with module.stream(side):
            side.wait_event(self._written)
            target.copy_(self._data)


def _stream(module: Any) -> Any:
    """What a device is given to do by this thread, if its module has streams."""
    current = getattr(module, "current_stream", None)
    return current() if current and hasattr(module, "Stream") else None


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, of the same shape and on the same device, in few steps."""
    alike: defaultdict[tuple[object, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for target, source in zip(targets, sources, strict=True):
        if not source.numel():  # the values of index keys
            continue
        alike[target.shape, target.device, source.device].append((target, source))
    for pairs in alike.values():
        outs, xs = zip(*pairs, strict=True)
        for out, x in together(outs, xs):
            out.copy_(x)


def together(outs: Sequence[Tensor], xs: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    """Pairs of tensors, as one pair with one dimension more if that is possible without a copy."""
    all_outs, all_xs = _stacked(outs), _stacked(xs)
    if all_outs is None or all_xs is None:
        return zip(outs, xs, strict=True)
    return [(all_outs, all_xs)]


def _stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """`[n, ...]`, a view of `n` tensors of one shape that lie in one memory at equal distances."""
    first = tensors[0]
    if len(tensors) == 1:
        return first[None]
    start, home = first.storage_offset(), first.untyped_storage().data_ptr()
    step = tensors[1].storage_offset() - start
    for number, tensor in enumerate(tensors):
        if (
            tensor.storage_offset() != start + number * step
            or tensor.untyped_storage().data_ptr() != home
            or tensor.shape != first.shape
            or tensor.stride() != first.stride()
            or tensor.dtype != first.dtype
        ):
            return None
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride())) if step else None
