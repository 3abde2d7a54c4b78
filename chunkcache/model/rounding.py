"""How far rounding alone takes a model's numbers: measured, since it differs from model to model.

Two ways to the same K/V or logits never agree to the last bit, and how much a model makes of that
depends on its weights, its data type, and on how far its positions are: large key biases or a
million positions turn the last bits of keys into a tenth of the logits. So a self-test compares
what it found with plain runs at the same positions whose attention sees keys and values that are
off by their last bits. They need nothing of the model but a forward: the layers of the cache do it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from chunkcache.kv.layers import IndexedLayer
from chunkcache.kv.rope import ANGLE_UNIT, ROUNDINGS, UNIT, LayerRule, Rotation, rounding, wide

# What is found may be so many times as far off as the runs that measure rounding: those are few,
# and of about the same size (a third to three times, over models, data types and distances; up to
# five where experts are asked, since rounding may decide which).
MARGIN = 6.0
PARTS = ("keys", "values", "queries")
# And so far off, relative to the largest number, if a model makes nothing of rounding: sums are
# added up in another order when more or fewer tokens are computed at once.
SUMS = {
    torch.float64: 1e-5,  # parts of many models compute in float32 all the same
    torch.float32: 1e-4,
    torch.float16: 1e-4,
    torch.bfloat16: 1e-4,
}


# The same of their mean square over all numbers of a token, most of which is chance and cancels.
MEAN_MARGIN = 2.0

# What a forward computed for `[1, ..., tokens, dim]` in the order of its steps: keys, values and,
# where they are seen, queries of each layer that caches K/V, and last the logits.
Steps = Sequence[tuple[Tensor, ...]]


class RoundedLayer(IndexedLayer):
    """Holds K/V as they were computed, and shows attention such as another rounding had left.

    Args:
        far: `[batch]` positions by which each row shall seem to be further on: angles are products
            of a position and a frequency in float32, and are off by more the further on.
        rule: How keys and values turn; without it, angles are exact.
        seed: The same for the same numbers.
        keys_only: Values are as they were computed.
    """

    def __init__(
        self,
        far: Tensor,
        rule: LayerRule | None = None,
        seed: int = 0,
        keys_only: bool = False,
    ) -> None:
        super().__init__()
        self._far, self._keys_only = far, keys_only
        self._rotations = (rule.keys, rule.values) if rule else (None, None)
        self._random = torch.Generator().manual_seed(seed)  # nobody else's

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the parent's, but what is returned is off by its last bits."""
        keys, values = super().update(*args, **kwargs)
        keys = self._off(keys, self._rotations[0])
        return keys, values if self._keys_only else self._off(values, self._rotations[1])

    def _off(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * (1 + 2 * UNIT[x.dtype] * self._noise(x.shape, x.device))
        if rotation is not None:
            freq = rotation.inv_freq.to(x.device)
            size = ANGLE_UNIT * self._far.to(x.device)[:, None, None, None] * freq
            angles = size * self._noise((*x.shape[:-1], len(freq)), x.device)
            turned = torch.empty_like(wide)
            rotation.turn(wide, turned, torch.stack((angles.cos(), angles.sin())))
            wide = turned
        return wide.to(x.dtype)

    def _noise(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Evenly distributed, with a standard deviation of 1."""
        return ((torch.rand(shape, generator=self._random) * 2 - 1) * 3**0.5).to(device)


def spread(rounded: Tensor, plain: Tensor) -> Tensor:
    """`[rows]`: how far the rows of a rounded run are from the plain one, each or one before it."""
    differences = (wide(rounded) - wide(plain)).abs().flatten(1)
    return differences.amax(1).cummax(0).values


def compare_steps(
    mine: Steps, its: Steps, dtype: torch.dtype, noise: Callable[[], Steps], is_alike: bool
) -> str:
    """In what step two computations of the same tokens differ by more than rounding, or `""`.

    Args:
        mine: The one.
        its: The other.
        dtype: What numbers are rounded to.
        noise: The other again, as rounding has left it elsewhere; asked for where they differ.
        is_alike: Whether the same numbers were computed in the same way, so that rounding alone
            changes none, or in few models. If not, most tokens must agree: what a little rounding
            changes (which expert is asked) is much for a few.
    """
    is_off = not is_alike
    for index, (these, those) in enumerate(zip(mine, its, strict=True)):
        # Queries may be seen in one of them only.
        errors = [_size(wide(a) - wide(b)) for a, b in zip(these, those, strict=False)]
        for part, (error, wanted) in enumerate(zip(errors, those, strict=False)):
            size = _size(wide(wanted))
            bound = size * (ROUNDINGS * UNIT[dtype]) + SUMS[dtype] * size.max()
            if is_off and not (error <= bound).all():
                off = _size(wide(noise()[index][part]) - wide(wanted))
                bound = bound.maximum(MEAN_MARGIN * off.cummax(0).values)
            ratios = (error / bound).nan_to_num(torch.inf, torch.inf)
            if not (ratio := float(ratios.max() if is_alike else ratios.median())) <= 1:
                at = int((ratios - ratio).abs().argmin())
                what = "logits"
                if index < len(mine) - 1:
                    what = f"{PARTS[part]} of the {index + 1}. layer that caches any"
                return (
                    f"{what} differ by {float(error[at] / size[at]):.1e} of their size, "
                    f"bound {float(bound[at] / size[at]):.1e}"
                )
        is_off = is_off or any(bool(error.any()) for error in errors)
    return ""


def _size(x: Tensor) -> Tensor:
    """`[tokens]`: root mean square over all that `[1, ..., tokens, dim]` holds of each."""
    return x.pow(2).mean(-1).flatten(0, -2).mean(0).sqrt()


def judge(
    mine: Tensor,
    its: Tensor,
    noise: Callable[[], Tensor],
    slack: Tensor | None = None,
    few_may_differ: bool = False,
) -> str:
    """What is wrong with `mine`, or `""`.

    Args:
        mine: Numbers, `[..., tokens, dim]`.
        its: What they should be.
        noise: How far off rounding has left such numbers; asked for where they are off at all.
        slack: What the last step to each number rounds by itself, if not by a few bits.
        few_may_differ: By more than noise: rounding may decide which expert a token asks.
    """
    largest = float(its.abs().max())
    if slack is None:
        slack = rounding(its.abs(), its.dtype)
    bound = slack + SUMS[its.dtype] * largest
    error = (wide(mine) - wide(its)).abs()
    if (error <= bound).all():  # never, where something is no number
        return ""
    bound += MARGIN * noise()
    excess = (error - bound).nan_to_num(torch.inf)
    of_tokens = excess.movedim(-2, 0).flatten(1).amax(1)
    if (of_tokens <= 0).all() or (
        few_may_differ and of_tokens.isfinite().all() and of_tokens.median() <= 0
    ):
        return ""
    worst = int(excess.argmax())
    off, allowed = (float(x.flatten()[worst]) / largest for x in (error, bound))
    return f"deviate by {off:.1e} of the largest, bound {allowed:.1e}"
