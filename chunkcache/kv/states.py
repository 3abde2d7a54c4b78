"""Layers with recurrent and convolution states, and snapshots of these.

K/V can be cut at any token. A state cannot: it is that of all tokens so far, and the model writes
it over in place. So it is copied when the tokens up to a boundary have been computed, kept beside
the chunk that ends there, and put back to go on from there. A window of a convolution is only the
last inputs, so it can be cut out of what a layer is given, at any token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from chunkcache.kv.layers import GrowingLayer, growing
from chunkcache.kv.layout import StateShape

CONV, RECURRENT = "conv", "recurrent"


class StateLayer(LinearAttentionLayer):
    """A layer's states, `[batch, ...]` each, whose convolution windows can be kept at any token.

    Attributes:
        windows_at: After how many tokens of the next forward windows are kept.
        windows: Those, `[batch, channels, window]`, by tokens and number of the state.
    """

    windows_at: tuple[int, ...] = ()
    windows: dict[int, dict[int, Tensor]]

    def __init__(self, number_of_states: int = 1, **_: Any) -> None:
        super().__init__(number_of_states=number_of_states)
        self.windows = {}

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Add the inputs of new tokens, `[batch, channels, tokens]`; see Transformers."""
        full: Tensor = super().update_conv_state(conv_states, state_idx, *args, **kwargs)
        before = full.shape[-1] - conv_states.shape[-1]
        size: Any = self.conv_kernel_size[state_idx]
        for tokens in self.windows_at:
            window = full[..., max(before + tokens - size, 0) : before + tokens]
            window = pad(window, (size - window.shape[-1], 0)).clone()
            self.windows.setdefault(tokens, {})[state_idx] = window
        return full

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._take(lambda state: state.repeat_interleave(repeats, dim=0))
        if isinstance(self, DynamicLayer):
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows given."""
        self._take(lambda state: state[indices.to(state.device)])
        if isinstance(self, DynamicLayer):
            super().batch_select_indices(indices)

    def _take(self, rows_of: Any) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = rows_of(state)


class GrowingStateLayer(  # type: ignore[misc]
    GrowingLayer, StateLayer, LinearAttentionAndFullAttentionLayer
):
    """A layer with both: K/V that can be filled from outside, and states."""

    is_croppable = LinearAttentionAndFullAttentionLayer.is_croppable

    def __init__(self, number_of_states: int = 1, **_: Any) -> None:
        GrowingLayer.__init__(self)
        StateLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of K/V where they are given by place, of a state where it is given by name."""
        LinearAttentionAndFullAttentionLayer.lazy_initialization(self, *args, **kwargs)


def state_layers(layers: Sequence[Any]) -> list[Any]:
    """Those of a cache's layers that have states."""
    return [layer for layer in layers if isinstance(layer, LinearAttentionCacheLayerMixin)]


def _states(layers: Sequence[Any]) -> Iterator[tuple[str, Any, int, Tensor]]:
    """Kind, layer, number and tensor `[batch, ...]` of each state, the widest numbers first."""
    found = [
        (kind, layer, index, state)
        for layer in state_layers(layers)
        for kind, states in ((CONV, layer.conv_states), (RECURRENT, layer.recurrent_states))
        for index, state in states.items()
        if state is not None
    ]
    yield from sorted(found, key=lambda each: -each[3].element_size())


def state_writes(layers: Sequence[Any]) -> list[tuple[Tensor, int]]:
    """Each state, and how often it was written to in place, to see later whether others did."""
    states = (
        state
        for layer in state_layers(layers)
        for held in (layer.conv_states, layer.recurrent_states)
        for state in held.values()
        if state is not None
    )
    return [(state, -1 if state.is_inference() else state._version) for state in states]


def state_shapes(layers: Sequence[Any]) -> tuple[StateShape, ...]:
    """Shapes of the states of one row, of layers that a forward has filled."""
    number = {id(layer): index for index, layer in enumerate(layers)}
    return tuple(
        StateShape(
            f"layers.{number[id(layer)]}.{kind}.{index}",
            tuple(_last(kind, layer, index, state).shape[1:]),
            state.dtype,
        )
        for kind, layer, index, state in _states(layers)
    )


def take_states(layers: Sequence[Any]) -> list[Tensor]:
    """Copies of the states of the only row as they are now."""
    return [
        _last(kind, layer, index, state)[0].clone() for kind, layer, index, state in _states(layers)
    ]


def take_windows(layers: Sequence[Any], tokens: int) -> list[Tensor] | None:
    """The same after so many tokens of the last forward, of the only row; `None` if not kept.

    Only of layers that have windows of convolutions and no other state.
    """
    found = []
    for kind, layer, index, _ in _states(layers):
        window = layer.windows.get(tokens, {}).get(index)
        if kind != CONV or window is None:
            return None
        found.append(window[0])
    return found


def keep_windows(layers: Sequence[Any], tokens: Sequence[int]) -> None:
    """Have layers keep windows after so many tokens of the next forward, and forget others."""
    for layer in state_layers(layers):
        layer.windows_at, layer.windows = tuple(tokens), {}


def put_states(
    layers: Sequence[Any],
    shapes: Sequence[StateShape],
    rows: Sequence[Sequence[Tensor] | None],
    device: torch.device,
) -> None:
    """Have layers hold these states, one list per row; `None` for a row without tokens so far."""
    for number, shape in enumerate(shapes):
        _, layer_index, kind, index = shape.name.split(".")
        layer, at = layers[int(layer_index)], int(index)
        parts = [
            torch.zeros(shape.shape, dtype=shape.dtype, device=device)
            if row is None
            else row[number].to(device)
            for row in rows
        ]
        state = torch.stack(parts)
        if kind == CONV:
            layer.lazy_initialization(
                conv_states=state, state_idx=at, conv_kernel_size=state.shape[-1]
            )
            layer.conv_states[at].copy_(state)
            layer.has_previous_state[at] = True
        else:
            layer.lazy_initialization(recurrent_states=state, state_idx=at)
            layer.recurrent_states[at].copy_(state)


def crop_kv(layers: Sequence[Any], columns: int) -> None:
    """Hold K/V of the first columns alone; states stay what they are."""
    for layer in growing(layers):
        with layer.changing():
            DynamicLayer.crop(layer, columns - layer.get_seq_length())


def _last(kind: str, layer: Any, index: int, state: Tensor) -> Tensor:
    """A state without the past that layers keep on demand."""
    return state[..., -layer.conv_kernel_size[index] :] if kind == CONV else state
