from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from chunkcache.errors import SettingError, UnsupportedCallError
from chunkcache.insight.runs import run_both
from chunkcache.reuse.prompt import Prompt
from tests.models import tiny
from tests.models import tokens as random_ids


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


def both(model: Any, prompt: Prompt, continuation: Any = None, new_tokens: int = 4) -> Any:
    return run_both(model, DynamicCache(config=model.config), prompt, continuation, new_tokens)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "bloom", "opt", "lfm2"])
def test_the_continuation_is_that_of_generate(kind: str) -> None:
    model, ids = tiny(kind), random_ids(40, rows=2)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    out = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    full, other = both(model, Prompt.of(ids, mask), new_tokens=5)
    assert torch.equal(full.continuation, out[:, 40:])
    for mine, its in zip(full.logits, other.logits, strict=True):
        assert torch.equal(mine, its)


def test_logits_are_those_of_one_pass(llama: Any) -> None:
    ids, behind = random_ids(40), random_ids(6, seed=1)
    full, _ = both(llama, Prompt.of(ids), behind.tolist())
    with torch.no_grad():
        whole = llama(torch.cat([ids, behind], dim=1)).logits[:, 39:]
    assert torch.allclose(torch.stack(full.logits, dim=1), whole, atol=1e-4)
    assert torch.equal(full.continuation, behind)


def test_kv_are_those_of_the_prompt_alone(llama: Any) -> None:
    ids = random_ids(40)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
    for run in both(llama, Prompt.of(ids)):
        for layer, kv in zip(cache.layers, run.kv, strict=True):
            assert torch.equal(layer.keys, kv[0])
            assert torch.equal(layer.values, kv[1])


@pytest.mark.parametrize("continuation", [None, [], [[]]])
def test_no_continuation(llama: Any, continuation: Any) -> None:
    full, _ = both(llama, Prompt.of([[5]]), continuation, new_tokens=0)
    assert len(full.logits) == 1
    assert full.continuation.shape == (1, 0)


def test_the_model_is_left_as_it_was(llama: Any) -> None:
    before = torch.random.get_rng_state()
    both(llama, Prompt.of(random_ids(9)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert not llama.training


def test_bad_arguments(llama: Any) -> None:
    prompt = Prompt.of(random_ids(9, rows=2))
    with pytest.raises(SettingError, match="pad prompts on the left"):
        both(llama, Prompt.of([[5, 6, 7]], [[1, 1, 0]]))
    for number in (-1, 1.5, True, "4"):
        with pytest.raises(SettingError, match="new_tokens"):
            both(llama, prompt, new_tokens=number)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="1 rows and input_ids 2"):
        both(llama, prompt, [3, 4])
    with pytest.raises(SettingError, match="continuation"):
        both(llama, prompt, "and so on")
    with pytest.raises(UnsupportedCallError, match=r"model\.eval"):
        both(tiny("llama").train(), prompt)
    with pytest.raises(UnsupportedCallError, match="MambaForCausalLM"):
        both(tiny("mamba"), prompt)
