"""Values: what a model computes with besides its weights, written down so that processes agree.

Numbers, tensors and containers are told by content. Functions and classes of the libraries that the
rest of an identity names are told by name; all others by what they consist of: their bytecode, with
the constants, closures and globals that it uses. Addresses, paths and devices never enter.
"""

from __future__ import annotations

import dis
import hashlib
import json
import sys
import uuid
import weakref
from collections import deque
from enum import Enum
from functools import cached_property, lru_cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedConfig

from chunkcache.model.weights import content

# Libraries whose functions are what their names say, unless somebody has put others in their place.
LIBRARIES = frozenset(("accelerate", "bitsandbytes", "peft", "torch", "torchao", "transformers"))
ATOMS = frozenset((bool, bytes, complex, float, int, str, type(None), torch.dtype, torch.Size))
_BUILTIN = (BuiltinFunctionType, type(str.join), type(object.__init__), type(Tensor.add))
_MODULE = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
# Parts of a configuration that say where a model came from or how outputs are returned, not what
# its K/V are.
_INERT = frozenset(
    (
        "_name_or_path",
        "architectures",
        "dtype",  # each tensor's own counts, with the weights
        "finetuning_task",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)
_DEPTH = 5  # of objects within objects
_LARGE = 1 << 16  # bytes from which a tensor is read again only when it seems to have changed
_LONGEST = 512  # items of a container that are not plain


class Values:
    """Describes values, one line for each part of them that may change by itself.

    Attributes:
        lines: What was described, by where it was found.
        strange: Whether there was code among it that is of none of the libraries.
        reached: All Python functions among it, for whoever wants to know what these use.
    """

    def __init__(self, known: dict[int, str]) -> None:
        """`known` are names for objects by id, such as the model's modules."""
        self.lines: dict[str, object] = {}
        self.strange = False
        self.reached: list[FunctionType] = []
        self._known = known
        self._met: dict[int, tuple[str, object]] = {}

    def let_go(self) -> None:
        """Keep what was written, and nothing that was described."""
        self.reached.clear()
        self._met.clear()

    def add(self, key: str, value: Any, depth: int = _DEPTH) -> None:
        """Describe a value under this key, and its parts under keys that begin with it."""
        kind = type(value)
        if kind in ATOMS:
            self.lines[key] = value
        elif id(value) in self._known:
            self.lines[key] = self._known[id(value)]
        elif isinstance(value, Tensor):
            self.lines[key] = _tensor(value)
        elif kind is torch.device or isinstance(value, (torch.Generator, weakref.ref)):
            self.lines[key] = kind.__name__
        elif isinstance(value, ModuleType):
            self.lines[key] = value.__name__
        elif isinstance(value, PreTrainedConfig):
            self.lines[key] = settings(value), value._attn_implementation
        elif isinstance(value, Enum):
            self.lines[key] = f"{_path(kind)}.{value.name}"
        elif is_builtin(value):
            self.lines[key] = f"{getattr(value, '__module__', '')}.{value.__qualname__}"
        elif id(value) in self._met:
            self.lines[key] = f"as {self._met[id(value)][0]}"
        else:
            self._met[id(value)] = key, value
            self._add_parts(key, value, depth)

    def _add_parts(self, key: str, value: Any, depth: int) -> None:
        kind = type(value)
        parts: dict[str, Any]
        if isinstance(value, FunctionType):
            parts = self._function(key, value)
        elif isinstance(value, type):
            parts = self._class(key, value)
        elif isinstance(value, MethodType):
            self.lines[key] = "method"
            parts = {".function": value.__func__, ".self": value.__self__}
        elif isinstance(value, partial):
            self.lines[key] = "partial"
            parts = {".function": value.func, ".args": value.args, ".keywords": value.keywords}
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            if all(type(item) in ATOMS for item in value):
                items = tuple(value) if isinstance(value, (list, tuple, deque)) else _sorted(value)
                self.lines[key] = kind.__name__, items
                return
            self.lines[key] = kind.__name__, len(value)
            parts = {f"[{n}]": item for n, item in enumerate(value)} if _has_order(value) else {}
        elif isinstance(value, dict):
            self.lines[key] = kind.__name__, len(value)
            parts = {f"[{name!r}]": v for name, v in value.items() if type(name) in ATOMS}
        elif root(kind.__module__) in LIBRARIES and not isinstance(value, nn.Module):
            self.lines[key] = _path(kind)  # its inner life is the library's
            return
        else:
            self.add(f"{key}.class", kind, depth)
            parts = {f".{name}": item for name, item in _vars(value).items()}
            if isinstance(value, nn.Module):
                parts = {name: part for name, part in parts.items() if name[1:] not in _MODULE}
            if not parts and not is_known(kind.__module__):
                self.lines[key] = private_name(value)
        if depth == 0 or len(parts) > _LONGEST:
            self.lines[f"{key}…"] = private_name(value) if parts else ""
            return
        for name, part in parts.items():
            self.add(key + name, part, depth - 1)

    def _function(self, key: str, function: FunctionType) -> dict[str, Any]:
        """Describe a function. Returns what it depends on."""
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        parts = {f".{name}": _content_of(cell) for name, cell in cells}
        self.reached.append(function)
        if is_library(function):
            self.lines[key] = home(function)
            return parts
        self.strange = True
        self.lines[key] = hashlib.sha256(repr(_bytecode(function.__code__)).encode()).hexdigest()
        return parts | {"()": function.__defaults__, "(**)": function.__kwdefaults__}

    def _class(self, key: str, kind: type) -> dict[str, Any]:
        """Describe a class. Returns what it consists of, where its name does not say it."""
        self.lines[key] = _path(kind)
        if is_known(kind.__module__):
            return {}
        parts = {
            f".{name}": value
            for name, item in vars(kind).items()
            for value in (function_in(item),)
            if isinstance(value, FunctionType) or (type(value) in ATOMS and name[:2] != "__")
        }
        return parts | {f"<{n}>": base for n, base in enumerate(kind.__bases__)}


def settings(config: PreTrainedConfig) -> str:
    """All settings that can shape a model's K/V, as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items() if k not in _INERT}
        return value

    return json.dumps(plain(config.to_dict()), sort_keys=True, default=str)


def function_in(item: Any) -> Any:
    """The function in an entry of a class, without what makes it a property or the like."""
    if isinstance(item, (staticmethod, classmethod)):
        return item.__func__
    if isinstance(item, property):
        return item.fget
    return item.func if isinstance(item, cached_property) else item


def root(module: object) -> str:
    """The package that a module of this name is in."""
    return str(module).partition(".")[0]


def is_known(module: object) -> bool:
    """Whether a module of this name is one of the libraries', or of Python's own."""
    return root(module) in LIBRARIES or root(module) in sys.stdlib_module_names


def is_library(function: FunctionType) -> bool:
    """Whether the code of a function stands in a file of one of the libraries, or of Python's."""
    module = function.__globals__.get("__name__")
    if not is_known(module):
        return False
    place = str(module).replace(".", "/")
    file = function.__code__.co_filename.replace("\\", "/")
    return file.endswith((f"{place}.py", f"{place}/__init__.py")) or file.startswith("<frozen ")


def is_builtin(function: Any) -> bool:
    """Whether it is written in another language than Python."""
    return isinstance(function, _BUILTIN)


def home(function: FunctionType) -> str:
    """Where a function of a library was defined, as `module.class.name`."""
    return f"{function.__globals__['__name__']}.{function.__code__.co_qualname}"


def layers_of(function: Any) -> list[Any]:
    """A function, and what it wraps, down to the innermost. Not our own, which changes no bits."""
    scope = getattr(function, "__globals__", {})
    if root(scope.get("__name__")) == "chunkcache":
        function = getattr(function, "__wrapped__", function)
    layers = [function]
    while True:
        if isinstance(function, MethodType):
            function = function.__func__
        elif isinstance(function, partial):
            layers.append(function.func)
            function = getattr(function, "__wrapped__", None)
        else:
            inner = getattr(function, "__wrapped__", None)
            cells = getattr(function, "__closure__", None) or ()
            function = inner if any(_content_of(cell) is inner for cell in cells) else None
        if function is None:
            return layers
        layers.append(function)


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """All names that a piece of code looks up, in whatever, also in functions within it."""
    return frozenset(code.co_names).union(*map(names_in, _inner(code)))


@lru_cache(maxsize=4096)
def globals_in(code: CodeType) -> frozenset[str]:
    """The global names among them."""
    loads = (
        i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    )
    return frozenset(loads).union(*map(globals_in, _inner(code)))


def _inner(code: CodeType) -> list[CodeType]:
    return [const for const in code.co_consts if isinstance(const, CodeType)]


def _bytecode(code: CodeType) -> tuple[object, ...]:
    consts = [_bytecode(c) if isinstance(c, CodeType) else _constant(c) for c in code.co_consts]
    return (code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_flags, consts)


def _constant(value: Any) -> object:
    if isinstance(value, frozenset):
        return _sorted(value)
    return tuple(map(_constant, value)) if isinstance(value, tuple) else value


def _sorted(values: Any) -> tuple[str, ...]:
    return tuple(sorted(map(repr, values)))


def _has_order(value: Any) -> bool:
    return not isinstance(value, (set, frozenset))


def _tensor(tensor: Tensor) -> object:
    what = str(tensor.dtype), tuple(tensor.shape)
    if tensor.is_meta:
        return what
    if tensor.nbytes <= _LARGE or tensor.is_inference():
        return *what, content(tensor.detach())
    now = tensor._version, tensor.data_ptr()
    before = _LARGE_TENSORS.get(tensor)
    if before is None or before[0] != now:
        before = _LARGE_TENSORS[tensor] = now, content(tensor.detach())
    return *what, before[1]


def _content_of(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _vars(value: Any) -> dict[str, Any]:
    slots = {
        n: getattr(value, n) for n in getattr(type(value), "__slots__", ()) if hasattr(value, n)
    }
    return slots | getattr(value, "__dict__", {})


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def private_name(value: Any) -> str:
    """A random name for what cannot be read: the same in this process, and in no other."""
    try:
        return _PRIVATE.setdefault(value, uuid.uuid4().hex)
    except TypeError:  # cannot be referred to weakly, or has no hash
        return _path(type(value))


_PRIVATE: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_LARGE_TENSORS: Any = WeakTensorKeyDictionary()
