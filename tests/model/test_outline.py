"""Outline: whatever is put into a model, or taken from it, makes a new one; else it stays."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from chunkcache.model.outline import Outline
from tests.models import tiny, tokens


def mlp(model: Any) -> Any:
    return model.model.layers[1].mlp


class Other(nn.Linear):
    pass


def renamed(model: Any) -> None:
    """As many attributes as before, and none is another object."""
    vars(mlp(model))["of_others"] = vars(mlp(model)).pop("hidden_size")


def child_under_another_name(model: Any) -> None:
    children = mlp(model)._modules
    children["of_others"] = children.pop("act_fn")


def same_name_other_table(model: Any) -> None:
    """The last parameter becomes the first buffer: the same names and objects in the same order."""
    head = model.lm_head
    head._buffers["weight"] = head._parameters.pop("weight")


CHANGES: dict[str, Callable[[Any], object]] = {
    "attribute": lambda m: setattr(mlp(m), "hidden_size", 65),
    "another type": lambda m: setattr(mlp(m), "hidden_size", 64.0),
    "new attribute": lambda m: setattr(mlp(m), "of_others", 1),
    "without an attribute": lambda m: delattr(mlp(m), "hidden_size"),
    "attribute renamed": renamed,
    "training": lambda m: mlp(m).train(),
    "method": lambda m: setattr(mlp(m), "forward", lambda x: x),
    "class": lambda m: setattr(m.lm_head, "__class__", Other),
    "dictionary": lambda m: setattr(mlp(m), "__dict__", {**vars(mlp(m)), "hidden_size": 65}),
    "child": lambda m: setattr(mlp(m), "act_fn", nn.ReLU()),
    "new child": lambda m: mlp(m).add_module("of_others", nn.Identity()),
    "child renamed": child_under_another_name,
    "layer gone": lambda m: m.model.layers.pop(1),
    "layers swapped": lambda m: setattr(m.model, "layers", nn.ModuleList([*m.model.layers][::-1])),
    "parameter": lambda m: setattr(m.lm_head, "weight", nn.Parameter(torch.zeros(256, 64))),
    "buffer": lambda m: m.lm_head.register_buffer("b", torch.zeros(1)),
    "parameter as buffer": same_name_other_table,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_makes_another(change: Callable[[Any], object]) -> None:
    model = tiny("llama")
    outline = Outline(model)
    assert outline.again(model) is outline
    change(model)
    after = outline.again(model)
    assert after is not outline
    assert after.parts == list(model.named_modules())
    assert after.again(model) is after


def test_using_a_model_changes_nothing() -> None:
    model = tiny("llama")
    model.generate(tokens(9), max_new_tokens=2)
    outline = Outline(model)
    model.generate(tokens(9), max_new_tokens=2)
    assert outline.again(model) is outline
    assert outline.again(tiny("llama")) is not outline


@pytest.mark.parametrize("name", ["eps", "inner"])
def test_another_object_at_the_same_address_is_another(name: str) -> None:
    """Memory of what is gone is used again at once, by whatever comes next."""
    values: dict[str, Callable[[], object]] = {"eps": lambda: float("0.5"), "inner": nn.Module}
    reused = 0
    for _ in range(200):
        model = nn.Module()
        setattr(model, name, values[name]())
        outline, address = Outline(model), id(getattr(model, name))
        delattr(model, name)
        gone = getattr(model, name, None)
        setattr(model, name, float("0.25") if name == "eps" else nn.Module())
        assert gone is None
        reused += id(getattr(model, name)) == address
        assert outline.again(model) is not outline
    assert reused == 0 or name == "inner"


def test_it_keeps_no_weights_alive() -> None:
    model = tiny("llama")
    outline = Outline(model)
    storage = StorageWeakRef(model.lm_head.weight.untyped_storage())
    del model.lm_head
    gc.collect()
    assert storage.expired()
    assert outline.again(model) is not outline
