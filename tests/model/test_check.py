from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from chunkcache.errors import ChunkCacheError, UnsupportedCallError, UnsupportedModelError
from chunkcache.model.check import check_model
from tests.models import tiny, tiny_config

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "mixtral", "opt", "bloom"])
def test_decoders_are_taken(model_type: str) -> None:
    model = tiny(model_type)
    assert check_model(model) is model


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_ff=8, num_layers=1, num_heads=2, d_kv=8)
    )


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"T5ForConditionalGeneration.*encoder-decoder"):
        check_model(t5())


@pytest.mark.parametrize(
    "thing",
    [
        None,
        "gpt2",
        3,
        torch.nn.Linear(2, 2),
        torch.nn.Sequential(),
        object(),
        SimpleNamespace(config=1),
        LlamaModel,
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_what_is_no_model_is_refused(thing: object) -> None:
    with pytest.raises(UnsupportedModelError, match=type(thing).__name__):
        check_model(thing)


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_a_model_that_cannot_generate_is_refused(kind: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{kind.__name__} cannot generate"):
        check_model(kind(BertConfig(vocab_size=50, **SMALL)))


def test_a_decoder_without_its_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        check_model(LlamaModel(tiny_config("llama")))


def test_a_cache_of_its_own_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"MiniMaxForCausalLM.*cache class of its own"):
        check_model(tiny("minimax"))


def test_a_static_cache_in_the_generation_settings_is_refused() -> None:
    model = tiny("llama")
    model.generation_config.cache_implementation = "static"
    with pytest.raises(UnsupportedCallError, match=r"cache_implementation='static'.*None"):
        check_model(model)
    model.generation_config.cache_implementation = None
    assert check_model(model) is model


def test_refusals_are_type_errors_of_ours() -> None:
    assert issubclass(UnsupportedModelError, TypeError)
    assert issubclass(UnsupportedModelError, ChunkCacheError)
    assert issubclass(UnsupportedCallError, ValueError)


# ------------------------------------------------------------------------ wrappers


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "peft": lora,
    "compile": compiled,
    "compiled peft": lambda model: compiled(lora(model)),
    "peft of compiled": lambda model: lora(compiled(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_are_looked_through(wrap: Any) -> None:
    model = tiny("llama")
    assert check_model(wrap(model)) is model


def test_what_a_wrapper_hides_is_refused_all_the_same() -> None:
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        check_model(compiled(t5()))


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "openai-gpt", "xlm"])
def test_models_without_such_a_cache_are_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="takes no past_key_values"):
        check_model(tiny(model_type))


def test_an_older_transformers_is_refused_when_the_cache_is_imported() -> None:
    program = """
import transformers
transformers.__version__ = "5.17.3"
import chunkcache
try:
    chunkcache.RedisChunkCache
except ImportError as error:
    print(error)
from chunkcache import RedisChunkCache
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    why = "chunkcache needs transformers>=5.18,<5.25, and 5.17.3 is installed"
    assert done.stdout.startswith(why)
    assert f"\nImportError: {why}" in done.stderr
