"""The same model without what `torch.compile` made of its parts, for those who look inside."""

from __future__ import annotations

from typing import Any

from torch import nn


def uncompiled(model: nn.Module) -> nn.Module:
    """The model; where parts of it are compiled, one of the same tensors whose parts are not.

    What is compiled passes a recorder by. The model itself is not changed.
    """
    if not is_compiled(model):
        return model
    twins: dict[int, Any] = {}

    def twin(part: Any) -> Any:
        if part is None:
            return None
        part = getattr(part, "_orig_mod", part)
        if id(part) not in twins:
            copy = twins[id(part)] = object.__new__(type(part))
            copy.__dict__ |= part.__dict__ | {"_compiled_call_impl": None}
            if _is_compiled_forward(part):
                del copy.__dict__["forward"]
            children = part._modules.items()
            copy.__dict__["_modules"] = {name: twin(child) for name, child in children}
        return twins[id(part)]

    unwrapped: nn.Module = twin(model)
    return unwrapped


def is_compiled(model: nn.Module) -> bool:
    """Whether some part of the model is."""
    return any(map(_is_compiled_part, model.modules()))


def _is_compiled_part(part: nn.Module) -> bool:
    return (
        part._compiled_call_impl is not None
        or hasattr(part, "_orig_mod")
        or _is_compiled_forward(part)
    )


def _is_compiled_forward(part: nn.Module) -> bool:
    return hasattr(part.__dict__.get("forward"), "_torchdynamo_orig_callable")
