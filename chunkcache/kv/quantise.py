"""Keys and values as 8-bit integers: a quarter of float32, half of 16 bits, and a small error.

Keys have channels that are large in every token, values do not, so keys get a scale for each
channel and values one for each token (Liu et al., KIVI, https://arxiv.org/abs/2402.02750). Rotation
by position would smear a large channel over its pair: keys are turned to position 0 first where the
model's rule is known, and back when they are read (Hooper et al., KVQuant,
https://arxiv.org/abs/2401.18079).

A blob's tensors are `layers.<i>.keys` and `.values` in int8, each `[kv_heads, tokens, head_dim]`,
`.keys_scale`, `[kv_heads, 1, head_dim]`, and `.values_scale`, `[kv_heads, tokens, 1]`, in float32:
a number is the product of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chunkcache.kv.layout import KVLayout, LayerKV, Slot, TensorFile
from chunkcache.kv.rope import KeyRotation

# int8 without -128. A hair more than 127, so that no number grows by rounding and overflows.
_STEPS = 127.0001
_ACROSS = {"keys": 1, "values": 2}  # the dimension that shares a scale


def int8_slots(layout: KVLayout, tokens: int) -> list[Slot]:
    """The tensors of a chunk's blob, in order: scales first, whose addresses must be aligned."""
    numbers = layout.slots(tokens)
    shapes = [(f"{slot.name}_scale", _scale_shape(slot), torch.float32) for slot in numbers]
    shapes += [(slot.name, slot.shape, torch.int8) for slot in numbers]
    out = []
    end = 0
    for name, shape, dtype in shapes:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        out.append(Slot(name, shape, begin, end, dtype))
    return out


def _scale_shape(slot: Slot) -> tuple[int, ...]:
    across = _ACROSS[slot.name.rpartition(".")[2]]
    return tuple(1 if dim == across else size for dim, size in enumerate(slot.shape))


def quantise(x: Tensor, across: int) -> tuple[Tensor, Tensor]:
    """Numbers as int8 and a float32 scale; the error is at most half a scale.

    Args:
        x: Finite numbers, float32. Where one is not, all that share its scale come back as NaN.
        across: The dimension that shares a scale.
    """
    if not x.numel():  # the values of index keys
        shape = [1 if dim == across else size for dim, size in enumerate(x.shape)]
        return x.to(torch.int8), torch.zeros(shape)
    scale = x.abs().amax(across, keepdim=True) / _STEPS
    each = scale.reciprocal()
    each.masked_fill_(each.isinf(), 0)  # of zeros: 0 * inf is no number, and has no int8
    return (x * each).round_().clamp_(-127, 127).to(torch.int8), scale


def encode_int8(
    form: TensorFile, layers: Sequence[LayerKV | None], start: int, rotation: KeyRotation | None
) -> list[Tensor]:
    """The tensors of a blob, in order, on the device of the layers.

    Args:
        form: The chunk's form, arranged by `int8_slots`.
        layers: Keys and values per layer, each `[kv_heads, tokens, head_dim]`; on any device.
        start: Position of the first token.
        rotation: Turns keys to position 0; `None` leaves them as they are.
    """
    there = torch.arange(start, start + form.tokens)
    pairs = [
        quantise(part, across)
        for kv in _moved(layers, rotation, there, torch.zeros_like(there))
        if kv
        for part, across in zip(kv, _ACROSS.values(), strict=True)
    ]
    return [*(scale for _, scale in pairs), *(number for number, _ in pairs)]


def decode_int8(
    form: TensorFile, data: Tensor, start: int, rotation: KeyRotation | None
) -> list[LayerKV | None]:
    """Keys and values in `form.layout.dtype` of a blob's checked data, wherever these are."""
    tensors = form.tensors(data)
    half = len(tensors) // 2
    parts = iter(
        number.float().mul_(scale)
        for scale, number in zip(tensors[:half], tensors[half:], strict=True)
    )
    layers = [(next(parts), next(parts)) if layer else None for layer in form.layout.layers]
    there = torch.arange(start, start + form.tokens)
    dtype = form.layout.dtype
    return [
        kv and (kv[0].to(dtype), kv[1].to(dtype))
        for kv in _moved(layers, rotation, torch.zeros_like(there), there)
    ]


def _moved(
    layers: Sequence[LayerKV | None], rotation: KeyRotation | None, old: Tensor, new: Tensor
) -> list[LayerKV | None]:
    """All layers in float32, at other positions, `[tokens]`."""
    wide: list[LayerKV | None] = [
        kv and (kv[0].detach().float(), kv[1].detach().float()) for kv in layers
    ]
    if rotation is None:
        return wide
    out: list[LayerKV | None] = [
        kv and (torch.empty_like(kv[0]), torch.empty_like(kv[1])) for kv in wide
    ]
    rotation.move_into(out, wide, old, new)
    return out
