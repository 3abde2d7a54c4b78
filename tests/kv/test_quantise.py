"""int8: the error is bounded by the scale, whatever the numbers are, and keys turn back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from chunkcache.kv.layout import KVLayout, LayerShape, TensorFile
from chunkcache.kv.quantise import decode_int8, encode_int8, int8_slots, quantise
from chunkcache.kv.rope import KeyRotation, LayerRule, Rotation
from tests.kv.test_layout import DTYPES, HASH, layouts, random_kv

LAYOUT = KVLayout(torch.float32, (LayerShape(2, 8, 2, 6), None, LayerShape(1, 4, 1, 2)))
# A partial, interleaved rotation of keys, and one of values, as some latent attention has.
HALVES = Rotation(1 / 10 ** torch.arange(0, 2, 0.5), 0, False, 1)
PAIRS = Rotation(torch.tensor([0.9]), 2, True, -1)
ROTATION = KeyRotation((LayerRule(HALVES, None), None, LayerRule(PAIRS, None)))

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(finite, min_size=1, max_size=24), st.sampled_from([1, 2]))
def test_the_error_is_half_a_scale_at_most(numbers: list[float], across: int) -> None:
    x = (
        torch.tensor(numbers).view(1, 1, -1)
        if across == 2
        else torch.tensor(numbers).view(1, -1, 1)
    )
    number, scale = quantise(x, across)
    assert number.dtype == torch.int8
    assert scale.numel() == 1
    assert number.min() >= -127
    back = number.float() * scale
    largest = x.abs().max().double()
    assert torch.isfinite(back).all()
    assert back.abs().max().double() <= largest
    # Beside half a step: rounding of float32, and what is too small for a scale.
    bound = largest / 254 * (1 + 1e-5) + 1e-36
    assert (back.double() - x.double()).abs().max() <= bound


def _blob(form: TensorFile, layers: Any, start: int, turn: KeyRotation | None) -> memoryview:
    return form.build(encode_int8(form, layers, start, turn))


def _back(form: TensorFile, blob: memoryview, start: int, turn: KeyRotation | None) -> Any:
    return decode_int8(form, form.data(blob), start, turn)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_of_every_type(dtype: torch.dtype) -> None:
    """Arithmetic in the type of the numbers would overflow, and 128 wrap to -128."""
    limits = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    row = [limits.max, limits.min, limits.tiny, -limits.tiny, 0.0, 1.0, -1.0, limits.max / 2]
    x = torch.tensor(row, dtype=torch.float64).to(dtype)
    layout = KVLayout(dtype, (LayerShape(1, 8, 1, 8),))
    kv = x.expand(1, 5, 8)
    form = TensorFile.of(layout, range(5), 0, HASH, int8_slots)
    ((keys, values),) = _back(form, _blob(form, [(kv, kv)], 0, None), 0, None)
    assert keys.dtype == values.dtype == dtype
    for part in (keys, values):
        assert torch.isfinite(part).all()
    # A channel of equal numbers is kept to a rounding of float32 and of the type.
    assert torch.allclose(keys.double(), kv.double(), rtol=2 * limits.eps + 1e-5, atol=1e-36)
    bound = 1.001 * limits.max / 254 + limits.eps * kv.double().abs()
    assert ((values.double() - kv.double()).abs() <= bound).all()


def test_a_number_that_is_none_stays_none() -> None:
    x = torch.ones(1, 3, 4)
    x[0, 1, 2], x[0, 2, 3] = torch.nan, torch.inf
    number, scale = quantise(x, 1)
    back = number.float() * scale
    assert back[0, :, 2:].isnan().all()
    assert torch.allclose(back[0, :, :2], torch.ones(3, 2))


@given(layouts, st.integers(1, 9), st.integers(0, 10**5))
def test_round_trip(layout: KVLayout, tokens: int, start: int) -> None:
    form = TensorFile.of(layout, range(tokens), start, HASH, int8_slots)
    layers = random_kv(layout, tokens)
    blob = _blob(form, layers, start, None)
    assert blob.nbytes == form.size
    form.check(blob[: len(form.header)], [blob[len(form.header) :]])
    for back, given_kv in zip(_back(form, blob, start, None), layers, strict=True):
        assert (back is None) == (given_kv is None)
        if back and given_kv:
            for a, b, across in zip(back, given_kv, (1, 2), strict=True):
                assert a.dtype == layout.dtype
                half = b.double().abs().amax(across, keepdim=True) / 254
                rounding = torch.finfo(layout.dtype).eps * b.double().abs()
                assert ((a.double() - b.double()).abs() <= 1.001 * half + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 7, 100_000])
def test_keys_are_turned_to_position_0_and_back(start: int, dtype: torch.dtype) -> None:
    layout = KVLayout(dtype, LAYOUT.layers)
    form = TensorFile.of(layout, range(20), start, HASH, int8_slots)
    at_zero = random_kv(layout, 20, seed=3)
    there = torch.arange(start, start + 20)
    layers = [
        kv and ROTATION.move(kv, index, torch.zeros(20).long(), there)
        for index, kv in enumerate(at_zero)
    ]
    blob = _blob(form, layers, start, ROTATION)
    # What is stored is the same wherever the text stands, up to rounding.
    for stored, kv in zip(_back(form, blob, start, None), at_zero, strict=True):
        if stored and kv:
            for mine, its in zip(stored, kv, strict=True):
                assert (mine - its).abs().max() <= 0.03 * its.abs().max()
    for back, kv in zip(_back(form, blob, start, ROTATION), layers, strict=True):
        if back and kv:
            for mine, its in zip(back, kv, strict=True):
                assert mine.dtype == dtype
                assert (mine - its).abs().max() <= 0.03 * its.abs().max()


def test_large_channels_cost_less_at_position_0() -> None:
    """The reason for turning: a rotated channel shares its size with its pair."""
    layout = KVLayout(torch.float32, (LayerShape(1, 64, 1, 2),))
    rule = Rotation(1 / 10_000 ** (torch.arange(0, 64, 2) / 64), 0, False, 1)
    rotation = KeyRotation((LayerRule(rule, None),))
    source = torch.Generator().manual_seed(0)
    keys, values = torch.randn(1, 128, 64, generator=source), torch.randn(1, 128, 2)
    keys[..., :8] *= 50
    there = torch.arange(128)
    kv = rotation.move((keys, values), 0, torch.zeros(128).long(), there)
    form = TensorFile.of(layout, range(128), 0, HASH, int8_slots)

    def error(turn: KeyRotation | None) -> float:
        (back,) = _back(form, _blob(form, [kv], 0, turn), 0, turn)
        assert back is not None
        gap = rotation.move(back, 0, there, torch.zeros(128).long())[0] - keys
        return float(gap[..., 32:40].pow(2).mean().sqrt())

    assert error(rotation) < 0.1 * error(None)


def test_safetensors_reads_a_blob(tmp_path: Path) -> None:
    layers = random_kv(LAYOUT, 3)
    path = tmp_path / "chunk.safetensors"
    path.write_bytes(_blob(TensorFile.of(LAYOUT, [1, 2, 3], 0, HASH, int8_slots), layers, 0, None))
    with safe_open(path, "np") as file:
        for index in (0, 2):
            kv = layers[index]
            assert kv is not None
            for part, tensor in zip(("keys", "values"), kv, strict=True):
                name = f"layers.{index}.{part}"
                number, scale = file.get_tensor(name), file.get_tensor(f"{name}_scale")
                assert (number.dtype, scale.dtype) == (np.int8, np.float32)
                assert np.abs(number * scale - tensor.numpy()).max() <= scale.max()
