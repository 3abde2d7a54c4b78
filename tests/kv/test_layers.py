from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from chunkcache.kv.layers import (
    SLACK_TOKENS,
    GrowingLayer,
    allocate_all,
    row_runs,
    row_slice,
    with_room,
)
from chunkcache.kv.layout import KVLayout, LayerShape, TensorFile, encode

LAYOUT = KVLayout(torch.float32, (LayerShape(2, 3, 2, 5), None, LayerShape(1, 2, 1, 2)))


def states(
    batch: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Keys and values of another width, as some models have."""
    source = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, 2, tokens, 3, generator=source)
    values = torch.randn(batch, 2, tokens, 5, generator=source)
    return keys.to(dtype), values.to(dtype)


def same(ours: GrowingLayer, theirs: DynamicLayer) -> bool:
    return torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


class AgainstDynamicLayer(RuleBasedStateMachine):
    """Whatever is done to it, a growing layer holds what Transformers' own layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.ours, self.theirs = GrowingLayer(), DynamicLayer()  # type: ignore[no-untyped-call]
        self.batch, self.seed = 2, 0
        self.handed_out: list[tuple[Tensor, Tensor]] = []  # view, its content as it was

    def update(self, tokens: int) -> None:
        self.seed += 1
        new = states(self.batch, tokens, self.seed)
        given_out = self.ours.update(*new)
        expected = self.theirs.update(*new)
        for view, right in zip(given_out, expected, strict=True):
            assert torch.equal(view, right)
            self.handed_out.append((view, right.clone()))

    @initialize(settled=st.booleans(), inference=st.booleans())
    def begin(self, settled: bool, inference: bool) -> None:
        if settled:
            layout = KVLayout(torch.float32, (LayerShape(2, 3, 2, 5),))
            with torch.inference_mode(inference):
                allocate_all([self.ours], layout, self.batch, 3, torch.device("cpu"))

    @rule(tokens=st.integers(1, 4))
    def append(self, tokens: int) -> None:
        self.update(tokens)

    @rule()
    def append_beyond_the_room(self) -> None:
        self.update(SLACK_TOKENS + 1)

    @rule(tokens=st.integers(1, 3))
    def append_in_inference_mode(self, tokens: int) -> None:
        with torch.inference_mode():
            self.update(tokens)

    @rule(more=st.integers(0, 300))
    def reserve(self, more: int) -> None:
        self.ours.reserve(self.theirs.get_seq_length() + more)

    @rule(tokens=st.integers(0, 6))
    def crop(self, tokens: int) -> None:
        tokens = min(tokens, self.theirs.get_seq_length())
        self.ours.crop(-tokens)
        self.theirs.crop(-tokens)
        self.handed_out.clear()  # what was cropped is written over

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        row = st.integers(0, self.batch - 1)
        rows = data.draw(st.lists(row, min_size=self.batch, max_size=self.batch))
        for layer in (self.ours, self.theirs):
            layer.reorder_cache(torch.tensor(rows))  # type: ignore[arg-type]

    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats: int) -> None:
        if self.theirs.get_seq_length() and self.batch * repeats < 5:
            self.batch *= repeats
            for layer in (self.ours, self.theirs):
                layer.batch_repeat_interleave(repeats)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        if self.theirs.get_seq_length():
            row = st.integers(0, self.batch - 1)
            rows = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)))
            self.batch = len(rows)
            for layer in (self.ours, self.theirs):
                layer.batch_select_indices(rows)

    @rule()
    def reset(self) -> None:
        self.ours.reset()
        self.theirs.reset()

    @rule()
    def go_on_with_a_copy(self) -> None:
        self.ours = copy.deepcopy(self.ours)

    @invariant()
    def alike(self) -> None:
        held = self.theirs.get_seq_length()
        assert self.ours.get_seq_length() == held
        assert self.ours.get_mask_sizes(3) == self.theirs.get_mask_sizes(3)
        assert not held or same(self.ours, self.theirs)

    @invariant()
    def runs_are_what_is_held(self) -> None:
        held = self.ours.get_seq_length()
        for row in range(self.ours.keys.shape[0] if held else 0):
            runs = row_runs([self.ours], row, 0, held)
            slices = row_slice([self.ours], row, 0, held)[0]
            if runs is not None and slices is not None:
                right = b"".join(part.contiguous().numpy().tobytes() for part in slices)
                assert b"".join(runs) == right

    @invariant()
    def views_handed_out_stay_as_they_were(self) -> None:
        for view, content in self.handed_out:
            assert torch.equal(view, content)


TestAgainstDynamicLayer = AgainstDynamicLayer.TestCase
TestAgainstDynamicLayer.settings = settings(max_examples=80, stateful_step_count=15, deadline=None)


# ------------------------------------------------------------------------ memory


@torch.no_grad()
def test_nothing_is_copied_from_token_to_token() -> None:
    layer = GrowingLayer()
    layer.update(*states(1, 10))
    places = set()
    for step in range(SLACK_TOKENS):
        keys, values = layer.update(*states(1, 1, step))
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1


@torch.no_grad()
def test_growing_to_n_tokens_moves_about_log_n_times() -> None:
    layer = GrowingLayer()
    moves, place = 0, None
    for step in range(4000):
        keys, _ = layer.update(*states(1, 1, step))
        moves += keys.data_ptr() != place
        place = keys.data_ptr()
    assert moves < 20


@torch.no_grad()
def test_cropped_room_is_used_again() -> None:
    layer = GrowingLayer()
    place = layer.update(*states(1, 10))[0].data_ptr()
    layer.crop(-4)
    assert layer.update(*states(1, 4, 1))[0].data_ptr() == place


@torch.no_grad()
def test_reserve_makes_room_once() -> None:
    layer = GrowingLayer()
    before, _ = (t.clone() for t in layer.update(*states(1, 3)))
    layer.reserve(5000)
    place = layer.keys.data_ptr()
    assert torch.equal(layer.keys, before)
    layer.update(*states(1, 4997))
    assert layer.keys.data_ptr() == place


def test_reserve_for_fewer_than_are_held_changes_nothing() -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()  # type: ignore[no-untyped-call]
    for layer in (ours, theirs):
        layer.update(*states(2, SLACK_TOKENS + 1))
        layer.reorder_cache(torch.tensor([1, 0]))  # type: ignore[arg-type]
    ours.reserve(0)
    assert same(ours, theirs)


@given(st.integers(0, 10**6))
def test_room_to_grow(tokens: int) -> None:
    assert with_room(tokens) >= tokens + max(SLACK_TOKENS, tokens // 4)


def test_reset_lets_go_of_the_memory() -> None:
    layer = GrowingLayer()
    layer.update(*states(1, 3))
    layer.reset()
    assert not [v for v in vars(layer).values() if isinstance(v, Tensor)]


def test_a_copy_shares_no_memory() -> None:
    layer = GrowingLayer()
    layer.update(*states(1, 3))
    twin = copy.deepcopy(layer)
    twin.update(*states(1, 2, 1))
    expected = layer.keys.clone()
    twin.keys.zero_()
    layer.update(*states(1, 2, 2))
    assert torch.equal(layer.keys[:, :, :3], expected)
    assert torch.count_nonzero(twin.keys) == 0


@pytest.mark.parametrize(
    "make", [torch.inference_mode, torch.no_grad], ids=["inference", "no_grad"]
)
def test_memory_made_in_another_mode_can_be_used(make: Callable[[], Any]) -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()  # type: ignore[no-untyped-call]
    with make():
        for layer in (ours, theirs):
            layer.update(*states(2, 3))
    for layer in (ours, theirs):
        layer.update(*states(2, 2, 1))
    ours.reserve(1000)
    assert same(ours, theirs)


def test_data_of_another_type_is_joined_as_transformers_joins_it() -> None:
    for first, second in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        ours, theirs = GrowingLayer(), DynamicLayer()  # type: ignore[no-untyped-call]
        for layer in (ours, theirs):
            layer.update(*states(1, 3, 0, first))
            layer.update(*states(1, 2, 1, second))
        assert ours.keys.dtype == theirs.keys.dtype
        assert same(ours, theirs)


# ------------------------------------------------------------------------ autograd


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_gradients_are_those_of_a_dynamic_layer(trained: tuple[bool, bool], pieces: int) -> None:
    # Adapters on v_proj alone give values with a gradient beside keys without one.
    def gradients(layer: DynamicLayer) -> list[Tensor | None]:
        inputs = [states(1, 2, seed) for seed in range(pieces)]
        total = torch.zeros(())
        for kv in inputs:
            for tensor, wanted in zip(kv, trained, strict=True):
                tensor.requires_grad_(wanted)
            keys, values = layer.update(*kv)
            total = total + (keys**2).sum() + (values**3).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return [tensor.grad for kv in inputs for tensor in kv]

    ours = gradients(GrowingLayer())
    theirs = gradients(DynamicLayer())  # type: ignore[no-untyped-call]
    for mine, right in zip(ours, theirs, strict=True):
        assert (mine is None) == (right is None)
        assert mine is None or torch.allclose(mine, right)  # type: ignore[arg-type]


def test_gradients_reach_queries_that_met_earlier_keys() -> None:
    # Adapters on q_proj alone: autograd keeps the keys that the queries were multiplied by.
    layer = GrowingLayer()
    query = torch.ones(1, 2, 1, 3, requires_grad=True)
    total = torch.zeros(())
    seen = []
    for seed in range(3):
        keys, _ = layer.update(*states(1, 2, seed))
        seen.append(keys.clone())
        total = total + (query * keys).sum()
    total.backward()  # type: ignore[no-untyped-call]
    assert query.grad is not None
    assert torch.allclose(query.grad, sum(k.sum(dim=2, keepdim=True) for k in seen))  # type: ignore[arg-type]


def test_inference_goes_on_after_training() -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()  # type: ignore[no-untyped-call]
    trained = [t.requires_grad_() for t in states(1, 2)]
    for layer in (ours, theirs):
        layer.update(*trained)
        with torch.no_grad():
            layer.update(*states(1, 3, 1))
            layer.update(*states(1, 1, 2))
    assert same(ours, theirs)


# ------------------------------------------------------------------------ filled from outside


def settled(batch: int = 2, tokens: int = 6) -> list[Any]:
    layers: list[Any] = [GrowingLayer(), object(), GrowingLayer()]
    allocate_all(layers, LAYOUT, batch, tokens, torch.device("cpu"))
    return layers


@pytest.mark.parametrize(
    "shape",
    [(2, 2, 4, 3), (3, 2, 4, 3), (2, 4, 4, 3), (2, 2, 4, 7)],
    ids=["as settled", "other batch", "other heads", "other width"],
)
@torch.no_grad()
def test_room_that_does_not_fit_is_left_for_other_room(shape: tuple[int, ...]) -> None:
    layer = settled()[0]
    keys, values = torch.rand(shape), torch.rand(*shape[:3], 5)
    for seen, right in zip(layer.update(keys, values), (keys, values), strict=True):
        assert torch.equal(seen, right)


@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_tensor_put_in_place_of_a_view_is_kept(part: str) -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()  # type: ignore[no-untyped-call]
    for layer in (ours, theirs):
        layer.update(*states(2, 3))
        setattr(layer, part, getattr(layer, part) + 1)
        layer.update(*states(2, 1, 1))
    assert same(ours, theirs)


def kv(heads: int, key_dim: int, value_dim: int, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.rand(heads, tokens, key_dim), torch.rand(heads, tokens, value_dim)


def test_settled_layers_begin_empty_and_do_not_overlap() -> None:
    layers = settled()
    assert layers[0].get_seq_length() == layers[2].get_seq_length() == 0
    room = with_room(6)
    for layer, value in ((layers[0], 1.0), (layers[2], 2.0)):
        layer.hold(room)
        layer.keys.fill_(value)
        layer.values.fill_(-value)
    assert (layers[0].keys == 1).all()
    assert (layers[0].values == -1).all()
    assert (layers[2].keys == 2).all()
    assert (layers[2].values == -2).all()


def test_place_hold_peek_and_slice() -> None:
    layers = settled()
    parts = {(0, 0): kv(2, 3, 5, 4), (0, 2): kv(1, 2, 2, 4), (1, 0): kv(2, 3, 5, 4)}
    for (row, index), (keys, values) in parts.items():
        layers[index].place(row, 1, keys, values)
        for seen, right in zip(layers[index].peek(row, 1, 4), (keys, values), strict=True):
            assert torch.equal(seen, right)
    for layer in (layers[0], layers[2]):
        assert layer.get_seq_length() == 0
        layer.blank(0, 0, 1)
        layer.hold(5)
        assert layer.get_seq_length() == 5
        assert torch.count_nonzero(layer.keys[0, :, 0]) == 0
        assert torch.count_nonzero(layer.values[0, :, 0]) == 0
    sliced = row_slice(layers, 1, 2, 5)
    assert sliced[1] is None
    assert sliced[0] is not None
    assert torch.equal(sliced[0][0], parts[1, 0][0][:, 1:])
    assert torch.equal(sliced[0][1], parts[1, 0][1][:, 1:])


@torch.no_grad()
def test_one_row_is_a_layer_on_the_same_memory() -> None:
    layer = settled(batch=2)[0]
    layer.hold(5)
    layer.keys.zero_()
    layer.values.zero_()
    row = layer.one_row(1, 2, 3)
    assert row.keys.shape == (1, 2, 3, 3)  # row, heads, tokens, key_dim
    row.columns = torch.tensor([0, 2])
    keys, values = kv(2, 3, 5, 2)
    room = row.update(keys[None], values[None])[0]
    assert room.data_ptr() == row.keys.data_ptr() != layer.keys.data_ptr()
    assert torch.equal(layer.keys[1][:, [2, 4]], keys)
    assert not layer.keys[0].any()
    assert not layer.keys[1][:, [0, 1, 3]].any()


@torch.no_grad()
def test_tokens_go_behind_what_was_placed() -> None:
    layers = settled(batch=1)
    keys, values = kv(2, 3, 5, 4)
    layers[0].place(0, 0, keys, values)
    layers[0].hold(4)
    place = layers[0].keys.data_ptr()
    new = states(1, 2)
    held = layers[0].update(*new)
    assert held[0].data_ptr() == place
    assert torch.equal(held[0], torch.cat([keys[None], new[0]], dim=2))
    assert torch.equal(held[1], torch.cat([values[None], new[1]], dim=2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_blob_fits_the_runs_of_a_row_byte_by_byte(dtype: torch.dtype) -> None:
    layout = KVLayout(dtype, LAYOUT.layers)
    layers: list[Any] = [GrowingLayer(), object(), GrowingLayer()]
    allocate_all(layers, layout, 3, 6, torch.device("cpu"))
    parts = [
        tuple(t.to(dtype) for t in kv(2, 3, 5, 4)),
        None,
        tuple(t.to(dtype) for t in kv(1, 2, 2, 4)),
    ]
    form = TensorFile.of(layout, [1, 2, 3, 4], 0, "")
    blob = encode(form, parts)  # type: ignore[arg-type]
    for layer in (layers[0], layers[2]):
        layer.hold(with_room(6))
        layer.keys.zero_()
        layer.values.zero_()
    at = len(form.header)
    for layer in (layers[0], layers[2]):
        for run in layer.runs(1, 2, 4):
            run[:] = blob[at : at + run.nbytes]
            at += run.nbytes
    assert at == form.size
    for index in (0, 2):
        part = parts[index]
        assert part is not None
        for seen, right in zip(layers[index].peek(1, 2, 4), part, strict=True):
            assert torch.equal(seen, right)
        # Nothing beside it was touched.
        for room, right in zip((layers[index].keys, layers[index].values), part, strict=True):
            assert torch.count_nonzero(room) == torch.count_nonzero(right)


def test_runs_are_the_layers_own_memory() -> None:
    layer = settled()[0]
    first = layer.runs(1, 2, 4)[0]
    address = ctypes.addressof(ctypes.c_char.from_buffer(first))
    assert address == layer.peek(1, 2, 4)[0].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_copy_of_the_runs_is_the_blob_of_the_slices(dtype: torch.dtype) -> None:
    layout = KVLayout(dtype, LAYOUT.layers)
    layers: list[Any] = [GrowingLayer(), object(), GrowingLayer()]
    allocate_all(layers, layout, 3, 6, torch.device("cpu"))
    for layer in (layers[0], layers[2]):
        layer.hold(6)
        layer.keys.normal_()
        layer.values.normal_()
    form = TensorFile.of(layout, [1, 2, 3, 4], 0, "")
    runs = row_runs(layers, 1, 2, 6)
    assert runs is not None
    assert form.copy(runs) == encode(form, row_slice(layers, 1, 2, 6))
    for wrong in (runs[:-1], [*runs, runs[0]]):
        with pytest.raises((AssertionError, ValueError)):
            form.copy(wrong)


@pytest.mark.parametrize("part", ["keys", "values"])
def test_there_are_no_runs_of_what_lies_elsewhere(part: str) -> None:
    layers = settled()
    for layer in (layers[0], layers[2]):
        layer.hold(4)
    assert row_runs(layers, 0, 0, 4) is not None
    setattr(layers[2], part, getattr(layers[2], part).clone())  # as crop and reorder do
    assert row_runs(layers, 0, 0, 4) is None
    layers[2].reset()
    layers[2].lazy_initialization(*(kv(1, 2, 2, 4)))
    assert row_runs(layers, 0, 0, 0) is None
