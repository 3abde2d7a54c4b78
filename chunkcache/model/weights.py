"""Digest of a model's weights and adapters, and a cheap watch that tells when they may change.

Small models are hashed whole. Of the large tensors of large models an even sample is hashed: an
8-billion-parameter model takes a fraction of a second instead of many.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from chunkcache.model.ranks import local

# Up to this many bytes of weights every byte counts (about 0.4 s at memory speed).
WHOLE_MODEL_BYTES = 4 << 30
# Tensors up to this size count whole in any case: norms and biases, the usual targets of edits.
WHOLE_TENSOR_BYTES = 1 << 20
SAMPLED_RUNS = 1024
SAMPLED_RUN_BYTES = 64
PULSE = 4  # numbers of each tensor that the watch looks at

Parts = list[tuple[str, nn.Module]]


def digest_weights(model: nn.Module, edited: Collection[str] = ()) -> str:
    """SHA-256 over name, shape, dtype and content of every parameter and buffer (64 hex digits).

    The content of each tensor enters through xxh3-128: fast, and against mistakes, not against
    somebody who forges weights. What accelerate has offloaded is read where it is, and quantised
    weights count with their scales. What cannot be read (of a foreign kind) enters as random bytes:
    such a model shares with nobody.

    Args:
        model: The model.
        edited: Names of tensors that were seen to change in this process. They are hashed whole,
            since an edit can be smaller than the gaps of a sample.
    """
    small = sum(t.nbytes for _, t in _tensors(model)) <= WHOLE_MODEL_BYTES
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(model), key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(_content(tensor.detach(), small or name in edited))
    return digest.hexdigest()


def digest_adapters(model: nn.Module) -> str:
    """State of PEFT layers: which adapters are active, merged, disabled, and how they are scaled.

    Their weights are parameters of the model and count there.
    """
    lines = [
        f"{name} {_adapter_state(module)}"
        for name, module in model.named_modules()
        if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters")
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else "none"


@dataclass(frozen=True)
class Watched:
    """What a model looked like: to be compared with what it looks like later.

    Attributes:
        kinds: Place, type, shape and device of each tensor.
        memory: Storage, offset and in-place version counter of each tensor, in the same order.
        pulse: A few numbers of every tensor, since edits through `.data` leave no other trace.
        adapters: State of PEFT layers.
    """

    kinds: list[tuple[object, ...]]
    memory: list[tuple[object, ...]]
    pulse: bytes
    adapters: list[str]

    def edited_since(self, before: Watched) -> set[str]:
        """Names of tensors that may have other numbers now; `.to()` and `.half()` edit nothing."""
        if self.pulse != before.pulse and self.memory == before.memory:
            return {_name(kind) for kind in self.kinds}
        then = dict(zip(before.kinds, before.memory, strict=True))
        return {
            _name(kind)
            for kind, memory in zip(self.kinds, self.memory, strict=True)
            if kind in then and then[kind] != memory
        }


def _name(kind: tuple[object, ...]) -> str:
    path, name, *_ = kind
    return f"{path}.{name}" if path else str(name)


def watch(model: nn.Module, parts: Parts | None = None) -> Watched:
    """Look at a model without reading it all: 2 ms for 300 tensors.

    `parts` are its modules by path, for callers that have them.
    """
    kinds: list[tuple[object, ...]] = []
    memory: list[tuple[object, ...]] = []
    adapters: list[str] = []
    samples: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for path, module in parts or model.named_modules():
        if hasattr(module, "merged_adapters"):
            adapters.append(f"{path} {_adapter_state(module)}")
        for table in (module._parameters, module._buffers):
            for name, tensor, elsewhere in _plain(module, table):
                dtype, device = tensor.dtype, tensor.device
                kinds.append((path, name, dtype, tensor.shape, device))
                # Inference tensors have no version counter: an in-place change could not be
                # seen, so they never compare equal and are hashed again.
                version = object() if tensor.is_inference() else tensor._version
                # What is kept elsewhere is loaded anew each time: its numbers must do.
                place = None if elsewhere else (_storage(tensor), version)
                memory.append((place, tensor.storage_offset()))
                count = min(PULSE, tensor.numel())
                if count and not tensor.is_meta and tensor.is_contiguous():
                    step = tensor.numel() // count
                    samples[device, dtype].append(tensor.detach().as_strided((count,), (step,)))
    pulse = b"".join(
        torch.cat(group).double().cpu().numpy().tobytes() for group in samples.values()
    )
    return Watched(kinds, memory, pulse, adapters)


def _storage(tensor: Tensor) -> object:
    """The tensor's memory. A weak reference: an address alone may come to hold another tensor."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (RuntimeError, NotImplementedError):
        return tensor.data_ptr()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            new = {name: t for name, t in table.items() if t is not None and id(t) not in seen}
            seen |= {id(tensor) for tensor in new.values()}
            for name, tensor, _ in _plain(module, new):
                yield f"{path}.{name}" if path else name, tensor


def _plain(
    module: nn.Module, table: Mapping[str, Tensor | None]
) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, plain tensor, and whether it is kept elsewhere, of all that a module computes with."""
    for name, tensor in table.items():
        if tensor is None:
            continue
        elsewhere = tensor.is_meta
        held = _offloaded(module, name) if elsewhere else tensor
        for part, plain in _unwrapped(module, name, held):
            yield part, plain, elsewhere


def _unwrapped(module: nn.Module, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a quantised one stands for: numbers alone say nothing without scales.

    torchao and quanto wrap them, in PyTorch's protocol for that; bitsandbytes keeps scales in
    attributes of the weight, or in 8 bits, after the first forward, of its module.
    """
    tensor = local(tensor)
    if is_traceable_wrapper_subclass(tensor):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _unwrapped(module, f"{name}.{inner}", getattr(tensor, inner))
        return
    yield name, tensor
    if type(tensor) in (Tensor, nn.Parameter):
        return
    state = getattr(tensor, "quant_state", None)
    nested = getattr(state, "state2", None)
    for holder in (state, nested, tensor, getattr(module, "state", None)):
        for field in ("absmax", "code", "offset", "SCB"):
            scale = getattr(holder, field, None)
            if isinstance(scale, Tensor):
                yield f"{name}.{'nested.' if holder is nested else ''}{field}", scale


def _offloaded(module: Any, name: str) -> Tensor:
    """A weight that accelerate keeps elsewhere, in memory or on disk, until it is needed."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        weights = getattr(part, "weights_map", None)
        if weights is not None and name in weights:
            weight: Tensor = weights[name]
            return weight
    return torch.empty(0, device="meta")


def _adapter_state(module: Any) -> str:
    state = {
        name: getattr(module, name, None)
        for name in ("active_adapters", "merged_adapters", "disable_adapters", "scaling")
    }
    return repr(state)


def _content(tensor: Tensor, whole: bool) -> bytes:
    if tensor.is_meta:
        return os.urandom(16)
    try:
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        if not whole and data.numel() > WHOLE_TENSOR_BYTES:
            step = data.numel() // SAMPLED_RUNS
            starts = torch.arange(SAMPLED_RUNS, device=data.device) * step
            inside = torch.arange(SAMPLED_RUN_BYTES, device=data.device)
            data = data[(starts[:, None] + inside).reshape(-1)]
        return xxhash.xxh3_128_digest(data.cpu().numpy().data)
    except (RuntimeError, NotImplementedError, TypeError):
        return os.urandom(16)  # a tensor subclass without plain memory
