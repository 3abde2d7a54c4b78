from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from chunkcache.model import weights
from chunkcache.model.weights import SAMPLED_RUNS, digest_adapters, digest_weights, watch
from tests.models import tiny


def layer(**tensors: torch.Tensor) -> nn.Module:
    """A module with these parameters."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


@given(st.integers(0, 11), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_every_element_counts(at: int, dtype: torch.dtype) -> None:
    module = layer(weight=torch.ones(3, 4, dtype=dtype))
    before = digest_weights(module)
    module.weight.view(-1)[at] += 1
    assert digest_weights(module) != before
    module.weight.view(-1)[at] -= 1
    assert digest_weights(module) == before


def test_name_shape_type_and_buffers_count() -> None:
    ones = torch.ones(4)
    with_buffer, unsaved = layer(a=ones), layer(a=ones)
    with_buffer.register_buffer("b", torch.ones(1))
    unsaved.register_buffer("b", torch.zeros(1), persistent=False)
    modules = [
        layer(a=ones),
        layer(b=ones),
        layer(a=ones.reshape(2, 2)),
        layer(a=ones.view(torch.int32).view(torch.float32).double()),
        layer(a=ones.to(torch.bfloat16)),
        layer(a=ones, b=ones),
        with_buffer,
        unsaved,
    ]
    assert len({digest_weights(module) for module in modules}) == len(modules)


def test_bits_that_look_alike_in_another_type_differ() -> None:
    bits = torch.tensor([1.0, 2.0])
    assert digest_weights(layer(a=bits)) != digest_weights(layer(a=bits.view(torch.int32).float()))


def test_layout_in_memory_does_not_count() -> None:
    table = torch.arange(12.0).reshape(3, 4)
    assert digest_weights(layer(a=table.t())) == digest_weights(layer(a=table.t().contiguous()))


def test_a_wrapped_tensor_is_what_it_is_made_of() -> None:
    """As torchao's and quanto's weights are: numbers and scales, in one tensor."""

    def wrapped(scale: float) -> nn.Module:
        return layer(a=TwoTensor(torch.ones(4), torch.full((4,), scale)))

    assert digest_weights(wrapped(2.0)) == digest_weights(wrapped(2.0))
    assert digest_weights(wrapped(2.0)) != digest_weights(wrapped(3.0))
    module = wrapped(2.0)
    before = watch(module)
    assert watch(module) == before
    module.a.b.mul_(1.5)
    assert watch(module).edited_since(before) == {"a.b"}


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A module that counts as large: one tensor that is sampled, one that is hashed whole."""
    monkeypatch.setattr(weights, "WHOLE_MODEL_BYTES", 1 << 10)
    monkeypatch.setattr(weights, "WHOLE_TENSOR_BYTES", 1 << 16)
    return layer(large=torch.zeros(SAMPLED_RUNS * 100), small=torch.zeros(1000))


def gap(module: nn.Module) -> int:
    """An element of `large` between two samples."""
    before = digest_weights(module)
    for at in range(100):
        module.large[at] += 1
        hit = digest_weights(module) != before
        module.large[at] -= 1
        if not hit:
            return at
    raise AssertionError("no gap: the tensor is not sampled")


def test_a_sample_reaches_over_the_whole_tensor(sampled: nn.Module) -> None:
    before = digest_weights(sampled)
    for part in sampled.large.chunk(SAMPLED_RUNS // 8):
        part += 1
        assert digest_weights(sampled) != before
        part -= 1
    assert digest_weights(sampled) == before


def test_small_tensors_of_a_large_model_count_whole(sampled: nn.Module) -> None:
    before = digest_weights(sampled)
    for at in (0, 17, 999):
        sampled.small[at] += 1
        assert digest_weights(sampled) != before
        sampled.small[at] -= 1


def test_a_tensor_known_to_be_edited_counts_whole(sampled: nn.Module) -> None:
    at = gap(sampled)
    before = digest_weights(sampled, {"large"})
    sampled.large[at] += 1
    assert digest_weights(sampled, {"large"}) != before


# ------------------------------------------------------------------------ the watch

Edit = Callable[[nn.Module], object]


def fill(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight[0, 0] = 5


def fill_in_inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        module.weight.fill_(5)


EDITS: dict[str, Edit] = {
    "under no_grad": fill,
    "under inference_mode": fill_in_inference_mode,
    "data assigned": lambda m: setattr(m.weight, "data", torch.zeros(32, 64)),
    "data filled": lambda m: m.weight.data.fill_(5),
    "state loaded": lambda m: m.load_state_dict({"weight": torch.zeros(32, 64)}),
    "state assigned": lambda m: m.load_state_dict({"weight": torch.zeros(32, 64)}, assign=True),
    "parameter replaced": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(32, 64))),
    "half": lambda m: m.half(),
    "half and back": lambda m: m.half().float(),
    "buffer added": lambda m: m.register_buffer("b", torch.zeros(1)),
    "view written": lambda m: m.weight.detach().view(-1)[3:].zero_(),
    "turned over": lambda m: setattr(m.weight, "data", m.weight.data.view(64, 32).t()),
    "swapped": lambda m: torch.utils.swap_tensors(m.weight, nn.Parameter(torch.zeros(32, 64))),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_an_edit_is_noticed(edit: Edit) -> None:
    module = layer(weight=torch.rand(32, 64))
    before = watch(module)
    assert watch(module) == before
    edit(module)
    assert watch(module) != before


def test_an_edit_is_noticed_where_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it misses all numbers that are looked at: no other storage has the address."""
    monkeypatch.setattr(weights, "WATCHED_MODEL_BYTES", 0)
    module = layer(weight=torch.rand(32, 64))
    before = watch(module, phases=[])
    assert watch(module, phases=[], before=before) == before
    for _ in range(100):
        module.weight.data = module.weight.data * 1.01
        assert watch(module, phases=[], before=before) != before


def test_reading_is_not_an_edit() -> None:
    model = tiny("llama")
    before = watch(model)
    model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2)
    model.state_dict()
    digest_weights(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert watch(model) == before


def test_what_cannot_be_watched_never_looks_the_same() -> None:
    with torch.inference_mode():
        module = layer(weight=torch.zeros(2))
    assert watch(module) != watch(module)


def test_the_watch_names_what_changed() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = watch(module)
    with torch.no_grad():
        module[1].bias.add_(1)
    after = watch(module)
    assert after.edited_since(before) == {"1.bias"}
    assert "1.bias" in dict(module.named_parameters())


def test_a_watch_keeps_no_weights_alive() -> None:
    module = layer(weight=torch.zeros(1 << 20))
    seen = watch(module)
    storage = torch.multiprocessing.reductions.StorageWeakRef(module.weight.untyped_storage())
    del module
    assert seen
    assert storage.expired()


def test_no_adapters() -> None:
    assert digest_adapters(nn.Linear(2, 2)) == "none"
