"""Digest of a model's weights and adapters, and a cheap watch that tells when they have changed.

Small models are hashed whole. Of the large tensors of large models an even sample is hashed: an
8-billion-parameter model takes a fraction of a second instead of many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

# Up to this many bytes of weights every byte counts (about 0.2 s at memory speed).
WHOLE_MODEL_BYTES = 4 << 30
# Tensors up to this size count whole in any case: norms and biases, the usual targets of edits.
WHOLE_TENSOR_BYTES = 1 << 20
SAMPLED_RUNS = 1024
SAMPLED_RUN_BYTES = 64


def digest_weights(model: nn.Module, edited: Collection[str] = ()) -> str:
    """SHA-256 over name, shape, dtype and content of every parameter and buffer (64 hex digits).

    The content of each tensor enters through xxh3-128: fast, and against mistakes, not against
    somebody who forges weights.

    Args:
        model: The model.
        edited: Names of tensors that were seen to change in this process. They are hashed whole,
            since an edit can be smaller than the gaps of a sample.
    """
    small = sum(t.nbytes for _, t in _tensors(model)) <= WHOLE_MODEL_BYTES
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(model), key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        if tensor.device.type == "meta":
            digest.update(b"offloaded")
        else:
            digest.update(_content(tensor.detach(), small or name in edited))
    return digest.hexdigest()


def digest_adapters(model: nn.Module) -> str:
    """State of PEFT layers: which adapters are active, merged, disabled, and how they are scaled.

    Their weights are parameters of the model and count there.
    """
    lines = [
        f"{name} {_adapter_state(module)}"
        for name, module in model.named_modules()
        if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters")
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else "none"


def watch(model: nn.Module) -> dict[str, object]:
    """What to compare to learn whether the model's K/V may have changed, by tensor or module.

    Looks at storage, in-place version counter and dtype of every tensor and at the state of
    adapters, never at content: about a millisecond for a model of 8 billion parameters.
    """
    seen: dict[str, object] = {}
    for path, module in model.named_modules():
        if hasattr(module, "merged_adapters"):
            seen[path] = _adapter_state(module)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                # Inference tensors have no version counter: an in-place change could not be seen,
                # so they never compare equal and are hashed again.
                version = object() if tensor.is_inference() else tensor._version
                place = f"{path}.{name}" if path else name
                seen[place] = (tensor.data_ptr(), version, tensor.dtype, tensor.shape)
    return seen


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _adapter_state(module: Any) -> str:
    state = {
        name: getattr(module, name, None)
        for name in ("active_adapters", "merged_adapters", "disable_adapters", "scaling")
    }
    return repr(state)


def _content(tensor: Tensor, whole: bool) -> bytes:
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    if not whole and data.numel() > WHOLE_TENSOR_BYTES:
        step = data.numel() // SAMPLED_RUNS
        starts = torch.arange(SAMPLED_RUNS, device=data.device) * step
        inside = torch.arange(SAMPLED_RUN_BYTES, device=data.device)
        data = data[(starts[:, None] + inside).reshape(-1)]
    return xxhash.xxh3_128_digest(data.cpu().numpy().data)
