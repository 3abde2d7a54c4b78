"""Outline: which modules a model consists of, and whether all still hold the same objects.

Walking a model and reading its attributes takes milliseconds, and from one prompt to the next
nothing is put anywhere. So the ids of what stands in the modules' dictionaries are remembered, and
compared in one pass, over as little memory as can be: after a forward, none of it is in the
processor's cache. What may change within an object (a weight, a list) is not told by that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cached_property, lru_cache
from itertools import chain, repeat
from operator import attrgetter, call, is_, is_not, itemgetter
from typing import Any

from torch import nn

from chunkcache.model.values import ATOMS
from chunkcache.model.weights import Parts

_TABLES = attrgetter("_modules", "_parameters", "_buffers")
# What every module has and can be called with whatever it is: hooks are looked at elsewhere. None
# of it is ever taken away, so that where there are as many entries as before, and all others are
# there, none is new.
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}


class Outline:
    """A model's modules as they were found.

    An id says nothing of an object that is gone: another may have its place in memory. Modules
    that are gone are noticed, and plain values kept alive; of a tensor at the same place the watch
    tells by its storage (see `weights.watch`), and all other values are described each time. So no
    weights are kept alive, nor the model.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = list(model.named_modules())
        modules = [module for _, module in parts]
        self._paths = [path for path, _ in parts]
        self._modules = list(map(weakref.ref, modules))
        self._types = list(map(type, modules))
        held, tables = list(map(vars, modules)), _tables(modules)
        self._sizes = [*map(len, held), *map(len, tables)]
        self._own = [_getter(tuple(sorted(entries.keys() - _OF_TORCH))) for entries in held]
        self._names = list(chain.from_iterable(tables))
        values = self._values(held, tables)
        self._ids = list(map(id, values))
        self._plain = [value for value in values if type(value) in ATOMS]

    def again(self, model: nn.Module) -> Outline:
        """Itself if all modules hold what they held, else a new one."""
        modules = [module() for module in self._modules]
        return self if self._is_of(model, modules) else Outline(model)

    def _is_of(self, model: nn.Module, modules: list[Any]) -> bool:
        if modules[0] is not model or not all(map(is_not, modules, repeat(None))):
            return False
        held, tables = list(map(vars, modules)), _tables(modules)
        try:
            return (
                list(map(type, modules)) == self._types
                and [*map(len, held), *map(len, tables)] == self._sizes
                and all(map(is_, chain.from_iterable(tables), self._names))
                and list(map(id, self._values(held, tables))) == self._ids
            )
        except KeyError:  # an attribute was taken away
            return False

    def _values(self, held: list[Any], tables: list[Any]) -> list[object]:
        inner = chain.from_iterable([table.values() for table in tables if table])
        return [*chain.from_iterable(map(call, self._own, held)), *inner]

    @property
    def parts(self) -> Parts:
        """The modules by path. None has gone since `again` has looked, in the same thread."""
        modules = (module() for module in self._modules)
        pairs = zip(self._paths, modules, strict=True)
        return [(path, module) for path, module in pairs if module is not None]

    @cached_property
    def numbers(self) -> dict[int, str]:
        """A name for each module by its id, the same for every model made alike."""
        return {id(module): f"module {number}" for number, (_, module) in enumerate(self.parts)}

    @cached_property
    def classes(self) -> frozenset[type]:
        """The classes of the modules."""
        return frozenset(self._types)


def _tables(modules: list[nn.Module]) -> list[Any]:
    """Children, parameters and buffers of each module."""
    return list(chain.from_iterable(map(_TABLES, modules)))


@lru_cache(maxsize=1024)
def _getter(names: tuple[str, ...]) -> Callable[[dict[str, Any]], tuple[object, ...]]:
    """Gets these entries of a dictionary; twice the first, since of one alone it makes no tuple."""
    return itemgetter(*names[:1], *names)
