"""KeyRotation: turns keys computed at one position into keys at another.

RoPE rotates pairs of dimensions by angles linear in the position, so `K(p') = R(p' - p) K(p)`,
exactly, whatever the model around it. How a model pairs dimensions, which ones it rotates and with
which frequencies is derived from the model by trying every known way on real keys of a lone token,
which depend on nothing but itself and its position. Angles are taken at the old and at the new
position from the model's own frequencies and then composed: `delta * inv_freq` would be off by
1e-2 at position 100,000, since the model rounds `position * inv_freq` to float32.

Su et al., RoFormer (https://arxiv.org/abs/2104.09864).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product

import torch
from torch import Tensor, nn

from chunkcache.kv.layout import LayerKV
from chunkcache.kv.transfer import together

# Largest relative error of one rounding, in each type.
UNIT = {
    torch.float64: 2**-24,  # parts of many models compute in float32 all the same
    torch.float32: 2**-24,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
}
ANGLE_UNIT = 2**-24  # angles are computed in float32, whatever the type
# So many a turned key has behind it, relative to the length of its pair: of cosine and sine, of the
# products with them, of their sum, and ours. And two to spare.
ROUNDINGS = 6


def wide(x: Tensor) -> Tensor:
    """In float64, on the CPU: not every device has that type."""
    return x.cpu().double()


def rounding(lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """What a few roundings leave of error in numbers out of pairs of these lengths, in float64."""
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # no number is rounded finer
    return wide(lengths) * (ROUNDINGS * UNIT[dtype]) + ROUNDINGS * smallest


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
        """Rotate `[..., tokens, head_dim]` from positions `old` to `new`, each `[tokens]`."""
        moved = torch.empty_like(x)
        self.turn(x, moved, self.angles(old, new))
        return moved

    def angles(self, old: Tensor, new: Tensor) -> Tensor:
        """Cosine and sine, `[2, tokens, pairs]`, of the angles from `old` to `new`; as `wide`."""
        freq = self.inv_freq.to(old.device)
        then, now = (p.float()[:, None] * freq * self.sign for p in (old, new))
        between = wide(now) - wide(then)
        return torch.stack((between.cos(), between.sin()))

    def turn(self, x: Tensor, out: Tensor, angles: Tensor) -> None:
        """Write `x`, `[..., tokens, head_dim]`, to `out`, elsewhere in memory, turned by `angles`.

        Computed in float32 (float64 for float64) and rounded once.
        """
        end = self.first + 2 * self.inv_freq.shape[0]
        if end - self.first < x.shape[-1]:
            out.copy_(x)
        part, target = x[..., self.first : end], out[..., self.first : end]
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = target if dtype == x.dtype else torch.empty_like(target, dtype=dtype)
        cos, sin = angles.to(dtype).to(x.device)
        (a, b), (c, d) = self._pairs(part.to(dtype)), self._pairs(wide)
        torch.mul(a, cos, out=c).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=d).addcmul_(a, sin)
        if wide is not target:
            target.copy_(wide)

    def slack(self, x: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """How far off rounding to `dtype` may leave `[..., tokens, head_dim]` at `positions`.

        In proportion to each pair, not to the largest key: biases make some keys a hundred times as
        large as others, and a wrong rule for those others must show. As `wide`.
        """
        x = wide(x)
        lengths, angles = x.abs(), torch.zeros_like(x)
        end = self.first + 2 * len(self.inv_freq)
        length = torch.hypot(*self._pairs(x[..., self.first : end]))
        angle = wide(positions)[:, None] * wide(self.inv_freq)
        for half in self._pairs(lengths[..., self.first : end]):
            half.copy_(length)
        for half in self._pairs(angles[..., self.first : end]):
            half.copy_(length * angle * (2 * ANGLE_UNIT))
        return rounding(lengths, dtype) + angles

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second of each pair."""
        if self.interleaved:
            return x[..., 0::2], x[..., 1::2]
        first, second = x.chunk(2, dim=-1)
        return first, second


@dataclass(frozen=True)
class LayerRule:
    """How one layer's keys and values turn with position; `None` where they do not."""

    keys: Rotation | None
    values: Rotation | None


@dataclass(frozen=True)
class KeyRotation:
    """The rules of all layers of a model. Found by `find_rules`, verified in `model/moving.py`."""

    layers: tuple[LayerRule | None, ...]

    def move(self, kv: LayerKV, layer: int, old: Tensor, new: Tensor) -> LayerKV:
        """One layer's `[..., tokens, head_dim]` keys and values at other positions, `[tokens]`."""
        rule = self.layers[layer]
        if rule is None:
            return kv
        keys = rule.keys.move(kv[0], old, new) if rule.keys else kv[0]
        values = rule.values.move(kv[1], old, new) if rule.values else kv[1]
        return keys, values

    def move_into(
        self,
        targets: Sequence[LayerKV | None],
        sources: Sequence[LayerKV | None],
        old: Tensor,
        new: Tensor,
    ) -> None:
        """Write all layers' keys and values to other memory, as they are at other positions.

        Straight into place: a copy of K/V costs as much as their turning does. And layers that lie
        at equal distances, which turn alike, all at once: one by one they are too small for
        several threads.
        """
        known: dict[Rotation | None, Tensor | None] = {None: None}
        for part in (0, 1):
            turns = [
                ((rule.keys, rule.values)[part] if rule else None, target[part], source[part])
                for rule, target, source in zip(self.layers, targets, sources, strict=True)
                if target is not None and source is not None
            ]
            for rotation, alike in groupby(turns, key=lambda turn: turn[0]):
                if rotation not in known:
                    known[rotation] = rotation.angles(old, new)
                _, outs, xs = zip(*alike, strict=True)
                for out, x in together(outs, xs):
                    if rotation is None:
                        out.copy_(x)
                    else:
                        rotation.turn(x, out, known[rotation])


LoneToken = Sequence[LayerKV | None]
"""Keys and values of every layer for single tokens: `[batch, kv_heads, 1, head_dim]` each."""


def find_rules(
    model: nn.Module,
    at_zero: LoneToken,
    moved: dict[int, LoneToken],
    noises: Sequence[tuple[float, float]],
) -> KeyRotation | str:
    """Find each layer's rule.

    Args:
        model: Its buffers give the frequencies.
        at_zero: What a few lone tokens cache at position 0.
        moved: The same tokens at other positions.
        noises: How far off each layer's keys and values may be because of what comes before them.

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
            rule = _fit(start[part], samples, known, start[part].dtype, noises[index][part])
            if isinstance(rule, str):
                return f"layer {index}: no known rotation explains how its {what} turn ({rule})"
            found.append(rule)
        rules.append(LayerRule(found[0], found[1]))
    return KeyRotation(tuple(rules))


def find_misfit(
    rule: LayerRule, start: Tensor, samples: dict[int, Tensor], dtype: torch.dtype, noise: float
) -> str:
    """Why a layer's queries do not turn as its keys do, or `""`. They may have other dimensions.

    Args:
        rule: How its keys and values turn.
        start: Queries of a few lone tokens at position 0, `[batch, heads, 1, query_dim]`.
        samples: Of the same tokens at other positions.
        dtype: What they were rounded to.
        noise: As `find_rules` has it.
    """
    rotation, width = rule.keys or rule.values, start.shape[-1]
    known = []
    if rotation is not None:
        firsts = sorted({0, rotation.first, width - 2 * len(rotation.inv_freq)})
        known = [replace(rotation, first=first) for first in firsts if first >= 0]
    found = _fit(start, samples, known, dtype, noise)
    if isinstance(found, str):
        return found
    return "they stay as they are" if found is None and rotation is not None else ""


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


def _fit(
    start: Tensor,
    samples: dict[int, Tensor],
    known: list[Rotation],
    dtype: torch.dtype,
    noise: float,
) -> _Fit:
    """The rotation that turns `start` into every sample, `None` for no turn, or what is wrong."""
    best: Rotation | None = None
    smallest, why = float("inf"), ""
    for rotation in (None, *known):
        if rotation is None or rotation.first + 2 * len(rotation.inv_freq) <= start.shape[-1]:
            ratio, figures = _error(rotation, start, samples, dtype, noise)
            if ratio <= 1 and rotation is None:
                return None
            if ratio < smallest:
                best, smallest, why = rotation, ratio, figures
    return best if smallest <= 1 else f"the best is off by {why}"


def _error(
    rotation: Rotation | None,
    start: Tensor,
    samples: dict[int, Tensor],
    dtype: torch.dtype,
    noise: float,
) -> tuple[float, str]:
    """How far off a rule is at worst, as a multiple of what rounding explains, and in figures."""
    worst, figures = 0.0, ""
    for position, sample in samples.items():
        expected, allowed = start, rounding(start.abs(), dtype)
        if rotation is not None:
            new = torch.tensor([position], device=start.device)
            expected = rotation.move(start, torch.zeros_like(new), new)
            allowed = rotation.slack(start, new, dtype)
        allowed = allowed + noise
        error = (wide(sample) - wide(expected)).abs()
        ratios = (error / allowed).nan_to_num(torch.inf)
        at = int(ratios.argmax())
        if float(ratios.flatten()[at]) > worst:
            worst = float(ratios.flatten()[at])
            largest = float(sample.abs().max())
            figures = (
                f"{float(error.flatten()[at]) / largest:.1e} of the largest at position "
                f"{position}, bound {float(allowed.flatten()[at]) / largest:.1e}"
            )
    return worst, figures
