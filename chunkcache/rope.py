"""KeyMover: turns keys computed at one position into keys at another.

RoPE rotates pairs of dimensions by angles linear in the position, so `K(p') = R(p' - p) K(p)`,
exactly, whatever the model around it. How a model pairs dimensions, which ones it rotates and with
which frequencies is derived from the model by trying every known way on real keys of a lone token,
which depend on nothing but itself and its position. Angles are taken at the old and at the new
position from the model's own frequencies and then composed: `delta * inv_freq` would be off by
1e-2 at position 100,000, since the model rounds `position * inv_freq` to float32.

Su et al., RoFormer (https://arxiv.org/abs/2104.09864).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.codec import LayerKV

# Largest error of a predicted key, relative to the largest key, that rounding explains. Wrong
# rules are off by 20 % and more.
TOLERANCE = {
    torch.float64: 2e-4,
    torch.float32: 2e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}


@dataclass(frozen=True, eq=False)
class Rotation:
    """One way of rotating the last dimension of `[..., tokens, head_dim]`.

    Attributes:
        inv_freq: Radians per position of each pair, `[pairs]`, float32.
        first: Where the rotated dimensions begin.
        interleaved: Pairs are neighbours (GPT-J), not the two halves (GPT-NeoX).
        sign: Direction, 1 or -1.
    """

    inv_freq: Tensor
    first: int
    interleaved: bool
    sign: int

    def move(self, x: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Rotate `[..., tokens, head_dim]` from positions `old` to `new`, each `[tokens]`.

        Computed in float32 (float64 for float64) and rounded once.
        """
        pairs = self.inv_freq.shape[0]
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (part.to(dtype) for part in self._between(old, new))
        part = x[..., self.first : self.first + 2 * pairs].to(dtype)
        moved = x.clone()
        target = moved[..., self.first : self.first + 2 * pairs]
        if self.interleaved:
            a, b = part[..., 0::2], part[..., 1::2]
            target[..., 0::2] = a * cos - b * sin
            target[..., 1::2] = b * cos + a * sin
        else:
            a, b = part[..., :pairs], part[..., pairs:]
            target[..., :pairs] = a * cos - b * sin
            target[..., pairs:] = b * cos + a * sin
        return moved

    def _between(self, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, `[tokens, pairs]` in float64, of the angles from `old` to `new`."""
        freq = self.inv_freq.to(old.device)
        a, b = (p.float()[:, None] * freq * self.sign for p in (old, new))
        a, b = a.double(), b.double()
        cos = b.cos() * a.cos() + b.sin() * a.sin()
        sin = b.sin() * a.cos() - b.cos() * a.sin()
        return cos, sin


@dataclass(frozen=True)
class LayerRule:
    """How one layer's keys and values turn with position; `None` where they do not."""

    keys: Rotation | None
    values: Rotation | None


@dataclass(frozen=True)
class KeyMover:
    """The rules of all layers of a model. Found by `find_rules`, proven in `proof.py`."""

    layers: tuple[LayerRule | None, ...]

    def move(self, kv: LayerKV, layer: int, old: Tensor, new: Tensor) -> LayerKV:
        """One layer's `[..., tokens, head_dim]` keys and values at other positions, `[tokens]`."""
        rule = self.layers[layer]
        if rule is None:
            return kv
        keys = rule.keys.move(kv[0], old, new) if rule.keys else kv[0]
        values = rule.values.move(kv[1], old, new) if rule.values else kv[1]
        return keys, values

    def move_all(
        self, layers: Sequence[LayerKV | None], old: Tensor, new: Tensor
    ) -> list[LayerKV | None]:
        """All layers' `[kv_heads, tokens, head_dim]` at once: layers that turn alike, together."""
        parts = [list(kv) if kv else [] for kv in layers]
        groups: defaultdict[tuple[Rotation, int, torch.Size], list[int]] = defaultdict(list)
        for index, (rule, kv) in enumerate(zip(self.layers, parts, strict=True)):
            for part, rotation in enumerate((rule.keys, rule.values) if rule and kv else ()):
                if rotation is not None:
                    groups[rotation, part, kv[part].shape].append(index)
        for (rotation, part, _), alike in groups.items():
            stacked = torch.stack([parts[index][part] for index in alike])
            for index, turned in zip(alike, rotation.move(stacked, old, new), strict=True):
                parts[index][part] = turned
        return [(kv[0], kv[1]) if kv else None for kv in parts]


LoneToken = Sequence[LayerKV | None]
"""Keys and values of every layer for single tokens: `[batch, kv_heads, 1, head_dim]` each."""


def find_rules(model: nn.Module, at_zero: LoneToken, moved: dict[int, LoneToken]) -> KeyMover | str:
    """Find each layer's rule.

    Args:
        model: Its buffers give the frequencies.
        at_zero: What a few lone tokens cache at position 0.
        moved: The same tokens at other positions.

    Returns:
        The rules, or why there are none for some layer.
    """
    widths = {part.shape[-1] for kv in at_zero if kv for part in kv}
    known = _candidates(model, widths)
    rules: list[LayerRule | None] = []
    for index, start in enumerate(at_zero):
        if start is None:
            rules.append(None)
            continue
        found = []
        for part, what in enumerate(("keys", "values")):
            samples = {p: layers[index][part] for p, layers in moved.items()}  # type: ignore[index]
            rule = _fit(start[part], samples, known)
            if isinstance(rule, str):
                return f"layer {index}: no known rotation explains how its {what} turn ({rule})"
            found.append(rule)
        rules.append(LayerRule(found[0], found[1]))
    return KeyMover(tuple(rules))


_Fit = Rotation | str | None


def _candidates(model: nn.Module, widths: set[int]) -> list[Rotation]:
    """Every known way of rotating vectors of these widths with the model's frequencies."""
    found = []
    for table, interleaved, sign in product(_frequencies(model), (False, True), (1, -1)):
        spares = {width - 2 * table.shape[0] for width in widths}
        found += [
            Rotation(table, first, interleaved, sign)
            for first in sorted({0, *spares})
            if first >= 0
        ]
    return found


def _frequencies(model: nn.Module) -> list[Tensor]:
    """All frequency tables that the model has, without duplicates."""
    tables: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2].endswith("inv_freq") and "original" not in name:
            table = buffer.detach().float().cpu()
            if not any(torch.equal(table, other) for other in tables):
                tables.append(table)
    return tables


def _fit(start: Tensor, samples: dict[int, Tensor], known: list[Rotation]) -> _Fit:
    """The rotation that turns `start` into every sample, `None` for no turn, or what is wrong."""
    tolerance = TOLERANCE[start.dtype]
    if _error(None, start, samples) <= tolerance:
        return None
    best, smallest = None, float("inf")
    for rotation in known:
        if rotation.first + 2 * rotation.inv_freq.shape[0] <= start.shape[-1]:
            error = _error(rotation, start, samples)
            if error < smallest:
                best, smallest = rotation, error
    return best if best and smallest <= tolerance else f"the best is off by {smallest:.0e}"


def _error(rotation: Rotation | None, start: Tensor, samples: dict[int, Tensor]) -> float:
    worst = 0.0
    for position, sample in samples.items():
        expected: Any = start
        if rotation is not None:
            new = torch.tensor([position], device=start.device)
            expected = rotation.move(start, torch.zeros_like(new), new)
        difference = (sample.double() - expected.double()).abs().max() / sample.abs().max()
        worst = max(worst, float(difference))
    return worst
