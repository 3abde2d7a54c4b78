"""Attributes: what a model's modules hold besides weights, and how they hang together."""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from chunkcache.model.outline import Outline
from chunkcache.model.values import ATOMS, Values, function_in, is_library, layers_of, names_in
from chunkcache.model.weights import Parts

# What `nn.Module` keeps for itself (weights and hooks are looked at elsewhere), and what says how a
# model was loaded, is trained or keeps account of itself, not what it computes.
_INERT = frozenset(vars(nn.Module())) | frozenset(
    (
        "_caches",
        "_compiled_call_impl",
        "_gradient_checkpointing_func",
        "_hf_hook",
        "_hf_peft_config_loaded",
        "_is_hf_initialized",
        "all_tied_weights_keys",
        "compute_dtype",
        "compute_type_is_set",
        "conv1d_state",
        "generate",  # covered by enabled(): it calls the model, which does not call it
        "generation_config",
        "gradient_checkpointing",
        "hf_device_map",
        "hf_quantizer",
        "is_loaded_in_4bit",
        "is_loaded_in_8bit",
        "is_parallelizable",
        "is_quantized",
        "kernel_config",
        "kwargs",
        "long_inv_freq",  # of longrope: out of the configuration, at its first forward
        "loss_function",
        "loss_type",
        "max_seq_len_cached",
        "model_parallel",
        "name_or_path",
        "peft_config",
        "quant_state",
        "quantization_method",
        "recurrent_states",
        "vocab_size",
        "warnings_issued",
    )
)
_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.modules.batchnorm._NormBase)


class Attributes:
    """Describes each module: class, children, attributes.

    `None` counts as no attribute, and `training` only where a module's code asks for it, and not at
    all for a model that is in training mode as a whole.
    """

    def __init__(self) -> None:
        self._seen: tuple[Outline, bool] | None = None
        self._plain: dict[str, object] = {}
        self._others: list[tuple[str, int, str]] = []

    def add(self, values: Values, outline: Outline, in_training: bool) -> None:
        """Describe the modules anew where something is not as it was the last time."""
        # Of plain attributes the same object is the same value; others are described each time.
        parts = outline.parts
        if self._seen != (outline, in_training):
            self._seen = outline, in_training
            self._read(parts, in_training)
        values.lines.update(self._plain)
        for key, number, name in self._others:
            module = parts[number][1]
            if not _is_usual(module, name, vars(module)[name]):
                values.add(key, vars(module)[name])

    def _read(self, parts: Parts, in_training: bool) -> None:
        self._plain, self._others = {}, []
        numbers = {id(module): number for number, (_, module) in enumerate(parts)}
        for number, (path, module) in enumerate(parts):
            kind: Any = type(module)
            children = [(n, numbers.get(id(child))) for n, child in module._modules.items()]
            self._plain[path] = f"{kind.__module__}.{kind.__qualname__}", children
            for name, value in vars(module).items():
                if name in _INERT or value is None:
                    continue
                if type(value) not in ATOMS:
                    self._others.append((f"{path}.{name}", number, name))
                elif not _is_account(module, name, value):
                    self._plain[f"{path}.{name}"] = value
            if module.training and not in_training and reads_training(kind):
                self._plain[f"{path}.training"] = True


def why_random(model: nn.Module, parts: Parts) -> str:
    """Why the model computes something else each time, or `""`: training mode of a part."""
    if model.training:
        return ""  # told by the hook
    for path, module in parts:
        kind: Any = type(module)
        if module.training and (
            (isinstance(module, _RANDOM) and getattr(module, "p", True))
            or (reads_training(kind) and _has_dropout(module))
        ):
            return f"{path} is in training mode: call model.eval()"
    return ""


def _has_dropout(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return any(
        any(word in name for word in ("drop", "jitter", "noise"))
        for source in (module, config)
        for name, value in getattr(source, "__dict__", {}).items()
        if type(value) in (float, int) and value > 0
    )


@lru_cache(maxsize=1024)
def reads_training(kind: Any) -> bool:
    """Whether the code of a module's class asks if it is in training mode."""
    return any(
        "training" in names_in(function.__code__)
        for base in kind.__mro__
        if base not in PreTrainedModel.__mro__
        for function in map(function_in, vars(base).values())
        if isinstance(function, FunctionType)
    )


def _is_account(module: nn.Module, name: str, value: Any) -> bool:
    """Whether it is what Transformers notes down of a model as a whole."""
    numbers = (float, int, Tensor)
    of_model = isinstance(module, PreTrainedModel) and name[0] == "_"
    return of_model and not (type(value) in numbers or callable(value))


def _is_usual(module: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute says nothing: a method of the class, at most wrapped by a library."""
    if _is_account(module, name, value):
        return True
    own = getattr(type(module), "forward" if name == "_old_forward" else name, None)
    if own is None or not callable(value):
        return False
    layers = [getattr(layer, "__func__", layer) for layer in layers_of(value)]
    code = getattr(layers.pop(), "__code__", None)
    return code is getattr(layers_of(own)[-1], "__code__", value) and all(
        is_library(layer) for layer in layers if isinstance(layer, FunctionType)
    )
