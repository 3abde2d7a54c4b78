"""Sampled audits: how far some of the prompts with moved text were from full runs.

The K/V that a prompt has left are copied, their last token is computed once more behind the others,
and its next-token distribution is compared with that of a full run. So what was served is audited,
not another run of it; the answer works with K/V and outputs that nobody touches.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from random import Random
from threading import Lock, Thread
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from chunkcache.insight.audit import divergence
from chunkcache.insight.runs import last_logits
from chunkcache.model.self_test import cache_of
from chunkcache.reuse.prompt import Prompt
from chunkcache.settings import BACKGROUND, Settings
from chunkcache.sums import SUMS

logger = logging.getLogger(__name__)

_CHANCE = Random()  # its own: generation may depend on the global one
_BUSY = Lock()  # one audit at a time, so that they never pile up


def sample_audit(
    model: nn.Module, settings: Settings, layers: Sequence[Any], prompt: Prompt
) -> Thread | None:
    """Audit a prompt with the chance `audit_rate`. Returns the thread that does so, if one does.

    Never raises, and changes nothing that is held. A prompt is passed over while another is
    audited.

    Args:
        model: The model, which has just computed the prompt.
        settings: `audit_rate`, `audit_in` and `audit_bound`.
        layers: The cache layers with the K/V of the prompt and of nothing behind it.
        prompt: All of its tokens.
    """
    if _CHANCE.random() >= settings.audit_rate or model.training or not _BUSY.acquire(False):
        return None
    try:
        served = cache_of(copy.deepcopy(list(layers)))
        work = (model, served, prompt, settings.audit_bound)
        # Autocast is of the thread that has switched it on.
        if settings.audit_in == BACKGROUND and not torch.is_autocast_enabled(_device(layers)):
            thread = Thread(target=_audit, args=work, name="chunkcache audit")
            thread.start()
            return thread
    except Exception as error:  # no memory for the copy, no more threads
        _fail(error)
        _BUSY.release()
        return None
    _audit(*work)
    return None


@torch.inference_mode()
def _audit(model: nn.Module, served: DynamicCache, prompt: Prompt, bound: float) -> None:
    try:
        served.crop(-1)
        mine = last_logits(model, served, prompt, 1)
        config: Any = model.config
        full = last_logits(model, DynamicCache(config=config), prompt, prompt.ids.shape[1])
        kl = divergence(full, mine)
        same = full.argmax(-1) == mine.argmax(-1)
        over = int((kl > bound).sum()) if bound else 0
        SUMS.add(
            Counter(
                {
                    ("audits", "rows"): len(kl),
                    ("audits", "kl"): float(kl.sum()),
                    ("audits", "same_top1"): int(same.sum()),
                    ("audits", "over_bound"): over,
                }
            )
        )
        if over:
            logger.warning(
                "an audited prompt of %s tokens is off by KL %.3f nats, more than audit_bound=%g: "
                "take a stronger repair, or see cache.audit() for where the error is",
                f"{prompt.ids.shape[1]:,}", float(kl.max()), bound,
            )  # fmt: skip
    except Exception as error:  # the answer must not fail for it
        _fail(error)
    finally:
        _BUSY.release()


def _fail(error: Exception) -> None:
    SUMS.add(Counter({("audits", "failed"): 1}))
    logger.warning("a prompt could not be audited: %s", error)


def _device(layers: Sequence[Any]) -> str:
    return next((layer.keys.device.type for layer in layers if layer.is_initialized), "cpu")
