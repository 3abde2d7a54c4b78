"""Code: which functions a model runs, and whether one was put where another was defined.

A class's method, a function of a modelling module, a registered attention function: who replaces
one changes what the model computes, and touches no weight. From the classes of the modules all
functions of the libraries that they use are followed by name. One that stands where it was defined
says nothing; any other is described.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from chunkcache.model.values import (
    ATOMS,
    Values,
    function_in,
    globals_in,
    home,
    is_builtin,
    is_known,
    is_library,
    layers_of,
    names_in,
    root,
)

# The machinery around a model: what it calls is not the model.
_MACHINERY = frozenset((*PreTrainedModel.__mro__, *GenerationMixin.__mro__))
_NOT_RUN = frozenset(("__init__", "__init_subclass__", "_init_weights", "extra_repr"))
_INTERFACES = (AttentionInterface, AttentionMaskInterface)
_LARGEST_TABLE = 256  # a larger dictionary is no table of functions


class Reach:
    """What the code of some classes can reach, described where it is not as it was defined."""

    def __init__(
        self,
        values: Values,
        classes: Collection[type],
        attention: Collection[str],
        functions: Collection[FunctionType] = (),
    ) -> None:
        """`attention` are the implementations in use, `functions` are reached in another way."""
        self._values = values
        self._attention = attention
        self._seen: dict[tuple[int, str], tuple[Mapping[str, Any], object]] = {}
        self._functions: dict[FunctionType, tuple[object, ...]] = {}
        self._sizes: list[tuple[type, int]] = []
        self._open = list(functions)
        bases = {base for kind in classes for base in kind.__mro__} - _MACHINERY
        for base in sorted(bases, key=_path):
            self._add_class(base)
        for name, function in vars(nn.Module).items():
            self._add_if_strange(vars(nn.Module), name, f"{_path(nn.Module)}.{name}", function)
        while self._open or values.reached:
            self._open += [f for f in values.reached if root(f.__module__) != "torch"]
            values.reached.clear()
            if self._open:
                self._follow(self._open.pop())

    def is_unchanged(self) -> bool:
        """Whether all is where it was. What is strange may have changed within all the same."""
        return (
            all(scope.get(name) is item for (_, name), (scope, item) in self._seen.items())
            and all(_body(function) == body for function, body in self._functions.items())
            and all(len(vars(kind)) == size for kind, size in self._sizes)
        )

    def _look(self, scope: Mapping[str, Any], name: str) -> bool:
        """Take note of what is there. False if it was seen before."""
        is_new = (id(scope), name) not in self._seen
        if is_new:
            self._seen[id(scope), name] = scope, scope.get(name)
        return is_new

    def _add_class(self, kind: type) -> None:
        entries = vars(kind)
        self._sizes.append((kind, len(entries)))
        if not is_known(kind.__module__):
            self._values.add(_path(kind), kind)
            return
        for name, item in entries.items():
            function = function_in(item)
            if name in _NOT_RUN or isinstance(function, type):
                continue
            if callable(function):
                self._look(entries, name)
                self._add(f"{_path(kind)}.{name}", name, function, follow=True)
            elif type(item) in ATOMS and name[:1] != "_":
                self._look(entries, name)
                self._values.add(f"{_path(kind)}.{name}", item)

    def _add(self, place: str, name: str, function: Any, follow: bool) -> None:
        """Describe what can be called at a place, unless it was defined there."""
        layers = [f for f in layers_of(function) if isinstance(f, FunctionType)]
        inner = layers_of(function)[-1]
        if is_builtin(inner) and inner.__name__ == name:
            return
        if not all(map(is_library, layers)) or inner not in layers or home(inner) != place:
            self._values.add(place, function)
        if follow:
            self._open += layers

    def _follow(self, function: FunctionType) -> None:
        """Look at all that a function may use by name."""
        place = function.__globals__.get("__name__")
        if function in self._functions or root(place) in sys.stdlib_module_names:
            return
        self._functions[function] = _body(function)
        names = names_in(function.__code__)
        scopes = [function.__globals__]
        for scope in scopes:
            used = names if scopes[1:] and scope is not scopes[0] else globals_in(function.__code__)
            for name in sorted(used & scope.keys()):
                value = scope[name]
                if type(value).__module__ == "torch._ops":
                    continue  # operators, which come into being when they are first used
                if isinstance(value, ModuleType):
                    if not any(vars(value) is known for known in scopes):
                        scopes.append(vars(value))
                elif self._look(scope, name):
                    self._use(scope.get("__name__"), name, value)
        for name in sorted(names & vars(Tensor).keys()):
            self._add_if_strange(vars(Tensor), name, f"torch.Tensor.{name}", vars(Tensor)[name])

    def _use(self, module: object, name: str, value: Any) -> None:
        place = f"{module}.{name}"
        if not is_known(module):
            self._values.add(place, value)
        elif isinstance(value, type):
            if _path(value) != place:
                self._values.add(place, value)
        elif isinstance(value, _INTERFACES):
            for attention in sorted(self._attention):
                if attention in value and self._look(value, attention):
                    self._values.add(f"{place}.{attention}", value[attention])
        elif type(value) in ATOMS:
            if name[:2] != "__":
                self._values.add(place, value)
        elif callable(value):
            self._add(place, name, value, follow=root(module) != "torch")
        elif isinstance(value, dict) and len(value) < _LARGEST_TABLE:
            for key, entry in value.items():
                self._add_if_strange(value, key, f"{place}[{key!r}]", entry)

    def _add_if_strange(self, scope: Mapping[Any, Any], name: Any, place: str, value: Any) -> None:
        if isinstance(value, FunctionType) and self._look(scope, name) and not is_library(value):
            self._values.add(place, value)


def _body(function: FunctionType) -> tuple[object, ...]:
    return id(function.__code__), id(function.__defaults__), id(function.__kwdefaults__)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
