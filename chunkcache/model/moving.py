"""May this model's K/V be moved? Its rotation is derived, and proven down to the logits.

Three tests, on at most 24 tokens each. *Lone token*: alone in the cache, a token's keys depend on
itself and its position only, which shows the rule. That is not enough (some models scale queries
with the position): a *far shift* of a dozen tokens must turn all keys by the rule and leave the
logits as they are. *Scatter*: some tokens computed last, into the middle, must give what one
pass gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.kv.codec import KVLayout, LayerKV
from chunkcache.kv.layers import GrowingLayer, settle_all
from chunkcache.kv.rope import KeyMover, find_rules
from chunkcache.model.check import CACHE
from chunkcache.model.proof import ROUNDING, cache_of, forward, growing_layers, probe_ids, takes
from chunkcache.model.ranks import Ranks
from chunkcache.model.scatter import MASKED_ATTENTION, close_layers, open_layers, scatter_mask

_LONE_POSITIONS = (1, 2, 5, 17, 63, 200, 480)
_SHIFTED_TOKENS = 12
_SCATTERED = (2, 3, 7, 11, 12, 18, 21, 23)
_SCATTER_TOKENS = 24


def find_rotation(model: nn.Module) -> KeyMover | None:
    """The rule by which a model's keys turn with their position; `None` if it is not known.

    Good for turning keys and turning them back, which needs no proof. For models that passed
    `proof.prove`.
    """
    try:
        with torch.no_grad():
            found = _lone_token_test(model) if takes(model, "position_ids") else ""
    except Exception:  # a model may fail in any way on positions that are not its own
        return None
    return None if isinstance(found, str) else found


def prove_moving(model: nn.Module, layout: KVLayout, proven: bool = False) -> KeyMover | str:
    """The model's proven mover, or why there is none. For models that passed `proof.prove`.

    Of a model that is `proven` to be movable, only the rule is found.
    """
    if obstacle := _known_obstacle(model):
        return obstacle
    try:
        with torch.no_grad():
            found = _lone_token_test(model)
            if proven or isinstance(found, str):
                return found
            return _far_shift_test(model, found, layout) or _scatter_test(model, layout) or found
    except Exception as error:  # a model may fail in any way on positions that are not its own
        return f"the self-test for moving could not run: {type(error).__name__}: {error}"[:300]


def _known_obstacle(model: nn.Module) -> str:
    config: Any = model.config
    text_config = config.get_text_config(decoder=True)
    if Ranks.of(model).size > 1:
        return "the model is shared by several processes (tensor parallel)"
    if not takes(model, "position_ids"):
        return "the model takes no position_ids, so its positions cannot be set"
    if text_config._attn_implementation not in MASKED_ATTENTION:
        return (
            f"attention {text_config._attn_implementation!r} takes no mask: load the model with "
            "attn_implementation='sdpa'"
        )
    if getattr(text_config, "floor_scale", None) and getattr(
        text_config, "attn_temperature_tuning", False
    ):
        return "the model scales queries by the length of its cache (attn_temperature_tuning)"
    return ""


def _lone_token_test(model: nn.Module) -> KeyMover | str:
    longest = _longest(model)
    ids = probe_ids(model)[0, :3, None]
    at_zero, _ = _run(model, ids, torch.zeros(1, 1, dtype=torch.long))
    moved = {
        position: _run(model, ids, torch.tensor([[position]]))[0]
        for position in _LONE_POSITIONS
        if position < longest
    }
    return find_rules(model, at_zero, moved)


def _far_shift_test(model: nn.Module, mover: KeyMover, layout: KVLayout) -> str:
    shift = _longest(model) - _SHIFTED_TOKENS - 1
    if shift <= 0:
        return "the model has too few positions to move anything"
    ids = probe_ids(model)[:, :_SHIFTED_TOKENS]
    near = torch.arange(_SHIFTED_TOKENS)
    start, logits = _run(model, ids, near[None])
    there, far_logits = _run(model, ids, near[None] + shift)
    for index, (kv, far) in enumerate(zip(start, there, strict=True)):
        if kv is None or far is None:
            continue
        device = kv[0].device
        turned = mover.move(kv, index, near.to(device), near.to(device) + shift)
        for what, mine, its in zip(("keys", "values"), turned, far, strict=True):
            if not _close(mine, its, layout.dtype):
                return f"layer {index}: {what} of several tokens do not turn like those of one"
    if not _close(logits, far_logits, layout.dtype):
        return "the model's output depends on absolute positions, not on its keys alone"
    return ""


def _scatter_test(model: nn.Module, layout: KVLayout) -> str:
    ids = probe_ids(model)[:, :_SCATTER_TOKENS]
    whole, logits = _run(model, ids, torch.arange(_SCATTER_TOKENS)[None])
    columns = torch.tensor(_SCATTERED, device=logits.device)
    layers = growing_layers(model) or []
    settle_all(layers, layout, 1, _SCATTER_TOKENS, logits.device)
    for layer, kv in zip(layers, whole, strict=True):
        if kv is not None:
            layer.place(0, 0, kv[0][0], kv[1][0])
            layer.hold(_SCATTER_TOKENS)
            layer.keys[:, :, _SCATTERED] = layer.values[:, :, _SCATTERED] = 7.0
    open_layers(layers, columns, _SCATTER_TOKENS)
    out: Any = model(
        input_ids=ids[:, _SCATTERED].to(logits.device),
        position_ids=columns[None],
        attention_mask=scatter_mask(model, columns, _SCATTER_TOKENS, 1),
        use_cache=True,
        **{CACHE: cache_of(layers)},
    )
    close_layers(layers)
    if not _close(out.logits, logits[:, _SCATTERED], layout.dtype):
        return "tokens computed into the middle of a prompt come out otherwise than in one pass"
    for layer, kv in zip(layers, whole, strict=True):
        if kv is not None and not _close(layer.keys, kv[0], layout.dtype):
            return "keys computed into the middle of a prompt differ from those of one pass"
    return ""


def _run(
    model: nn.Module, ids: Tensor, positions: Tensor
) -> tuple[Sequence[LayerKV | None], Tensor]:
    """What every layer caches for `[batch, tokens]` ids at these positions, and the logits."""
    layers = growing_layers(model) or []
    positions = positions.expand(ids.shape[0], -1)
    logits = forward(model, ids, cache_of(layers), position_ids=positions)
    kv = [(la.keys, la.values) if isinstance(la, GrowingLayer) else None for la in layers]
    return kv, logits


def _longest(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config(decoder=True).max_position_embeddings)


def _close(mine: Tensor, its: Tensor, dtype: torch.dtype) -> bool:
    # Angles are rounded to float32 whatever the model computes in.
    rounding = max(ROUNDING[dtype], ROUNDING[torch.float32])
    difference = (mine.double() - its.double()).abs().max()
    return bool(difference <= rounding * its.double().abs().max())
