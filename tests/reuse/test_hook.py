from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from chunkcache import RedisChunkCache, UnsupportedCallError
from chunkcache.reuse.hook import (
    ForwardCall,
    PrefillAware,
    TrimSpec,
    install,
    read_call,
    trim,
    uninstall,
)
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens


class Recorder(DynamicCache, PrefillAware):
    """A cache that notes what the hook tells it and has nothing to leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[ForwardCall] = []
        self.ended = 0

    def begin_forward(self, module: nn.Module, call: ForwardCall) -> TrimSpec:
        self.begun.append(call)
        return TrimSpec()

    def end_piece(self, columns: int) -> None:
        raise AssertionError("nothing is cut")

    def end_forward(self) -> bool:
        self.ended += 1
        return False

    def fail_forward(self) -> None:
        pass


@pytest.fixture(scope="module")
def shared() -> PreTrainedModel:
    model = tiny("llama", num_hidden_layers=1)
    install(model)
    return model


# ------------------------------------------------------------------------ the hook


def hooks(model: nn.Module) -> tuple[int, ...]:
    return tuple(
        len(table)
        for table in (
            model._forward_pre_hooks,
            model._forward_hooks,
            model._forward_pre_hooks_with_kwargs,
            model._forward_hooks_with_kwargs,
        )
    )


def test_installed_once_and_removable() -> None:
    model = tiny("llama", num_hidden_layers=1)
    model.register_forward_hook(lambda *_: None)
    before = hooks(model)
    install(model)
    once = hooks(model)
    assert once != before
    install(model)
    assert hooks(model) == once
    uninstall(model)
    assert hooks(model) == before
    uninstall(model)
    assert hooks(model) == before
    recorder = Recorder()
    model(tokens(3), past_key_values=recorder)
    assert recorder.begun == []


def test_threads_install_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    register = nn.Module.register_forward_pre_hook

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.01)
        return register(*args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", slowly)
    model, once = tiny("llama", num_hidden_layers=1), tiny("llama", num_hidden_layers=1)
    install(once)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(install, [model] * 4))
    assert hooks(model) == hooks(once)


@pytest.mark.parametrize("flags", ["_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs"])
def test_half_installed_it_is_inert(flags: str) -> None:
    """As a forward finds it that begins while another thread puts it on, or takes it off."""
    model, ids = tiny("llama", num_hidden_layers=1), tokens(3)
    plain = model(ids).logits
    install(model)
    getattr(model, flags).clear()
    assert torch.equal(model(ids).logits, plain)


def test_a_copied_model_has_the_hook_once(shared: PreTrainedModel) -> None:
    twin = copy.deepcopy(shared)
    before = hooks(twin)
    install(twin)
    assert hooks(twin) == before
    recorder = Recorder()
    twin(tokens(3), past_key_values=recorder)
    assert len(recorder.begun) == recorder.ended == 1
    uninstall(twin)
    assert hooks(shared) == before


def test_inert_for_any_other_cache(shared: PreTrainedModel) -> None:
    plain = tiny("llama", num_hidden_layers=1)
    ids = tokens(6)
    for arguments in (
        {},
        {"past_key_values": DynamicCache()},
        {"use_cache": False},
        {"labels": ids},
        {"output_hidden_states": True},
    ):
        ours = shared(ids, **copy.deepcopy(arguments))
        theirs = plain(ids, **copy.deepcopy(arguments))
        assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(
        shared.generate(ids, max_new_tokens=4), plain.generate(ids, max_new_tokens=4)
    )


def test_each_forward_begins_and_ends(shared: PreTrainedModel) -> None:
    recorder = Recorder()
    shared.generate(tokens(6), past_key_values=recorder, max_new_tokens=4)
    assert [call.new for call in recorder.begun] == [6, 1, 1, 1]
    assert recorder.ended == 4
    assert [call.keep for call in recorder.begun] == [1] * 4


def test_a_forward_that_fails_does_not_end(shared: PreTrainedModel) -> None:
    recorder = Recorder()
    with pytest.raises(IndexError):
        shared(torch.tensor([[10**6]]), past_key_values=recorder)
    assert len(recorder.begun) == 1
    assert recorder.ended == 0


def test_positional_arguments_are_bound(shared: PreTrainedModel) -> None:
    ids = tokens(6)
    mask, positions = torch.ones_like(ids), torch.arange(6, device=ids.device)[None]
    recorder = Recorder()
    output = shared(ids, mask, positions, recorder, logits_to_keep=2)
    (call,) = recorder.begun
    assert call.ids is ids
    assert call.mask is mask
    assert call.positions is positions
    assert call.keep == 2
    assert output.logits.shape[1] == 2
    assert torch.allclose(output.logits, shared(ids).logits[:, -2:], atol=1e-5)


def test_unknown_keywords_pass_through_a_positional_call(shared: PreTrainedModel) -> None:
    recorder = Recorder()
    shared(tokens(3), past_key_values=recorder, something_else=torch.ones(1))
    assert "something_else" in recorder.begun[0].bypass_reason


def test_use_cache_false_is_refused(shared: PreTrainedModel) -> None:
    recorder = Recorder()
    with pytest.raises(UnsupportedCallError, match="use_cache=False"):
        shared(tokens(3), past_key_values=recorder, use_cache=False)
    with pytest.raises(UnsupportedCallError, match="use_cache=False"):
        shared.generate(tokens(3), past_key_values=recorder, use_cache=False, max_new_tokens=2)
    assert recorder.begun == []


# ------------------------------------------------------------------------ reading a call


def read(model: PreTrainedModel, **arguments: Any) -> ForwardCall:
    return read_call(model, {"input_ids": tokens(6), "logits_to_keep": 1, **arguments})


def test_a_plain_call_has_no_reason_to_be_computed_in_full(shared: PreTrainedModel) -> None:
    call = read(
        shared,
        attention_mask=torch.ones(1, 6),
        position_ids=torch.arange(6)[None],
        past_key_values=Recorder(),
        inputs_embeds=None,
        labels=None,
        use_cache=True,
        return_dict=True,
        output_attentions=False,
        output_hidden_states=None,
        cache_position=torch.arange(6),
    )
    assert (call.full_reason, call.bypass_reason, call.keep, call.new) == ("", "", 1, 6)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"labels": tokens(6)}, "labels"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_router_logits": True}, "output_router_logits"),
        ({"logits_to_keep": 0}, "logits of every token"),
        ({"logits_to_keep": None}, "logits of every token"),
        ({"logits_to_keep": torch.tensor([-7])}, "logits of every token"),  # the model refuses it
        ({"logits_to_keep": torch.ones(6, dtype=torch.bool)}, "logits of every token"),
        ({"logits_to_keep": -1}, "logits of every token"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_outputs_of_every_token_are_wanted(
    arguments: dict[str, Any], why: str, shared: PreTrainedModel
) -> None:
    call = read(shared, **arguments)
    assert why in call.full_reason
    assert call.bypass_reason == ""


def test_outputs_that_the_configuration_asks_for(shared: PreTrainedModel) -> None:
    model = copy.deepcopy(shared)
    model.config.output_hidden_states = True
    assert "output_hidden_states" in read(model).full_reason
    assert read(model, output_hidden_states=False).full_reason == ""


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"input_ids": None}, "no input_ids"),
        ({"input_ids": tokens(6)[0]}, "no input_ids"),
        ({"inputs_embeds": torch.ones(1, 6, 64)}, "no input_ids"),
        ({"input_ids": None, "inputs_embeds": torch.ones(1, 6, 64)}, "no input_ids"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, "two-dimensional"),
        ({"attention_mask": torch.ones(6)}, "two-dimensional"),
        ({"attention_mask": {"full_attention": None}}, "two-dimensional"),
        ({"pixel_values": torch.ones(1, 3, 4, 4)}, "pixel_values"),
        ({"mm_encoder_outputs": {"image": torch.ones(1)}}, "mm_encoder_outputs"),
        ({"adapter_names": ["a"]}, "adapter_names"),
        ({"pixels": np.ones((3, 3))}, "pixels"),
        ({"audio": object()}, "audio"),
        ({"scale": 2.0}, "scale"),
        ({"task": "translate"}, "task"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_tokens_do_not_say_everything(
    arguments: dict[str, Any], why: str, shared: PreTrainedModel
) -> None:
    assert why in read(shared, **arguments).bypass_reason


def test_training_mode(shared: PreTrainedModel) -> None:
    assert "training mode" in read(copy.deepcopy(shared).train()).bypass_reason


def test_token_types_that_are_not_hashed_are_not_ignored() -> None:
    # GPT-2 adds an embedding for each token's type to the token's own.
    model, store, ids = tiny("gpt2"), MemoryStore(), tokens(40)
    for types in (None, torch.zeros_like(ids), torch.full_like(ids, 5)):
        cache = RedisChunkCache(model, store, chunk_size=8)
        arguments = {} if types is None else {"token_type_ids": types}
        with torch.no_grad():
            ours = model(ids, past_key_values=cache, logits_to_keep=1, **arguments).logits
            plain = model(ids, **arguments).logits[:, -1:]
        assert torch.allclose(ours, plain, atol=1e-3), cache.report


# ------------------------------------------------------------------------ padding and positions


@st.composite
def calls(draw: st.DrawFn) -> tuple[ForwardCall, int, list[int]]:
    """A call that is often, but not always, one of rows of text with left padding."""
    batch, past, new = (draw(st.integers(*bounds)) for bounds in ((1, 3), (0, 3), (1, 5)))
    total = past + new
    pads = [draw(st.integers(0, total)) for _ in range(batch)]
    mask = (torch.arange(total) >= torch.tensor(pads)[:, None]).long()
    positions = (torch.arange(total) - torch.tensor(pads)[:, None]).clamp(
        min=draw(st.integers(0, 1))
    )
    positions = positions[:, past:]
    for tensor in (mask, positions):
        if draw(st.booleans()):
            row, column = (draw(st.integers(0, size - 1)) for size in tensor.shape)
            tensor[row, column] = draw(st.integers(0, 1))
    call = ForwardCall(
        ids=torch.ones(batch, new, dtype=torch.long),
        mask=mask if draw(st.booleans()) else None,
        positions=positions if draw(st.booleans()) else None,
        keep=1,
        full_reason="",
        bypass_reason="",
    )
    return call, past, pads


def is_left_padded_text(call: ForwardCall, past: int, pads: list[int]) -> bool:
    """Token by token: padding is masked and nothing else, and text is numbered from 0."""
    assert call.ids is not None
    for row, pad in enumerate(pads):
        for column in range(past + call.new):
            masked = call.mask is not None and not call.mask[row, column]
            if masked != (column < pad):
                return False
            if column >= max(past, pad):
                position = (
                    column if call.positions is None else int(call.positions[row, column - past])
                )
                if position != column - pad:
                    return False
    return True


@given(calls())
def test_follows_against_a_slow_reference(made: tuple[ForwardCall, int, list[int]]) -> None:
    call, past, pads = made
    said = bool(call.follows(past, pads))
    right = is_left_padded_text(call, past, pads)
    # It may be stricter where the model counts the positions itself.
    assert right or not said
    assert said or not right or (call.positions is None and any(pads))


@given(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=3))
def test_pads_are_the_leading_zeros(mask: list[list[int]]) -> None:
    ids = torch.ones(len(mask), 4, dtype=torch.long)
    expected = [[*row, 1].index(1) for row in mask]
    for dtype in (torch.long, torch.bool, torch.float32):
        call = ForwardCall(ids, torch.tensor(mask).to(dtype), None, 1, "", "")
        assert call.pads() == expected
    assert ForwardCall(ids, None, None, 1, "", "").pads() == [0] * len(mask)


@pytest.mark.parametrize("shape", [(3, 1, 6), (4, 2, 6)])
def test_positions_in_several_dimensions(shape: tuple[int, ...]) -> None:
    ids = torch.ones(shape[1], 6, dtype=torch.long)
    positions = torch.arange(6).expand(shape).clone()
    call = ForwardCall(ids, None, positions, 1, "", "")
    assert call.follows(0, [0] * shape[1])
    positions[1, 0, 3] += 1  # an image has its own
    assert not call.follows(0, [0] * shape[1])


@pytest.mark.parametrize("columns", [5, 7, 12])
def test_a_mask_of_another_length_does_not_follow(columns: int) -> None:
    call = ForwardCall(tokens(6), torch.ones(1, columns), None, 1, "", "")
    assert not call.follows(0, [0])


# ------------------------------------------------------------------------ trimming


@given(st.integers(0, 5))
def test_trim(skip: int) -> None:
    cache = object()
    given_arguments = {
        "input_ids": tokens(6),
        "position_ids": torch.arange(6).expand(3, 1, 6),
        "cache_position": torch.arange(6),
        "attention_mask": torch.ones(1, 6),
        "past_key_values": cache,
        "logits_to_keep": 1,
    }
    trimmed = trim(given_arguments, TrimSpec(skip))
    assert trimmed.keys() == given_arguments.keys()
    for name in ("input_ids", "position_ids", "cache_position"):
        assert torch.equal(trimmed[name], given_arguments[name][..., skip:])  # type: ignore[index]
    for name in ("attention_mask", "past_key_values", "logits_to_keep"):
        assert trimmed[name] is given_arguments[name]
    assert given_arguments["input_ids"].shape == (1, 6)  # type: ignore[attr-defined]


def test_trim_to_scattered_columns() -> None:
    positions, mask = torch.tensor([[0, 0, 3], [2, 3, 5]]), object()
    ids = tokens(6).repeat(2, 1)
    arguments = {
        "input_ids": ids,
        "position_ids": torch.arange(6)[None],
        "cache_position": torch.arange(6),
        "attention_mask": torch.ones(2, 6),
        "logits_to_keep": 1,
    }
    rest = TrimSpec(columns=torch.tensor([0, 2, 5]), positions=positions, mask=mask)
    trimmed = trim(arguments, rest)
    assert torch.equal(trimmed["input_ids"], ids[:, [0, 2, 5]])
    assert torch.equal(trimmed["cache_position"], torch.tensor([0, 2, 5]))
    assert trimmed["position_ids"] is positions
    assert trimmed["attention_mask"] is mask
    assert trimmed["logits_to_keep"] == 1


def test_what_is_not_per_token_is_left_alone() -> None:
    trimmed = trim({"input_ids": tokens(6), "position_ids": torch.zeros(1, 1)}, TrimSpec(2))
    assert trimmed["position_ids"].shape == (1, 1)


# ------------------------------------------------------------------------ with a cache of ours


def cache_for(model: PreTrainedModel, store: MemoryStore | None = None) -> RedisChunkCache:
    return RedisChunkCache(model, store or MemoryStore(), chunk_size=4)


def last(model: PreTrainedModel, ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, past_key_values=cache, logits_to_keep=1).logits
    return logits[:, -1]


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize(
    "start",
    [
        lambda _model: {"inputs": tokens(10), "attention_mask": torch.ones_like(tokens(10))},
        lambda model: {"inputs_embeds": model.get_input_embeddings()(tokens(10))},
    ],
    ids=["ids", "embeddings"],
)
@pytest.mark.parametrize("model_type", ["llama", "lfm2"])
def test_beams_also_while_it_stands_aside(
    model_type: str, start: Callable[[PreTrainedModel], dict[str, Any]]
) -> None:
    model = tiny(model_type)
    plain = model.generate(**start(model), num_beams=3, max_new_tokens=5)
    ours = model.generate(
        **start(model), num_beams=3, max_new_tokens=5, past_key_values=cache_for(model)
    )
    assert torch.equal(ours, plain)


def test_several_continuations_of_one_prompt(shared: PreTrainedModel) -> None:
    # The usual way to score answers: the question once, then all answers in one batch.
    cache = cache_for(shared)
    question, answers = tokens(10), tokens(5, rows=3, seed=1)
    last(shared, question, cache)
    cache.batch_repeat_interleave(3)
    ours = last(shared, answers, cache)
    assert close(ours, last(shared, torch.cat([question.repeat(3, 1), answers], 1)))
    cache.batch_select_indices(torch.tensor([1]))
    more = tokens(4, seed=2)
    whole = torch.cat([question, answers[1:2], more], 1)
    assert close(last(shared, more, cache), last(shared, whole))


def test_a_model_without_positions_cannot_be_told_that_more_comes() -> None:
    """generate() drops a mask of ones, and nothing is left to tell a new prompt by."""
    model = tiny("bloom")
    cache = cache_for(model)
    last(model, tokens(10), cache)
    mask = torch.ones(1, 16, dtype=torch.long)
    with pytest.raises(UnsupportedCallError, match=r"reset\(\)"):
        model.generate(tokens(6, seed=1), attention_mask=mask, past_key_values=cache)
    cache.reset()
    ours = model.generate(tokens(10), past_key_values=cache, max_new_tokens=5)
    assert torch.equal(ours, model.generate(tokens(10), max_new_tokens=5))


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2"])
def test_only_the_new_ids_of_a_conversation(model_type: str) -> None:
    model = tiny(model_type)
    first, second = tokens(10), tokens(6, seed=1)
    whole = torch.cat([first, second], 1)
    cache = cache_for(model)
    last(model, first, cache)
    ours = model.generate(
        second, attention_mask=torch.ones_like(whole), past_key_values=cache, max_new_tokens=5
    )
    assert torch.equal(ours[:, 6:], model.generate(whole, max_new_tokens=5)[:, 16:])


def test_after_a_failed_forward_nothing_is_continued_that_is_gone() -> None:
    model = tiny("llama")
    cache = cache_for(model)
    first, second = tokens(10), tokens(6, seed=1)
    last(model, first, cache)
    broken = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        last(model, second, cache)
    broken.remove()
    # Right or refused, but never the logits of a prompt without its beginning.
    try:
        ours = last(model, second, cache)
    except UnsupportedCallError:
        return
    assert close(ours, last(model, torch.cat([first, second], 1)))


def test_a_failed_forward_does_not_keep_a_new_prompt_from_starting() -> None:
    model = tiny("llama")
    cache = cache_for(model)
    ids = tokens(10)
    plain = model.generate(ids, max_new_tokens=4)
    broken = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(ids, past_key_values=cache, max_new_tokens=4)
    broken.remove()
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=4), plain)


def test_tokens_that_the_hook_did_not_see_are_not_stored_under_others() -> None:
    # The base model has no hook; after a crop the number of columns can look right.
    model, store = tiny("llama"), MemoryStore()
    first, third = tokens(10), tokens(7, seed=2)
    cache = cache_for(model, store)
    last(model, first, cache)
    cache.crop(-4)
    with torch.no_grad():
        model.model(tokens(4, seed=1), past_key_values=cache)
    last(model, third, cache)
    ids = torch.cat([first, third, tokens(2)], 1)
    assert close(last(model, ids, cache_for(model, store)), last(model, ids))


def test_a_token_buffer_that_is_used_again() -> None:
    model, store = tiny("llama"), MemoryStore()
    cache, new = cache_for(model, store), tokens(8, seed=1)
    last(model, tokens(4), cache)
    buffer = torch.empty(1, 1, dtype=torch.long)
    for column in range(8):
        buffer.copy_(new[:, column : column + 1])
        last(model, buffer, cache)
    # A prompt that would be found had the last token been taken for each of its block.
    for ending in (new[:, 3:4], new[:, 7:8]):
        ids = torch.cat([tokens(4), ending.repeat(1, 4), tokens(2)], 1)
        assert close(last(model, ids, cache_for(model, store)), last(model, ids))
    ids = torch.cat([tokens(4), new, tokens(2)], 1)
    again = cache_for(model, store)
    assert close(last(model, ids, again), last(model, ids))
    assert again.report.reused >= 12


def add_one(_module: nn.Module, _args: Any, output: Any) -> Any:
    return output + 1 if isinstance(output, Tensor) else (output[0] + 1, *output[1:])


def test_a_hook_that_steers_a_layer_is_not_overlooked() -> None:
    model, store, ids = tiny("llama"), MemoryStore(), tokens(20)
    last(model, ids, cache_for(model, store))
    model.model.layers[0].register_forward_hook(add_one)
    cache = cache_for(model, store)
    assert close(last(model, ids, cache), last(model, ids)), cache.report


def test_a_configuration_edited_in_place_is_not_overlooked() -> None:
    model, store, ids = tiny("mistral", sliding_window=64), MemoryStore(), tokens(20)
    last(model, ids, cache_for(model, store))
    model.config.sliding_window = 4
    cache = cache_for(model, store)
    assert close(last(model, ids, cache), last(model, ids)), cache.report
