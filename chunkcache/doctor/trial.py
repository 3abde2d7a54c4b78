"""Trial: can a model's K/V be reused, and does it pay here?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from chunkcache.doctor.break_even import measure_break_even
from chunkcache.doctor.checks import ModelHealth, Step
from chunkcache.errors import UnsupportedCallError, UnsupportedModelError
from chunkcache.keys import ZSTD
from chunkcache.kv.codec import Codec
from chunkcache.model.check import check_model
from chunkcache.model.self_test import SelfTest
from chunkcache.model.state import ModelState
from chunkcache.reuse.states import spacing
from chunkcache.settings import Settings
from chunkcache.stores.base import ChunkStore


def examine_model(name: str, model: nn.Module, store: ChunkStore, step: Step) -> ModelHealth:
    """Test what can be done with a model, and measure whether it pays.

    Args:
        name: Its name.
        model: The model, in evaluation mode.
        store: An open store.
        step: Told what is being done.

    Raises:
        StoreError: The store failed.
    """
    settings = Settings.load()
    step("testing the model")
    try:
        inner = check_model(model)
    except (UnsupportedModelError, UnsupportedCallError) as error:
        return ModelHealth(name, bypass_reason=str(error))
    state = ModelState.of(inner)
    identity = state.identity()
    tested = state.self_test(identity, store)
    if tested.bypass_reason or tested.layout is None:
        return ModelHealth(name, bypass_reason=tested.bypass_reason)
    rotation = state.verified_rotation(identity, tested.layout, store)
    # The blob of a chunk, before compression: of its token ids, only the digits matter.
    ids, codec = [10_000] * settings.chunk_size, Codec(settings.codec.removesuffix(ZSTD))
    nbytes = codec.form(tested.layout, ids, 0, "0" * 64, "").file.size
    return ModelHealth(
        name,
        str(tested.layout.dtype).removeprefix("torch."),
        moving=rotation if isinstance(rotation, str) else "",
        token_bytes=nbytes / settings.chunk_size,
        state_bytes=tested.layout.state_bytes,
        state_every=_state_every(tested, settings),
        break_even=measure_break_even(model, store, step),
        note=replanning(inner),
    )


def replanning(model: nn.Module) -> str:
    """What to know of cuDNN's attention, should the model compute with it; or `""`."""
    config: Any = model.config
    device = next(model.parameters()).device
    backends: Any = torch.backends.cuda
    uses_sdpa = device.type == "cuda" and config._attn_implementation == "sdpa"
    if not uses_sdpa or not backends.cudnn_sdp_enabled():
        return ""
    return (
        "PyTorch may take cuDNN's attention here, which plans anew for each new length of a prompt "
        "(some 40 ms a call on an H100, others report): see whether "
        "torch.backends.cuda.enable_cudnn_sdp(False) makes the first token come sooner"
    )


def _state_every(tested: SelfTest, settings: Settings) -> int:
    """Tokens between snapshots of states, 0 without any. Each chunk has windows of convolutions."""
    if tested.layout is None or not tested.layout.states:
        return 0
    if tested.cuts_windows:
        return settings.chunk_size
    return spacing(tested.layout, settings.state_every)
