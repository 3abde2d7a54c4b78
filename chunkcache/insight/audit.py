"""Audit: how far a prompt that went through the cache is from a full run of the model.

Reused tokens have no outputs, so outputs are compared where text is generated from: at the last
token of the prompt and at those of a continuation that both runs are fed. What the reused tokens do
have, their K/V, is compared token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chunkcache.insight.runs import Run
from chunkcache.kv.layout import LayerKV
from chunkcache.prompt_map import STYLE, MapRow, html_map
from chunkcache.report import Report

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class Audit:
    """A prompt run in full and through the cache.

    Deviations are norms of differences over norms of the full run's, so 0.01 is one percent; NaN
    where there is nothing to compare: padding, layers without K/V, and in sliding-window layers
    the tokens that a plain cache has dropped.

    Attributes:
        kl: `[batch, positions]`, Kullback-Leibler divergence of the next-token distribution of the
            cached run from that of the full run, in nats: at the last token of the prompt, then at
            each token of the continuation.
        top1: `[batch, positions]`, whether both runs have the same most likely token there.
        key_deviation: `[layers]`, of the prompt's keys.
        value_deviation: `[layers]`, of the prompt's values.
        token_deviation: `[batch, tokens]`, of each token's K/V in all layers together.
        continuation: `[batch, positions - 1]`, the ids that both runs were fed.
        report: What the cache did in its run.
        full_ms: The prompt's forward in full, in milliseconds. Run once, so no benchmark.
        cached_ms: The prompt's forward through the cache, reading included.
    """

    kl: Floats
    top1: npt.NDArray[np.bool_]
    key_deviation: Floats
    value_deviation: Floats
    token_deviation: Floats
    continuation: npt.NDArray[np.int64]
    report: Report
    full_ms: float
    cached_ms: float

    @property
    def mean_kl(self) -> float:
        """Mean of `kl`."""
        return float(self.kl.mean())

    @property
    def max_kl(self) -> float:
        """Largest `kl`."""
        return float(self.kl.max())

    @property
    def top1_agreement(self) -> float:
        """Share of positions with the same most likely token, 0 to 1."""
        return float(self.top1.mean())

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON; `None` for NaN."""
        arrays = ("kl", "key_deviation", "value_deviation", "token_deviation")
        return {
            "mean_kl": self.mean_kl,
            "max_kl": self.max_kl,
            "top1_agreement": self.top1_agreement,
            **{name: _plain(getattr(self, name)) for name in arrays},
            "top1": self.top1.tolist(),
            "continuation": self.continuation.tolist(),
            "full_ms": self.full_ms,
            "cached_ms": self.cached_ms,
            "report": self.report.to_dict(),
        }

    def _lines(self) -> list[tuple[str, str]]:
        return [
            ("KL to a full run", f"mean {self.mean_kl:.1e}, largest {self.max_kl:.1e} nats"),
            ("same top-1 token", f"at {self.top1.sum():,} of {self.top1.size:,} positions"),
            ("keys off by", _largest(self.key_deviation)),
            ("values off by", _largest(self.value_deviation)),
            (
                "prompt's forward",
                f"{self.full_ms:,.0f} ms in full, {self.cached_ms:,.0f} ms cached",
            ),
            ("cache", str(self.report)),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:18}{value}" for name, value in self._lines())

    def _repr_html_(self) -> str:
        """The numbers, and the prompt coloured by what the cache did with its tokens."""
        rows = "".join(
            f'<tr><th style="text-align:left">{name}</th>'
            f'<td style="text-align:left">{escape(value)}</td></tr>'
            for name, value in self._lines()
        )
        bars = html_map([MapRow(row.spans) for row in self.report.rows])
        return f'<div style="{STYLE}"><table>{rows}</table>{bars}</div>'


def compare(full: Run, cached: Run, mask: Tensor, report: Report) -> Audit:
    """What two runs of a prompt with this mask, `[batch, tokens]`, differ in."""
    pairs = list(zip(full.logits, cached.logits, strict=True))
    kl = torch.stack([divergence(a, b) for a, b in pairs], dim=1)
    top1 = torch.stack([a.argmax(-1) == b.argmax(-1) for a, b in pairs], dim=1)
    by_layer, by_token = _deviations(full.kv, cached.kv, mask != 0)
    return Audit(
        kl=kl.numpy(),
        top1=top1.numpy(),
        key_deviation=by_layer[:, 0],
        value_deviation=by_layer[:, 1],
        token_deviation=by_token,
        continuation=full.continuation.numpy(),
        report=report,
        full_ms=full.prompt_ms,
        cached_ms=cached.prompt_ms,
    )


def divergence(full: Tensor, cached: Tensor) -> Tensor:
    """KL(full || cached) of `[batch, vocabulary]` logits, `[batch]`."""
    log_p, log_q = full.double().log_softmax(-1), cached.double().log_softmax(-1)
    p = log_p.exp()
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))  # tokens that both rule out: not NaN
    return terms.sum(-1).clamp(min=0)


def _deviations(
    full: Sequence[LayerKV | None], cached: Sequence[LayerKV | None], seen: Tensor
) -> tuple[Floats, Floats]:
    """Relative deviations of keys and values, `[layers, 2]`, and of tokens, `[batch, tokens]`."""
    error = torch.zeros(len(full), 2, *seen.shape, dtype=torch.float64)
    norm = torch.zeros_like(error)
    for index, (its, mine) in enumerate(zip(full, cached, strict=True)):
        if its is None or mine is None:
            continue
        for part, (a, b) in enumerate(zip(its, mine, strict=True)):
            columns = min(a.shape[2], b.shape[2])
            a, b = (_wide(x[:, :, x.shape[2] - columns :]) for x in (a, b))
            behind = seen.shape[1] - columns
            for squares, x in ((error, b.to(a.device) - a), (norm, a)):
                squares[index, part, :, behind:] = x.pow(2).sum(dim=(1, 3))
    error, norm = (torch.where(seen, squares, 0.0) for squares in (error, norm))
    by_layer = error.sum(dim=(2, 3)) / norm.sum(dim=(2, 3))
    by_token = error.sum(dim=(0, 1)) / norm.sum(dim=(0, 1))
    return by_layer.sqrt().numpy(), by_token.sqrt().numpy()


def _wide(x: Tensor) -> Tensor:
    """At least float32: squares of 16-bit numbers overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _largest(deviation: Floats) -> str:
    if np.isnan(deviation).all():
        return "unknown: the layers cannot be compared"
    layer = int(np.nanargmax(deviation))
    return f"{deviation[layer]:.1e} at most (layer {layer})"


def _plain(array: Floats) -> list[Any]:
    """Nested lists, with `None` for NaN."""
    known = array.astype(object)
    known[np.isnan(array)] = None
    plain: list[Any] = known.tolist()
    return plain
