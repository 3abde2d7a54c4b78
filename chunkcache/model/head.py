"""The head of a model: its output embeddings, which turn last hidden states into logits.

Their input is all that the logits of a token need, and much smaller than its K/V. So of tokens that
are not computed it is put before that of the others, where the model gives it to the head: its own
code makes logits, loss and shapes of it. Whether a model has such a head is tried once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.kv.layout import KVLayout, output_layout
from chunkcache.kv.rope import wide
from chunkcache.model.compiled import is_compiled
from chunkcache.model.self_test import (
    BOUNDS,
    NoVerdict,
    SelfTest,
    cache_of,
    growing_layers,
    layers_with,
    outputs,
    probe_ids,
    takes,
)

_LOCAL = threading.local()  # `.input`: of the forward that this thread runs
_WRONG = "its output embeddings are not given one tensor [batch, tokens, hidden], once in a forward"


class HeadInput:
    """What one forward gives to the head, and what is put before it.

    Args:
        model: The model.
        shape: Rows and columns that are computed.
        layout: What a token's hidden state is, where that is known.
        before: `[batch, tokens, hidden]` hidden states of tokens that stand before these.
        given: Tokens of each row that the caller has given.
        keep: `logits_to_keep` as the caller gave it: a number, or indices of tokens given.
        tests: Whether it is for more than one forward.

    Attributes:
        hidden: `[batch, tokens, hidden]`, what was computed behind `before`.
        trouble: Why logits are not what they must be, or `""`.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int],
        layout: KVLayout | None = None,
        before: Tensor | None = None,
        given: int = 0,
        keep: Any = None,
        *,
        tests: bool = False,
    ) -> None:
        self.head, self.tests = head_of(model), tests
        self.hidden: Tensor | None = None
        self.trouble = _WRONG  # until it was called as it must be
        self._shape, self._layout, self._before = shape, layout, before
        self._given, self._keep = given, keep

    def take(self, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        """See what the head is given. Returns what it shall be given instead."""
        hidden = args[0] if len(args) == 1 else None
        if (
            self.hidden is not None
            or not isinstance(hidden, Tensor)
            or hidden.dim() != 3
            or tuple(hidden.shape[:2]) != self._shape
            or self._layout not in (None, output_layout(hidden.dtype, hidden.shape[2]))
        ):
            self.trouble = _WRONG
            return None
        self.hidden, self.trouble = hidden.detach(), ""
        whole = hidden
        if self._before is not None:
            whole = torch.cat([self._before.to(hidden.device), hidden], 1)
        return (self._kept(whole),)

    def _kept(self, whole: Tensor) -> Tensor:
        """What `logits_to_keep` means, of hidden states that end where the tokens given end."""
        keep = self._keep
        if isinstance(keep, int):
            return whole[:, -keep:] if keep > 0 else whole
        if isinstance(keep, Tensor) and keep.dtype in (torch.int32, torch.int64):
            return whole[:, torch.where(keep < 0, keep, keep - self._given).to(whole.device)]
        return whole if keep is None else whole[:, keep]


def head_of(model: nn.Module) -> nn.Module | None:
    """The model's output embeddings, if it has any."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def tap(model: nn.Module) -> None:
    """Have the head's input seen by who is fed: see `feed`."""
    head = head_of(model)
    if head is not None and _before not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_before)


def untap(model: nn.Module) -> None:
    """Leave the head as it was."""
    head = head_of(model)
    hooks = {} if head is None else head._forward_pre_hooks
    for number in [number for number, hook in hooks.items() if hook is _before]:
        del hooks[number]


def feed(head_input: HeadInput | None) -> None:
    """Of the forward that this thread runs next, have this one see what the head is given."""
    current = getattr(_LOCAL, "input", None)
    if head_input is not None or (current is not None and not current.tests):
        _LOCAL.input = head_input


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before(head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
    head_input = getattr(_LOCAL, "input", None)
    return head_input.take(args) if head_input is not None and head_input.head is head else None


# ---------------------------------------------------------------------- the test


def run_head_test(model: nn.Module, kv: KVLayout | None) -> SelfTest:
    """Whether a model's logits, of all tokens, and its loss can be had from stored hidden states.

    As for K/V, one pass is compared with one that is continued. `kv` is what its layers cache,
    which may be reused; `None` for a model that has passed before. The layout found is that of its
    outputs.
    """
    if head_of(model) is None:
        return SelfTest("this model has no output embeddings")
    if is_compiled(model):
        return SelfTest("a compiled model's output embeddings are not seen")
    try:
        with torch.no_grad():
            return _test(model, kv) if kv else _measure(model)
    except Exception as error:  # a model may fail in any way on a prompt that is not its own
        return SelfTest(NoVerdict(error, "the test of the output embeddings"))


def _measure(model: nn.Module) -> SelfTest:
    ids = probe_ids(model)[:, :2]
    with _fed(HeadInput(model, (1, 2), tests=True)) as seen:
        outputs(model, ids, cache_of(growing_layers(model) or []))
    if seen.hidden is None or seen.trouble:
        return SelfTest(seen.trouble)
    return SelfTest("", output_layout(seen.hidden.dtype, seen.hidden.shape[2]))


def _test(model: nn.Module, kv: KVLayout) -> SelfTest:
    found = _measure(model)
    if found.bypass_reason or found.layout is None:
        return found
    ids = probe_ids(model)
    count, cut = ids.shape[1], ids.shape[1] // 2 - 1
    labels = ids.clone()
    labels[:, 3:7] = -100
    more: dict[str, Any] = {"labels": labels} if takes(model, "labels") else {}
    layers = growing_layers(model) or []
    want = _logits_and_loss(model, ids, layers, more)
    with _fed(HeadInput(model, (1, count), found.layout, tests=True)) as seen:
        outputs(model, ids, cache_of(growing_layers(model) or []))
    if seen.hidden is None or seen.trouble:
        return SelfTest(seen.trouble)
    before, known = seen.hidden[:, :cut], layers_with(model, kv, layers, ids[:, :cut])
    with _fed(HeadInput(model, (1, count - cut), found.layout, before, tests=True)) as seen:
        got = _logits_and_loss(model, ids[:, cut:], known, more)
    if seen.trouble:
        return SelfTest(seen.trouble)
    (logits, loss), (whole, whole_loss) = got, want
    if logits.shape != whole.shape:
        return SelfTest("logits of all tokens are not those of the tokens that it is given")
    strict, loose = BOUNDS[found.layout.dtype]
    for what, mine, theirs, bound in (
        ("logits from stored hidden states", logits[:, :cut], whole[:, :cut], strict),
        ("logits behind stored hidden states", logits[:, cut:], whole[:, cut:], loose),
        ("the loss from stored hidden states", loss, whole_loss, loose),
    ):
        error = float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9))
        if not error <= bound:
            return SelfTest(f"{what} differ by {error:.1e} of the largest, bound {bound:.1e}")
    return found


def _logits_and_loss(
    model: nn.Module, ids: Tensor, layers: list[Any], more: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    out = outputs(model, ids, cache_of(layers), **more)
    logits: Tensor = out.logits
    return wide(logits), wide(out.loss) if more else torch.ones(1)


@contextmanager
def _fed(head_input: HeadInput) -> Iterator[HeadInput]:
    before = getattr(_LOCAL, "input", None)
    _LOCAL.input = head_input
    try:
        yield head_input
    finally:
        _LOCAL.input = before
