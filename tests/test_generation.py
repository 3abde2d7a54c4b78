"""What else `generate()` can be asked for: scores, streams, a decoding loop of the caller's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from chunkcache import RedisChunkCache
from chunkcache.model.check import CACHE
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens

IDS = tokens(300, seed=1)
HOW = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def cold_and_warm(model: Any, store: MemoryStore, **how: Any) -> list[Any]:
    """Outputs of two runs, of which the second has found the prompt."""
    outs = []
    for _ in range(2):
        cache = RedisChunkCache(model, store)
        outs.append(model.generate(IDS, **{CACHE: cache}, **HOW, **how))
        cache.flush()
    assert cache.report.reused > 200
    return outs


@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_scores_and_logits(llama: Any, store: MemoryStore, how: dict[str, Any]) -> None:
    how |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain = llama.generate(IDS, **HOW, **how)
    for out in cold_and_warm(llama, store, **how):
        assert torch.equal(out.sequences, plain.sequences)
        for name in ("scores", "logits"):
            mine, its = getattr(out, name), getattr(plain, name)
            assert len(mine) == len(its) == 6
            torch.testing.assert_close(torch.stack(mine), torch.stack(its), atol=1e-3, rtol=1e-4)
        if "num_beams" in how:
            torch.testing.assert_close(out.sequences_scores, plain.sequences_scores)
            assert torch.equal(out.beam_indices, plain.beam_indices)


class Heard(BaseStreamer):
    """What a streamer was given."""

    def __init__(self) -> None:
        self.put_in: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.put_in.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_the_whole_prompt_and_each_token(llama: Any, store: MemoryStore) -> None:
    plain = Heard()
    llama.generate(IDS, streamer=plain, **HOW)
    for _ in range(2):
        mine = Heard()
        cache = RedisChunkCache(llama, store)
        llama.generate(IDS, **{CACHE: cache}, streamer=mine, **HOW)
        cache.flush()
        assert mine.put_in == plain.put_in
        assert mine.ended
    assert cache.report.reused > 200


def second_best(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A decoding loop of the caller's own: the second likeliest token at each step."""
    cache, ids = kwargs[CACHE], input_ids
    fed = ids
    with torch.no_grad():
        for _ in range(5):
            logits = model(fed, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits[:, -1]
            fed = logits.topk(2).indices[:, 1:]
            ids = torch.cat([ids, fed], dim=1)
    return ids


def test_a_decoding_loop_of_the_callers(llama: Any, store: MemoryStore) -> None:
    plain = llama.generate(IDS, custom_generate=second_best, **HOW)
    assert not torch.equal(plain[:, :305], llama.generate(IDS, **HOW)[:, :305])
    for out in cold_and_warm(llama, store, custom_generate=second_best):
        assert torch.equal(out, plain)


def test_an_assistant_that_drafts(llama: Any, store: MemoryStore) -> None:
    """Drafts that are often right and often wrong: both ways through the cache's crop."""
    helper = tiny("llama")
    helper.lm_head.weight.data.add_(0.15 * torch.randn_like(helper.lm_head.weight))
    plain = llama.generate(IDS, max_new_tokens=40, do_sample=False)
    for turn in range(2):
        cache = RedisChunkCache(llama, store)
        out = llama.generate(
            IDS, **{CACHE: cache}, assistant_model=helper, max_new_tokens=40, do_sample=False
        )
        cache.flush()
        assert torch.equal(out, plain)
        assert (cache.report.reused > 200) == bool(turn)
