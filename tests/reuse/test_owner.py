"""One cache object in two calls at once: one clear error before anything is computed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from chunkcache import RedisChunkCache
from chunkcache.errors import UnsupportedCallError
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens

PROMPT, OTHER = tokens(150, seed=1), tokens(170, seed=2)
IN_USE = "used by another call at the same time"


def generate(model, ids, cache=None, new=8, **how):
    how |= {"max_new_tokens": new, "do_sample": False}
    return model.generate(ids, past_key_values=cache, **how)


class Meanwhile:
    """Calls something in the middle of an answer, as a streamer or a criterion may."""

    def __init__(self, call, step=3):
        self.call, self.left = call, step

    def __call__(self, ids, scores, **_):
        self.left -= 1
        if self.left == 0:
            self.call()
        return torch.zeros(len(ids), dtype=torch.bool)


def in_a_thread(call):
    """What a call in another thread raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).exception()


@pytest.mark.parametrize(
    ("where", "how"), [("thread", "generate"), ("thread", "forward"), ("same thread", "generate")]
)
def test_the_later_call_raises_and_the_first_is_right(where, how):
    model, store, errors = tiny("llama"), MemoryStore(), []
    cache = RedisChunkCache(model, store)

    def second():
        if how == "generate":
            return generate(model, OTHER, cache)
        return model(OTHER, past_key_values=cache, logits_to_keep=1)

    def both():
        if where == "thread":
            errors.append(in_a_thread(second))
            return
        try:
            second()
        except UnsupportedCallError as error:
            errors.append(error)

    answer = generate(model, PROMPT)
    criteria = [Meanwhile(both)]
    if how == "forward":  # that its owner still runs is seen when it goes on
        with pytest.raises(UnsupportedCallError, match=IN_USE):
            generate(model, PROMPT, cache, stopping_criteria=criteria)
    else:
        assert torch.equal(generate(model, PROMPT, cache, stopping_criteria=criteria), answer)
        assert [type(error) for error in errors] == [UnsupportedCallError]
        assert IN_USE in str(errors[0])
    for prompt in (PROMPT, OTHER):
        fresh = RedisChunkCache(model, store)
        assert torch.equal(generate(model, prompt, fresh), generate(model, prompt))
    assert torch.equal(generate(model, OTHER, cache), generate(model, OTHER))  # it is free again


def test_two_direct_forwards_at_once():
    model = tiny("llama")
    cache = RedisChunkCache(model, MemoryStore(), hooks="observers")
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go_on.wait(30)

    handle = model.model.layers[0].register_forward_hook(wait)

    @torch.no_grad()
    def forward():
        return model(PROMPT, past_key_values=cache)

    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        first = pool.submit(forward)
        assert inside.wait(30)
        with pytest.raises(UnsupportedCallError, match=IN_USE):
            model(OTHER, past_key_values=cache)
        with pytest.raises(UnsupportedCallError, match=IN_USE):
            generate(model, OTHER, cache)
        go_on.set()
        handle.remove()
        assert torch.allclose(first.result().logits, model(PROMPT).logits, atol=1e-4)


def test_turns_may_come_from_one_thread_after_another():
    model, text = tiny("llama"), PROMPT
    cache = RedisChunkCache(model, MemoryStore())
    for turn in range(3):
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(generate, model, text, cache).result()
        assert torch.equal(answer, generate(model, text))
        assert not turn or cache.report.reused
        text = torch.cat([answer, tokens(20, seed=turn)], 1)


def test_many_threads_on_one_global_cache():
    """Whoever comes first is right; nobody is wrong; nothing wrong is stored."""
    model, store = tiny("llama"), MemoryStore()
    cache = RedisChunkCache(model, store)
    prompts = [tokens(100 + 7 * i, seed=i) for i in range(12)]
    plain = [generate(model, prompt) for prompt in prompts]

    def ask(i):
        try:
            return torch.equal(generate(model, prompts[i], cache), plain[i])
        except UnsupportedCallError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(ask, range(12)))
    assert all(outcome is True or IN_USE in outcome for outcome in outcomes)
    assert True in outcomes
    for prompt, wanted in zip(prompts, plain, strict=True):
        assert torch.equal(generate(model, prompt, RedisChunkCache(model, store)), wanted)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_forward_that_was_interrupted_does_not_own_the_cache_for_ever(elsewhere):
    model = tiny("llama")
    cache = RedisChunkCache(model, MemoryStore(), hooks="observers")

    def interrupt(*_):
        raise KeyboardInterrupt

    def ask():
        with pytest.raises(KeyboardInterrupt):
            generate(model, PROMPT, cache)

    handle = model.model.layers[1].register_forward_hook(interrupt)
    if elsewhere:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    else:
        ask()
    handle.remove()
    assert torch.equal(generate(model, OTHER, cache), generate(model, OTHER))
