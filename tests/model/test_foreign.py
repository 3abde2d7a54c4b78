"""Hooks and replaced forwards of others: normal prefill, nothing stored, and a word about whose."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from torch.nn.modules import module as torch_modules
from torch.nn.utils.parametrizations import weight_norm
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.models.llama.modeling_llama import rotate_half

from chunkcache import RedisChunkCache
from chunkcache.errors import SettingError
from chunkcache.model.foreign import foreign_code, without_foreign_hooks
from chunkcache.reuse.hook import install
from chunkcache.reuse.prefill import Prefill
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny
from tests.models import tokens as random_ids

IDS = random_ids(300)


def generate(model, ids, cache=None, new=6):
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False)


def written(store):
    return sum(len(page) for page in store.scan("safetensors@"))


def steer(output):
    return output + 3.0


def by_return(model):
    return model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: steer(out))


def in_place(model):
    return model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: out.add_(3.0))


def at_a_position(model):
    """As activation patching does: it finds no token 120 in a trimmed prompt."""

    def patch(module, args, out):
        if out.shape[1] > 1:
            out[:, 120] += 3.0

    return model.model.layers[1].mlp.register_forward_hook(patch)


def on_inputs(model):
    return model.model.layers[1].mlp.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))


def on_all_modules(model):
    mlp = model.model.layers[1].mlp
    return torch_modules.register_module_forward_hook(
        lambda module, args, out: steer(out) if module is mlp else None
    )


def under_no_grad(model):
    """Its code is torch's, which calls somebody's."""
    return model.model.layers[1].mlp.register_forward_hook(
        torch.no_grad()(lambda module, args, out: steer(out))
    )


def named_as_theirs(model):
    """Its name is Transformers', its code somebody's."""

    @functools.wraps(rotate_half)
    def hook(module, args, out):
        return steer(out)

    return model.model.layers[1].mlp.register_forward_hook(hook)


class Replaced:
    """A handle, as hooks have one."""

    def __init__(self, module, forward):
        self.module = module
        module.forward = forward

    def remove(self):
        self.module.__dict__.pop("forward", None)


def replaced_forward(model):
    part = model.model.layers[1].mlp
    original = part.forward
    return Replaced(part, types.MethodType(lambda self, x: steer(original(x)), part))


def on_ids_behind_ours(model):
    """Others' tokens than those that our hook has seen are computed."""
    install(model)

    def swap(module, args, kwargs):
        return args, {**kwargs, "input_ids": kwargs["input_ids"].flip(1)}

    return model.register_forward_pre_hook(swap, with_kwargs=True)


CHANGING = [
    by_return, in_place, at_a_position, on_inputs, on_all_modules, under_no_grad, named_as_theirs,
    replaced_forward, on_ids_behind_ours,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("put", CHANGING)
def test_what_others_change_never_meets_stored_kv(put, dtype, request):
    """Cold and warm with it, then without: each as without a cache, and nothing stored of it."""
    model, store = tiny("llama", dtype=dtype), MemoryStore()
    handle = put(model)
    request.addfinalizer(handle.remove)
    changed = generate(model, IDS)
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, IDS, cache), changed)
    assert "hook" in cache.report.skipped or "replaced forward" in cache.report.skipped
    assert written(store) == 0
    handle.remove()
    plain = generate(model, IDS)
    assert put is at_a_position or not torch.equal(changed, plain)
    for reused in (0, 299):
        cache = RedisChunkCache(model, store)
        assert torch.equal(generate(model, IDS, cache), plain)
        assert cache.report.reused == reused
    handle, before = put(model), written(store)
    request.addfinalizer(handle.remove)
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, IDS, cache), changed)
    assert (cache.report.reused, written(store)) == (0, before)
    handle.remove()


def test_the_reason_names_the_module_and_the_hook():
    model = tiny("llama")
    handle = by_return(model)
    cache = RedisChunkCache(model, MemoryStore(), reuse="anywhere")  # not refused: it may go again
    generate(model, IDS, cache)
    assert "a forward hook on model.layers.1.mlp (<lambda> of tests." in cache.report.skipped
    assert "hooks='observers'" in cache.report.skipped
    assert cache.report.skipped in str(cache.explain(IDS).to_dict())
    handle.remove()
    generate(model, IDS, cache)
    assert cache.report.skipped == ""


def test_a_verdict_waits_until_the_hooks_are_gone():
    """Noise would have the self-test fail, and that be remembered."""
    model, store = tiny("llama"), MemoryStore()
    part = model.model.layers[1].mlp
    seen = []
    handle = part.register_forward_hook(lambda m, a, out: seen.append(len(out[0])) or out.normal_())
    generate(model, IDS, RedisChunkCache(model, store, codec="safetensors-int8"), new=2)
    assert seen == [300, 1]  # no self-test
    handle.remove()
    generate(model, IDS, RedisChunkCache(model, store))
    cache = RedisChunkCache(model, store)
    generate(model, IDS, cache)
    assert cache.report.reused == 299


def test_hooks_of_observers_see_what_is_left_of_a_prompt_and_no_self_test():
    model, store, seen = tiny("llama"), MemoryStore(), []
    plain = generate(model, IDS, new=3)
    part = model.model.layers[1].mlp
    part.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    part.register_forward_hook(lambda module, args, output: output)
    tables = [dict(part._forward_pre_hooks), dict(part._forward_hooks)]
    for computed in (300, 1):
        seen.clear()
        cache = RedisChunkCache(model, store, hooks="observers", reuse="anywhere")
        assert torch.equal(generate(model, IDS, cache, new=3), plain)
        assert seen == [computed, 1, 1]
        assert cache.report.computed == computed
    assert [dict(part._forward_pre_hooks), dict(part._forward_hooks)] == tables
    with pytest.raises(SettingError, match="hooks='seen' is not known"):
        RedisChunkCache(model, store, hooks="seen")


def test_a_hook_that_comes_while_an_answer_is_written_keeps_it_out_of_the_store():
    model, store = tiny("llama"), MemoryStore()
    part, steps, handles = model.model.layers[1].mlp, [], []

    def criteria(ids, scores, **_):
        steps.append(1)
        if len(steps) == 5:
            handles.append(part.register_forward_hook(lambda m, a, out: steer(out)))
        if len(steps) == 10:
            handles.pop().remove()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    cache = RedisChunkCache(model, store, chunk_size=32)
    answer = model.generate(
        IDS, past_key_values=cache, max_new_tokens=70, do_sample=False, stopping_criteria=[criteria]
    )
    assert cache.report.bytes_written
    longer = torch.cat([answer, random_ids(9)], 1)
    cache = RedisChunkCache(model, store, chunk_size=32)
    assert torch.equal(generate(model, longer, cache), generate(model, longer))
    assert cache.report.reused <= 300


def test_hooks_on_the_model_itself_are_applied_once_to_a_forward_done_again(monkeypatch):
    model, store = tiny("llama"), MemoryStore()
    inputs, outputs = [], []
    model.register_forward_pre_hook(lambda m, args: inputs.append(1))
    model.register_forward_hook(lambda m, args, out: setattr(out, "logits", out.logits * 0.5))
    cache = RedisChunkCache(model, store)
    model.register_forward_hook(lambda m, args, out: outputs.append(out.logits))
    with torch.no_grad():
        plain = model(IDS, logits_to_keep=1).logits
        inputs.clear(), outputs.clear()
        answers = iter([False, True])
        finish = Prefill.finish
        monkeypatch.setattr(Prefill, "finish", lambda self: next(answers) and finish(self))
        again = model(IDS, past_key_values=cache, logits_to_keep=1).logits
    assert torch.equal(again, plain)
    assert (len(inputs), len(outputs)) == (1, 1)


def test_machinery_is_not_foreign():
    model = tiny("llama")
    assert foreign_code(model) == ""
    weight_norm(model.model.layers[0].mlp.down_proj)
    torch.nn.utils.spectral_norm(model.model.layers[0].mlp.up_proj)  # a pre-hook
    assert foreign_code(model) == ""
    assert foreign_code(cpu_offload(model, torch.device("cpu"))) == ""
    compiled = tiny("llama")
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    assert foreign_code(compiled) == ""
    by_return(model)
    assert "model.layers.1.mlp" in foreign_code(model)


def test_a_twin_without_hooks_shares_all_tensors():
    model = tiny("llama")
    by_return(model)
    twin = without_foreign_hooks(model)
    assert foreign_code(twin) == ""
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)
    assert foreign_code(model)


def test_hooks_that_come_while_it_answers_end_storing_and_the_report_says_so() -> None:
    model, store, ids = tiny("llama"), MemoryStore(), random_ids(20)
    cache = RedisChunkCache(model, store, chunk_size=4)

    class Registers(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] == 23:
                model.model.layers[1].register_forward_hook(lambda module, args, output: None)
            return scores

    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=12, do_sample=False,
        logits_processor=LogitsProcessorList([Registers()]),
    )  # fmt: skip
    assert out.shape[1] == 32
    assert cache.report.skipped == ""
    assert "hooks were registered" in cache.report.not_stored
    assert "nothing more stored: forward hooks were registered" in str(cache.report)
    assert RedisChunkCache(tiny("llama"), store, chunk_size=4).explain(out).reused == 20
