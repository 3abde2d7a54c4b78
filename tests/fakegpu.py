"""A simulated accelerator: the torch device `fakegpu`, in Python alone.

What a test on it finds out, and no test on the CPU can:

- *Where tensors are.* Its tensors are plain `torch.Tensor`s on another device: `.numpy()` and
  operations that mix them with the CPU's fail as CUDA's do.
- *What is copied, and who waits.* Each copy between host and device, and everything that makes the
  host wait, is counted with the line of code that caused it (`trace`).
- *What is read too early.* A copy that the device may do later (`non_blocking`, from or to pinned
  memory) is done as late as it may be: when something that comes after it in the order of its
  stream is computed, or somebody waits for it. New memory is full of NaN. So a wait that is missing
  shows as NaN, or as old numbers, every time.
- *What is timed wrongly.* Work may take the device time, which the host spends only where it waits
  (`device.seconds_per_number`).

How it works: device memory is memory of the host under another device's name (PrivateUse1, which
torch keeps for others). Any operation is the CPU's, called on CPU tensors over the same memory, so
results are those of the CPU to the last bit. Copies to and from the device are the exception: torch
asks for `_copy_from`, which is here.

It stands on internals of torch that have no promise, and was tested with `TESTED`. `install` says
so should they have moved. It stays installed until the process ends, and torch then takes it for
the machine's accelerator: see `tests/on_device.py`.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

NAME = "fakegpu"
TESTED = "2.13.0"  # release of torch
NAN = 0xFF  # a byte of new memory: all types of floating point read NaN, integers -1

aten = torch.ops.aten
_CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------- counting


@dataclass
class Trace:
    """What has happened so far, by kind, and by the line of code that asked for it.

    Kinds: `kernel` (also copies within the device), `h2d` and `d2h` (copies of the host to the
    device and back), and `wait` (the host waits for the device). Of the main thread alone: what
    threads in the background do is counted as `other h2d` and so on.
    """

    counts: Counter[str] = field(default_factory=Counter)
    nbytes: Counter[str] = field(default_factory=Counter)
    lines: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, kind: str, nbytes: int = 0) -> None:
        """Count something that happens now."""
        if threading.current_thread() is not threading.main_thread():
            kind = f"other {kind}"
        self.counts[kind] += 1
        self.nbytes[kind] += nbytes
        if not kind.endswith("kernel"):
            self.lines[kind, _line()] += 1

    def of(self, package: str, *kinds: str) -> int:
        """How many of these kinds a package has caused."""
        return sum(
            number
            for (kind, line), number in self.lines.items()
            if kind in kinds and line.startswith(f"{package}:")
        )

    def table(self) -> str:
        """All of it, for people."""
        rows = [f"{kind:12} {n:7} {self.nbytes[kind]:14,}" for kind, n in self.counts.items()]
        lines = sorted(self.lines.items(), key=lambda item: (item[0][0], -item[1]))
        return "\n".join(rows + [f"  {kind:12} {n:5}  {line}" for (kind, line), n in lines])


def _line() -> str:
    """Where in chunkcache, else in Transformers, else in a test we were called from."""
    frame, found = sys._getframe(2), {}
    while frame is not None and "chunkcache" not in found:
        path = Path(frame.f_code.co_filename)
        for folder in ("chunkcache", "transformers", "tests"):
            if folder in path.parts[-4:-1] and path.name != Path(__file__).name:
                found.setdefault(folder, f"{folder}: {'/'.join(path.parts[-2:])}:{frame.f_lineno}")
        frame = frame.f_back
    return next((found[f] for f in ("chunkcache", "transformers", "tests") if f in found), "")


trace = Trace()


@contextmanager
def counting() -> Iterator[Trace]:
    """What happens within this block alone."""
    global trace
    before, trace = trace, Trace()
    try:
        yield trace
    finally:
        trace = before


@dataclass
class Device:
    """How the device behaves.

    Attributes:
        seconds_per_number: How long it works at each number that a kernel gives. The host is not
            held up before it waits for the device.
        has_float64: Apple's has not.
        can_pin: Whether memory of the host may be pinned for it.
    """

    seconds_per_number: float = 0.0
    has_float64: bool = True
    can_pin: bool = True
    _done: float = 0.0  # when it will have done what it was given, in seconds of `monotonic`

    @property
    def done(self) -> float:
        """When all that it was given so far will be done."""
        return max(self._done, time.monotonic())

    def work(self, numbers: int) -> None:
        """It is given work."""
        if self.seconds_per_number:
            self._done = self.done + self.seconds_per_number * numbers

    def wait(self) -> None:
        """The host waits until all is done."""
        trace.note("wait")
        if self._done:
            time.sleep(max(0.0, self._done - time.monotonic()))


device = Device()

# ----------------------------------------------------------------------------------------- memory

_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]


class _DLTensor(ctypes.Structure):
    """A DLPack tensor with what manages it, and behind it the one number of its shape."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("size", ctypes.c_int64),
    ]


_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value
_HEAD = 256  # bytes before the data, more than a `_DLTensor` has
_PRIVATE_USE_1 = 12  # DLPack's name for it is kDLExtDev
_UINT = 1
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def _new_bytes(nbytes: int) -> Tensor:
    """New device memory as a flat uint8 tensor, the last user of which frees it.

    DLPack is torch's one way to hand over memory with its deleter, which is libc's `free`: so the
    description and the data are one block.
    """
    block = _libc.malloc(_HEAD + nbytes)
    ctypes.memset(block, 0, _HEAD)
    ctypes.memset(block + _HEAD, NAN, nbytes)
    head = _DLTensor.from_address(block)
    head.data, head.device_type, head.ndim = block + _HEAD, _PRIVATE_USE_1, 1
    head.type_code, head.bits, head.lanes = _UINT, 8, 1
    head.shape, head.size = block + _DLTensor.size.offset, nbytes
    head.deleter = _FREE
    return torch._C._from_dlpack(_capsule(block, b"dltensor", None))


def _set(tensor: Tensor, storage: Any, offset: int, size: Any, stride: Any) -> Tensor:
    """Let a device tensor be a view of this memory."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return aten.set_.source_Storage_storage_offset.redispatch(
        keys, tensor, storage, offset, list(size), list(stride)
    )


def _extent(size: Iterable[int], stride: Iterable[int]) -> int:
    """Numbers from the first to the last of a tensor, those between included."""
    steps = [(n - 1) * step for n, step in zip(size, stride, strict=True)]
    return 0 if 0 in size else 1 + sum(steps)


def _new(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    """A new device tensor."""
    if dtype is torch.float64 and not device.has_float64:
        raise TypeError(f"Cannot convert to float64: the device {NAME} does not support it")
    memory = _new_bytes(_extent(size, stride) * dtype.itemsize)
    tensor = torch._C._acc.create_empty_tensor([0], dtype)
    return _set(tensor, memory.untyped_storage(), 0, size, stride)


def _seen(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of a device tensor, for a kernel that works on it now."""
    storage, host = tensor.untyped_storage(), torch.empty(0, dtype=tensor.dtype)
    if not storage.nbytes():
        return host.new_empty(tensor.shape)
    memory = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), _CPU, storage.nbytes()
    )
    return host.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


def _is_here(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


# ----------------------------------------------------------------------------------------- streams


class Stream:
    """Work that is done in order. Only what the device may do later waits in `queue`."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.queue: deque[Callable[[], None]] = deque()

    def run(self) -> None:
        """Do all that waits."""
        with _LOCK:
            while self.queue:
                self.queue.popleft()()

    def synchronize(self) -> None:
        """The host waits."""
        device.wait()
        self.run()

    def wait_event(self, event: Event) -> None:
        """What comes now comes after the event."""
        self.queue.append(event.reach)

    def wait_stream(self, other: Stream) -> None:
        """What comes now comes after all that the other has been given."""
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        """An event that happens when all that was given is done."""
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether all is done."""
        return not self.queue and device.done <= time.monotonic()


class Event:
    """A moment in the work of a stream."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._timed, self._stream = enable_timing, None
        self._passed, self._time = True, 0.0

    def record(self, stream: Stream | None = None) -> None:
        """It happens when the stream has done what it was given."""
        self._stream = stream or current_stream()
        self._passed, self._time = not self._stream.queue, device.done
        if not self._passed:
            self._stream.queue.append(self._pass)

    def _pass(self) -> None:
        self._passed = True

    def reach(self) -> None:
        """Do all that comes before."""
        with _LOCK:
            while not self._passed:
                self._stream.queue.popleft()()

    def wait(self, stream: Stream | None = None) -> None:
        """What comes now on the stream comes after this."""
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        """The host waits."""
        trace.note("wait")
        time.sleep(max(0.0, self._time - time.monotonic()))
        self.reach()

    def query(self) -> bool:
        """Whether it has happened."""
        return self._passed and self._time <= time.monotonic()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to that one."""
        if not (self._timed and end._timed and self.query() and end.query()):
            raise RuntimeError("Both events must be completed and have timing enabled")
        return 1e3 * (end._time - self._time)


_LOCK = threading.RLock()
_LOCAL = threading.local()
_DEFAULT = Stream()
_PINNED: set[int] = set()  # where pinned memory begins; it is never given back
_KEPT: list[Tensor] = []


def current_stream(device: Any = None) -> Stream:
    """The stream of this thread."""
    return getattr(_LOCAL, "stream", _DEFAULT)


def is_pinned(tensor: Tensor, device: Any = None) -> bool:
    """Whether memory of the host is pinned."""
    return tensor.untyped_storage().data_ptr() in _PINNED


def pin(tensor: Tensor, device_: Any = None) -> Tensor:
    """A copy in pinned memory."""
    if not device.can_pin:
        raise RuntimeError(f"memory cannot be pinned for {NAME}")
    copy = tensor.clone(memory_format=torch.contiguous_format)
    _PINNED.add(copy.untyped_storage().data_ptr())
    _KEPT.append(copy)
    return copy


# ----------------------------------------------------------------------------------------- kernels

# Their results have as many numbers as the data say, or are numbers of Python: the host waits.
_WAITS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
# CUDA takes indices that lie on the host, and brings them over.
_TAKES_HOST_INDEX = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# A tensor of one number that lies on the host is taken as a number, but not by these.
_TAKES_NO_NUMBER = {
    "aten::addmm",
    "aten::baddbmm",
    "aten::bmm",
    "aten::embedding",
    "aten::gather",
    "aten::index_add",
    "aten::index_add_",
    "aten::index_copy",
    "aten::index_copy_",
    "aten::index_fill_",
    "aten::index_select",
    "aten::mm",
    "aten::scatter",
    "aten::scatter_",
    "aten::take",
}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _check_places(name: str, every: list[Tensor], args: tuple[Any, ...]) -> None:
    """Refuse what CUDA refuses: tensors of the host among those of the device."""
    host = [tensor for tensor in every if not _is_here(tensor)]
    if len(host) == len(every):
        return
    for tensor in host:
        if tensor.dim() == 0 and name not in _TAKES_NO_NUMBER:
            continue
        if name in _TAKES_HOST_INDEX and any(tensor is index for index in _tensors(args[1])):
            trace.note("h2d", tensor.nbytes)
            device.wait()
            continue
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{NAME}:0 and {tensor.device}! (in {name})"
        )


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation that has no function of its own here: the CPU's, over the same memory."""
    _check_places(op._schema.name, [*_tensors(args), *_tensors(tuple(kwargs.values()))], args)
    trace.note("kernel")
    if (stream := current_stream()).queue:
        stream.run()
    if op._schema.name in _WAITS:
        device.wait()
    pairs: list[tuple[Tensor, Tensor]] = []  # ours, and the CPU's over the same memory

    def host(value: Any) -> Any:
        if _is_here(value):
            for ours, its in pairs:
                if ours is value:
                    return its
            pairs.append((value, _seen(value)))
            return pairs[-1][1]
        if isinstance(value, (list, tuple)):
            return type(value)([host(item) for item in value])
        return _CPU if isinstance(value, torch.device) and value.type == NAME else value

    def here(value: Any) -> Any:
        if isinstance(value, Tensor):
            same = [ours for ours, its in pairs if its is value]
            return same[0] if same else _result(value, pairs)
        return type(value)([here(v) for v in value]) if isinstance(value, (list, tuple)) else value

    call = op
    for argument, value in zip(op._schema.arguments, args, strict=False):
        if isinstance(value, (bool, int, float)) and str(argument.type) == "Tensor":
            call = op.overloadpacket  # torch had made a tensor of a number, and gives us the number
    with torch._C._AutoDispatchBelowAutograd():
        out = call(*map(host, args), **{name: host(value) for name, value in kwargs.items()})
    for ours, its in pairs:
        if its.shape != ours.shape or its.stride() != ours.stride():  # out= was resized
            new = _result(its, [])
            _set(ours, new.untyped_storage(), 0, its.shape, its.stride())
    result = here(out)
    if device.seconds_per_number:
        device.work(sum(tensor.numel() for tensor in _tensors(result)))
    return result


def _result(value: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What a CPU kernel gave, as a device tensor: a view of an argument, or memory of its own."""
    memory = value.untyped_storage().data_ptr()
    for ours, _ in pairs:
        if memory and ours.untyped_storage().data_ptr() == memory:
            if ours.dtype != value.dtype:  # a complex number as two
                new = torch._C._acc.create_empty_tensor([0], value.dtype)
                offset = value.storage_offset()
                return _set(new, ours.untyped_storage(), offset, value.shape, value.stride())
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            return aten.as_strided.default.redispatch(
                keys, ours, value.shape, value.stride(), value.storage_offset()
            )
    out = _new(value.shape, value.stride(), value.dtype)
    if value.numel():
        _seen(out).copy_(value)
    return out


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """All copies with the device at one end or at both."""
    source, stream = source.expand(target.shape), current_stream()
    if _is_here(source) and _is_here(target):
        trace.note("kernel")
        if stream is _DEFAULT:
            stream.run()
            _seen(target).copy_(_seen(source))
        else:  # as late as may be
            stream.queue.append(partial(_late, _seen(target), _seen(source), (source, target)))
        return target
    host, ours = (source, target) if _is_here(target) else (target, source)
    trace.note("h2d" if ours is target else "d2h", target.nbytes)
    straight = host.is_contiguous() and ours.is_contiguous() and host.dtype == ours.dtype
    if non_blocking and straight and is_pinned(host):
        ends = (_seen(target), host) if ours is target else (host, _seen(source))
        kept = source, target  # which own the memory
        stream.queue.append(partial(_late, *ends, kept))
        return target
    device.wait()
    stream.run()
    with torch._C._AutoDispatchBelowAutograd():
        (_seen(target) if ours is target else target).copy_(
            source if ours is target else _seen(source)
        )
    return target


def _late(target: Tensor, source: Tensor, kept: object) -> None:
    """A copy that had waited in a stream."""
    target.copy_(source)


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    like = _laid_out(size, memory_format, dtype)
    return _new(like.shape, like.stride(), like.dtype)


def _laid_out(size: Any, memory_format: Any, dtype: Any = None) -> Tensor:
    return torch.empty(
        size,
        dtype=dtype,
        device="meta",
        memory_format=memory_format or torch.contiguous_format,
    )


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return _new(size, stride, dtype or torch.get_default_dtype())


def _resize_(tensor: Tensor, size: Any, *, memory_format: Any = None) -> Tensor:
    like, storage, offset = _laid_out(size, memory_format), tensor.untyped_storage(), 0
    offset = tensor.storage_offset()
    nbytes = (offset + _extent(like.shape, like.stride())) * tensor.dtype.itemsize
    if nbytes > storage.nbytes():
        storage = _grown(storage, nbytes)
    return _set(tensor, storage, offset, like.shape, like.stride())


def _grown(storage: Any, nbytes: int) -> Any:
    """A copy of device memory, of at least its size."""
    new = _new_bytes(nbytes).untyped_storage()
    if storage.nbytes():
        ctypes.memmove(new.data_ptr(), storage.data_ptr(), storage.nbytes())
    return new


def _convolution(*args: Any) -> Tensor:
    """Torch asks devices of others for this one by another name."""
    return _kernel(aten.convolution.default, *args)


def _histc(tensor: Tensor, bins: int = 100, min: Any = 0, max: Any = 0) -> Tensor:
    """Counts integers, too, as CUDA's does and the CPU's does not."""
    counts = _kernel(aten.histc.default, tensor.float(), bins, min, max)
    return counts if tensor.is_floating_point() else counts.to(tensor.dtype)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    return _kernel(aten.scaled_dot_product_attention.default, *args, **kwargs)


def _view(op: Any) -> Callable[..., Any]:
    """Operations that compute nothing: those of the CPU, on our tensor as it is."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return lambda *args, **kwargs: op.redispatch(keys, *args, **kwargs)


_VIEWS = {
    "as_strided": aten.as_strided.default,
    "view": aten.view.default,
    "_reshape_alias": aten._reshape_alias.default,
    "unfold": aten.unfold.default,
    "set_.source_Storage": aten.set_.source_Storage,
    "set_.source_Storage_storage_offset": aten.set_.source_Storage_storage_offset,
    "set_.source_Tensor": aten.set_.source_Tensor,
}
_OWN: dict[str, Callable[..., Any]] = {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "resize_": _resize_,
    "_copy_from": _copy_from,
    "histc": _histc,
    "convolution_overrideable": _convolution,
    "scaled_dot_product_attention": _attention,
    **{name: _view(op) for name, op in _VIEWS.items()},
}


class _Module:
    """`torch.fakegpu`, as `torch.cuda` is of CUDA."""

    Stream, Event = Stream, Event
    current_stream = staticmethod(current_stream)
    default_stream = staticmethod(lambda device=None: _DEFAULT)
    synchronize = staticmethod(lambda device=None: current_stream().synchronize())
    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    set_device = staticmethod(lambda device: None)
    manual_seed = manual_seed_all = staticmethod(lambda seed: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])

    @staticmethod
    @contextmanager
    def stream(stream: Stream) -> Iterator[None]:
        """What this thread gives the device goes to that stream."""
        before, _LOCAL.stream = current_stream(), stream
        try:
            yield
        finally:
            _LOCAL.stream = before


_LIBRARIES: list[Library] = []


def install() -> None:
    """Register the device, once per process.

    Raises:
        RuntimeError: The internals of torch that this stands on have moved.
    """
    if _LIBRARIES:
        return
    try:
        _install()
        there = torch.arange(6.0).to(NAME)
        works = there.device.type == NAME and (there * 2).cpu().tolist() == [0, 2, 4, 6, 8, 10]
    except Exception as error:
        raise RuntimeError(_moved()) from error
    if not works:
        raise RuntimeError(_moved())


def _moved() -> str:
    return (
        f"the simulated device stands on internals of torch {TESTED}, and in torch "
        f"{torch.__version__} they have moved: adapt tests/fakegpu.py"
    )


def _install() -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    every, some = Library("_", "IMPL"), Library("aten", "IMPL")
    _LIBRARIES.extend([every, some])
    every.fallback(_kernel, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # computes as it is
    for name, function in _OWN.items():
        some.impl(name, function, "PrivateUse1")
    some.impl("is_pinned", is_pinned, "CPU")
    some.impl("_pin_memory", pin, "CPU")

    # Two that torch has done by an allocator, which cannot be written in Python: the memory of a
    # tensor that is copied by `copy.deepcopy`, and pinned memory.
    usual_clone, usual_empty = torch.UntypedStorage.clone, torch.empty

    def clone(storage: Any) -> Any:
        is_here = storage.device.type == NAME
        return _grown(storage, storage.nbytes()) if is_here else usual_clone(storage)

    def empty(*size: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        new = usual_empty(*size, **kwargs)
        return pin(new) if pin_memory else new

    for function in (clone, empty):
        function.__module__ = "torch"  # as part of which a model's identity sees them
    torch.UntypedStorage.clone, torch.empty = clone, empty
