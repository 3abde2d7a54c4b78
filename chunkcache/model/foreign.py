"""Code of others on a model's modules: forward hooks, and a `forward` that was replaced.

Patching, capturing and steering put hooks on modules. A hook sees the tokens that are computed, so
a trimmed prompt changes what it sees and does, also where it only looks; and what it changes must
not be stored as the model's own. So a model that has any falls back to normal prefill. Machinery
that does what the model's definition says does not count.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle

from chunkcache.model.weights import Parts

_MACHINERY = frozenset(
    ("accelerate", "bitsandbytes", "chunkcache", "peft", "torch", "transformers")
)
_TABLES = ("_forward_pre_hooks", "_forward_hooks")


def foreign_code(model: nn.Module, parts: Parts | None = None) -> str:
    """The first hook or replaced `forward` that is not machinery, in words; `""` without any.

    Hooks on inner modules and those for all modules of the process count, and of the model's own
    those that change its input behind our hook: what they do is not seen by it.

    Args:
        model: A model, with our hook or without.
        parts: Its modules by path, for callers that have them.
    """
    for table in (torch_modules._global_forward_pre_hooks, torch_modules._global_forward_hooks):
        if hook := _first_foreign(table.values()):
            return f"a forward hook for all modules of the process ({_described(hook)})"
    for path, module in parts or model.named_modules():
        if forward := module.__dict__.get("forward"):
            forward = getattr(forward, "func", forward)  # accelerate puts in a partial
            if not _is_machinery(forward):
                return f"a replaced forward of {path or 'the model'} ({_described(forward)})"
        if not (module._forward_pre_hooks or module._forward_hooks):
            continue
        tables = (_behind_ours(module),) if not path else _hooks_of(module)
        for hooks in tables:
            if hook := _first_foreign(hooks):
                return f"a forward hook on {path or 'the model'} ({_described(hook)})"
    return ""


def has_outer_hooks(model: nn.Module) -> bool:
    """Whether the model itself, not only a part of it, has a hook that is not machinery."""
    return any(_first_foreign(hooks) for hooks in _hooks_of(model))


def without_foreign_hooks(model: nn.Module) -> nn.Module:
    """The same model, tensor by tensor, whose modules have no hooks but those of machinery.

    For self-tests, which hooks need not see. The model itself stays as it is: another thread may
    compute with it.
    """
    twins: dict[int, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if id(module) not in twins:
            copy = twins[id(module)] = type(module).__new__(type(module))
            copy.__dict__ |= module.__dict__ | {"_compiled_call_impl": None}
            for name in _TABLES:
                hooks = getattr(module, name).items()
                copy.__dict__[name] = OrderedDict(
                    (number, hook) for number, hook in hooks if _is_machinery(hook)
                )
            copy.__dict__["_modules"] = {
                name: None if child is None else twin(child)
                for name, child in module._modules.items()
            }
        return twins[id(module)]

    return twin(model)


def hooks_registered() -> int:
    """How many hooks this process has registered so far, on whatever module."""
    return RemovableHandle.next_id


def _hooks_of(module: nn.Module) -> list[Iterable[Callable[..., Any]]]:
    return [getattr(module, name).values() for name in _TABLES]


def _behind_ours(model: nn.Module) -> list[Callable[..., Any]]:
    """The model's own pre-hooks that come after ours."""
    hooks = list(model._forward_pre_hooks.values())
    ours = [place for place, hook in enumerate(hooks) if "chunkcache" in _origin(hook)]
    return hooks[ours[-1] + 1 :] if ours else []


def _first_foreign(hooks: Iterable[Callable[..., Any]]) -> Callable[..., Any] | None:
    return next((hook for hook in list(hooks) if not _is_machinery(hook)), None)


def _is_machinery(call: Callable[..., Any]) -> bool:
    return _origin(call) <= _MACHINERY


def _origin(call: Callable[..., Any]) -> set[str]:
    """The packages that a function's code and its name come from.

    A decorator may copy the name of what it wraps, or be of a package that wraps others' code.
    A partial comes from functools: what it was given may be anybody's, as an adapter per row is.
    """
    if isinstance(call, MethodType):
        call = call.__func__
    code = getattr(call, "__globals__", None)
    names = {type(call).__module__} if code is None else {code["__name__"], call.__module__}
    return {str(name).partition(".")[0] for name in names}


def _described(call: Callable[..., Any]) -> str:
    """A function in words, as `steer of __main__`."""
    if isinstance(call, functools.partial):
        call = call.func
    name = getattr(call, "__qualname__", None) or type(call).__qualname__
    return f"{name.rpartition('<locals>.')[2]} of {getattr(call, '__module__', None)}"
