"""Digest of a model's weights and adapters, and a cheap watch that tells when they may change.

Small models are hashed whole. Of the large tensors of large models an even sample is hashed: an
8-billion-parameter model takes a fraction of a second instead of many.

The watch looks at memory and version counter of each tensor, and at numbers in every row and every
column, since edits through `.data` leave no other trace.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd, isqrt
from typing import Any, cast

import numpy as np
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
# Up to this many bytes of weights the watch looks at every number (1 ms). Of larger models it looks
# at some in every row and column of each tensor, a part of them each time.
WATCHED_MODEL_BYTES = 8 << 20
PHASES = 4
LONGROPE, DYNAMIC = "longrope", "dynamic"
WATCHED_TENSOR = 1 << 10  # and at every number of a tensor of so many
_OF_NUMPY = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))

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
    lines: dict[str, bytes] = {}
    done: dict[int, dict[str, bytes]] = {}
    small = counts_whole(model)
    for path, module in model.named_modules():
        for name, held in [*module._parameters.items(), *module._buffers.items()]:
            place = f"{path}.{name}" if path else name
            if held is not None and id(held) not in done:
                done[id(held)] = {
                    part.removeprefix(name): f" {tuple(tensor.shape)} {tensor.dtype} ".encode()
                    + content(tensor.detach(), small or f"{path}.{part}".lstrip(".") in edited)
                    for part, tensor, _ in _plain(module, {name: _as_on_cpu(module, name, held)})
                }
            # Which place shares a tensor with which counts, too.
            lines |= {place + part: line for part, line in done.get(id(held), {}).items()}
    return hashlib.sha256(b"".join(n.encode() + lines[n] for n in sorted(lines))).hexdigest()


# A device may compute frequencies that are off by their last bits.
_FREQUENCY_ROUNDING = 2**-22


def _as_on_cpu(module: Any, name: str, held: Tensor) -> Tensor:
    """A tensor; of RoPE frequencies that a device has computed, those that the CPU computes.

    They are no weights, and would otherwise tell a model's device. What is off by more than their
    last bits counts as it is.
    """
    if held.device.type in ("cpu", "meta") or not name.endswith("inv_freq"):
        return held
    try:
        with torch.device("cpu"):
            mine: Tensor = getattr(type(module)(module.config), name)
        there = held.detach().cpu()
        is_same = there.dtype == mine.dtype and torch.allclose(
            there, mine, rtol=_FREQUENCY_ROUNDING, atol=0.0
        )
    except Exception:  # a class may be made in any way
        return held
    return mine if is_same else held


def _frequencies(module: Any, held: Tensor) -> Tensor | None:
    """What counts of a RoPE module's frequencies, which may be those of its last forward.

    With longrope, which are set anew in each, nothing. With dynamic NTK those of short prompts: the
    module goes back to them, and holds a tensor as the longest length while it has others.
    """
    kind = getattr(module, "rope_type", None)
    if kind == DYNAMIC and isinstance(module.max_seq_len_cached, Tensor):
        return cast(Tensor, module.original_inv_freq)
    return None if kind == LONGROPE else held


def counts_whole(model: nn.Module) -> bool:
    """Whether a model is small enough for every byte of its weights to be hashed."""
    return sum(tensor.nbytes for _, tensor in _tensors(model)) <= WHOLE_MODEL_BYTES


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
    """What a model's weights looked like: to be compared with what they look like later.

    Attributes:
        kinds: Place, type, shape and device of each tensor.
        memory: Storage, offset, strides and in-place version counter of each tensor, in the same
            order.
        pulses: xxh3-128 over some numbers of every tensor, by which of them it were.
        storages: Weak references to the storages by their addresses: as long as there is one,
            nothing else can come to have that address.
    """

    kinds: list[tuple[object, ...]]
    memory: list[tuple[object, ...]]
    pulses: dict[int, bytes]
    storages: dict[int, StorageWeakRef] = field(default_factory=dict, compare=False, repr=False)

    def is_like(self, before: Watched) -> bool:
        """Whether nothing was seen to change."""
        alike = self.kinds == before.kinds and self.memory == before.memory
        return alike and self.pulses.items() <= before.pulses.items()

    def edited_since(self, before: Watched) -> set[str]:
        """Names of tensors that may have other numbers now; `.to()` and `.half()` edit nothing."""
        if self.memory == before.memory and not self.is_like(before):
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


def watch(
    model: nn.Module,
    parts: Parts | None = None,
    phases: Iterable[int] = range(PHASES),
    before: Watched | None = None,
) -> Watched:
    """Look at a model's weights without reading them all: 5 ms for 300 tensors and one phase.

    Args:
        model: The model.
        parts: Its modules by path, for callers that have them.
        phases: Which of the numbers to look at.
        before: What was seen before, so that storages known from then need not be referred to anew.
    """
    kinds: list[tuple[object, ...]] = []
    memory: list[tuple[object, ...]] = []
    seen: dict[int, Tensor] = {}
    known = before.storages if before else {}
    storages: dict[int, StorageWeakRef] = {}
    for path, module in parts or model.named_modules():
        for table in filter(None, (module._parameters, module._buffers)):
            for name, tensor, elsewhere in _plain(module, table):
                kinds.append((path, name, tensor.dtype, tensor.shape, tensor.device))
                # Inference tensors have no version counter: an in-place change could not be
                # seen, so they never compare equal and are hashed again.
                version = object() if tensor.is_inference() else tensor._version
                # What is kept elsewhere is loaded anew each time: its numbers must do.
                place = None if elsewhere else (_storage(tensor, known, storages), version)
                memory.append((place, tensor.storage_offset(), tensor.stride()))
                if not tensor.is_meta and tensor.numel():
                    seen[id(tensor)] = tensor  # tied ones once
    tensors = list(seen.values())
    if sum(tensor.nbytes for tensor in tensors) <= WATCHED_MODEL_BYTES:
        phases = [-1]
    pulses = {phase: _pulse(tensors, phase) for phase in phases}
    return Watched(kinds, memory, pulses, storages)


@torch.no_grad()
def _pulse(tensors: list[Tensor], phase: int) -> bytes:
    """Digest of every fourth row and column of each tensor, or of all that a small model has."""
    samples: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        flat = tensor if tensor.is_contiguous() else _in_memory_order(tensor)
        size, stride, start = _picked(flat.shape, phase)
        samples[tensor.device, tensor.dtype].append(
            flat.as_strided(size, stride, flat.storage_offset() + start)
        )
    digest = xxhash.xxh3_128()
    away: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for (device, dtype), group in samples.items():
        if dtype is torch.bfloat16:  # which NumPy does not have
            group = [sample.view(torch.int16) for sample in group]
        if device.type == "cpu" and dtype in _OF_NUMPY:
            numbers = np.concatenate([sample.numpy() for sample in group])  # half torch.cat's time
            digest.update(numbers.data)
        elif device.type == "cpu":
            digest.update(torch.cat(group).view(torch.uint8).numpy().data)
        else:
            away[device].append(torch.cat(group).view(torch.uint8))
    for pieces in away.values():  # a copy from a device is waited for
        digest.update(torch.cat(pieces).cpu().numpy().data)
    return digest.digest()


@lru_cache(maxsize=4096)
def _picked(shape: torch.Size, phase: int) -> tuple[tuple[int], tuple[int], int]:
    """Of a tensor's numbers in memory how many to look at, how far apart, and the first."""
    count, step = shape.numel(), 1 if phase < 0 else _step(shape)
    start, stride = (0, 1) if step == 1 else (phase * step % count, PHASES * step)
    return (1 + (count - 1 - start) // stride,), (stride,), start


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The same numbers without gaps, not copied where they are only transposed."""
    turned = tensor.mT if tensor.dim() > 1 else tensor
    return turned if turned.is_contiguous() else tensor.contiguous()


def _step(shape: torch.Size) -> int:
    """From which number in memory to the next, so that each row and each column has one.

    At most a row long, so that none is passed over, and at most as long as there are rows, so that
    there are as many steps as columns; having no factor in common with a row's length, these end in
    all columns.
    """
    rows, columns = (1, *shape)[-2:]
    if shape.numel() <= WATCHED_TENSOR:
        return 1
    if min(rows, columns) == 1:
        return isqrt(shape.numel())  # no rows and columns to speak of: packed weights
    return next(step for step in range(min(rows, columns), 0, -1) if gcd(step, columns) == 1)


def _storage(
    tensor: Tensor, known: dict[int, StorageWeakRef], storages: dict[int, StorageWeakRef]
) -> int:
    """The address of the object that holds the tensor's memory, which is noted in `storages`.

    That object lives as long as it is referred to, weakly too; not so its memory, whose address
    alone may come to be another tensor's. What is still alive and has the address of a `known` one
    is that.
    """
    try:
        storage = tensor.untyped_storage()
        address: int = storage._cdata
        if address not in storages:
            reference = known.get(address) or StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            storages[address] = reference
        return address
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
        if tensor is not None and name == "inv_freq":
            tensor = _frequencies(module, tensor)
        if tensor is None:
            continue
        if type(tensor) is nn.Parameter and not tensor.is_meta:  # most are
            yield name, tensor, False
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
        for part in ("absmax", "code", "offset", "SCB"):
            scale = getattr(holder, part, None)
            if isinstance(scale, Tensor):
                yield f"{name}.{'nested.' if holder is nested else ''}{part}", scale


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


def content(tensor: Tensor, whole: bool = True) -> bytes:
    """xxh3-128 of the numbers of a tensor, or of a sample of a large one."""
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
