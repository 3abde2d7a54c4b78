"""Hooks and patches that others put on a model's parts: do they look, or change what is computed?

Steering, ablation and the like change K/V without changing a weight. A hook that only looks must
not cost anybody the cache, so hooks are not judged by being there: each call is watched, and one
that returns or writes something marks its hook. A replaced `forward` cannot be watched: it makes
the model one of its own.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from chunkcache.model.weights import Parts

Hooks = MutableMapping[int, Callable[..., Any]]
# Parts of the machinery itself, which do what the model's definition says.
_OWN = ("accelerate.", "chunkcache.", "peft.", "torch.", "transformers.")


@dataclass
class HookWatch:
    """Watches the hooks on the inner modules of one model.

    Attributes:
        changing: By number, the path of the module of each hook that was seen to change something.
        quiet: Numbers of hooks that were called and have changed nothing yet.
    """

    changing: dict[int, str] = field(default_factory=dict)
    quiet: set[int] = field(default_factory=set)
    _wrapped: list[tuple[Hooks, int, Callable[..., Any]]] = field(default_factory=list)
    _seen_changing: bool = False

    def reason(self, hooks: list[tuple[str, Hooks, int]]) -> str:
        """Why a model with these hooks cannot be trusted to compute what others stored, or `""`."""
        for _, _, number in hooks:
            if number in self.changing:
                return f"a forward hook on {self.changing[number]} changes what the model computes"
        return ""

    def is_known(self, hooks: list[tuple[str, Hooks, int]]) -> bool:
        """Whether all of these were seen at work already."""
        return all(number in self.quiet for _, _, number in hooks)

    def begin(self, hooks: list[tuple[str, Hooks, int]]) -> None:
        """Watch these hooks until `end`."""
        self.end()
        self._seen_changing = False
        for path, table, number in hooks:
            hook = table.get(number)
            if hook is not None:
                self._wrapped.append((table, number, hook))
                table[number] = self._watched(path, number, hook)

    def end(self) -> bool:
        """Stop watching. True if a hook changed something."""
        for table, number, hook in self._wrapped:
            if number in table:
                table[number] = hook
        self._wrapped.clear()
        return self._seen_changing

    def _watched(self, path: str, number: int, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = list(_versions((args[1:], kwargs)))
            result = hook(*args, **kwargs)
            unchanged = result is None or any(result is arg for arg in args[1:])
            if not unchanged or before != list(_versions((args[1:], kwargs))):
                self.changing[number] = path
                self._seen_changing = True
            else:
                self.quiet.add(number)
            return result

        return call


def foreign_hooks(model: nn.Module, parts: Parts | None = None) -> list[tuple[str, Hooks, int]]:
    """Path, table and number of every hook on the model's inner modules that is not machinery.

    `parts` are its modules by path, for callers that have them.
    """
    return [
        (path, table, number)
        for path, module in parts or model.named_modules()
        if path and (module._forward_pre_hooks or module._forward_hooks)
        for table in (module._forward_pre_hooks, module._forward_hooks)
        for number, hook in table.items()
        if not _is_machinery(hook)
    ]


def has_outer_hooks(model: nn.Module) -> bool:
    """Whether the model itself, not only a part of it, has a hook that is not machinery."""
    return any(
        not _is_machinery(hook)
        for table in (model._forward_pre_hooks, model._forward_hooks)
        for hook in table.values()
    )


def patches(model: nn.Module, parts: Parts | None = None) -> tuple[tuple[str, str], ...]:
    """Path of each inner module whose `forward` was replaced, and a name of the replacement.

    The name is drawn at random: in this process the same replacement has the same name, in no
    other process is there one like it.
    """
    return tuple(
        (path, _NAMES.setdefault(module.__dict__["forward"], uuid.uuid4().hex))
        for path, module in parts or model.named_modules()
        if path and "forward" in module.__dict__ and not hasattr(module, "_hf_hook")
    )


def _is_machinery(hook: Callable[..., Any]) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_OWN)


def _versions(value: Any) -> Iterator[object]:
    """Version counters of all tensors inside. Inference tensors have none, and never look alike."""
    if isinstance(value, Tensor):
        yield object() if value.is_inference() else (id(value), value._version)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _versions(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _versions(item)


_NAMES: weakref.WeakKeyDictionary[Callable[..., Any], str] = weakref.WeakKeyDictionary()
