"""Models by name: a folder, a hub id, or the sample model that comes without a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkcache.errors import SettingError
from chunkcache.samples import load_smollm2, smollm2_folder

SMOLLM2 = "SmolLM2-135M-Instruct"


def load_model(name: str) -> tuple[Any, Any]:
    """Model, in evaluation mode and on the accelerator if there is one, and tokenizer.

    Args:
        name: What `--model` says: a folder, a hub id, or `SMOLLM2`, which asks no hub.

    Raises:
        SettingError: It cannot be loaded.
    """
    loaded: Any
    if name == SMOLLM2:
        loaded, tokenizer = load_smollm2()
    else:
        local = Path(name).is_dir()  # then no hub is asked
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                name, dtype="auto", local_files_only=local
            )
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        except Exception as error:  # a folder's files fail in every library that reads them
            raise _cannot(name, error) from error
    there = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if there else "cpu"
    return loaded.to(device).eval(), tokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer alone.

    Raises:
        SettingError: It cannot be loaded.
    """
    place = smollm2_folder() if name == SMOLLM2 else name
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=Path(place).is_dir())
    except Exception as error:
        raise _cannot(name, error, "--tokenizer") from error


def _cannot(name: str, error: Exception, option: str = "--model") -> SettingError:
    return SettingError(
        f"{option} {name!r} cannot be loaded: {type(error).__name__}: {error}. "
        f"Name a model's folder, a hub id, or {SMOLLM2}, the sample model"
    )
