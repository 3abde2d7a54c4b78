from __future__ import annotations

import copy
import gc
import re
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from chunkcache import RedisChunkCache
from chunkcache.errors import StoreError
from chunkcache.kv.rope import KeyRotation
from chunkcache.model import identity, moving, self_test
from chunkcache.model import state as model_state
from chunkcache.model.self_test import SelfTest, forward
from chunkcache.model.state import MOVING_FORMAT, SELF_TEST_FORMAT, ModelState
from chunkcache.stores.base import ChunkStore, Entry
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens
from tests.scripted import Scripted


class Counter:
    """Counts the calls of a function that goes on working."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts how often weights are hashed."""
    counter = Counter(identity.digest_weights)
    monkeypatch.setattr(identity, "digest_weights", counter)
    return counter


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts how often a model is put to the test."""
    counter = Counter(model_state.run_self_test)
    monkeypatch.setattr(model_state, "run_self_test", counter)
    return counter


def down() -> Scripted:
    """A store that cannot be reached."""
    return Scripted(read_metadata=StoreError("no connection"), write=StoreError("no connection"))


def verdict_on(model: PreTrainedModel, store: ChunkStore) -> SelfTest:
    state = ModelState.of(model)
    return state.self_test(state.identity(), store)


# ------------------------------------------------------------------------ one per model


def test_one_state_per_model() -> None:
    model = tiny("llama")
    assert ModelState.of(model) is ModelState.of(model)
    assert ModelState.of(model).model is model
    assert ModelState.of(copy.deepcopy(model)) is not ModelState.of(model)


def test_the_state_goes_with_the_model() -> None:
    model = tiny("llama")
    state = weakref.ref(ModelState.of(model))
    verdict_on(model, MemoryStore())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert state() is None


def test_one_store_per_url_and_settings() -> None:
    model = tiny("llama")
    state = ModelState.of(model)
    first = state.open("memory://?bytes=1MB", read_timeout=1.0)
    assert state.open("memory://?bytes=1MB", read_timeout=1.0) is first
    assert state.open("memory://?bytes=2MB", read_timeout=1.0) is not first
    assert state.open("memory://?bytes=1MB", read_timeout=2.0) is not first


@pytest.mark.parametrize("urls", ["file://{0}", ["memory://?bytes=1MB", "file://{0}"]])
def test_a_store_that_was_closed_is_opened_again(urls: Any, tmp_path: Path) -> None:
    """And a cache that still holds the closed one says that it keeps nothing."""
    urls = [u.format(tmp_path) for u in urls] if isinstance(urls, list) else urls.format(tmp_path)
    model, ids = tiny("llama"), tokens(200)
    older = RedisChunkCache(model, urls)
    RedisChunkCache(model, urls).store.close()
    model.generate(ids, past_key_values=older, max_new_tokens=1)
    assert "was closed, by store.close()" in older.report.errors[0]
    for reused in (0, 199):
        cache = RedisChunkCache(model, urls)
        model.generate(ids, past_key_values=cache, max_new_tokens=1)
        cache.flush()
        assert cache.report.reused == reused
        assert cache.report.errors == []


@pytest.mark.parametrize(
    ("url", "settings", "named"),
    [
        ("file://{0}?bytes=10KB", {}, "bytes= of .*DiskStore.* allows for 10,000 bytes"),
        ("memory://?bytes=10KB", {}, "bytes= of MemoryStore"),
        (["memory://?bytes=10KB", "file://{0}"], {}, "bytes= of MemoryStore"),
        ("file://{0}", {"write_queue_bytes": 10_000}, "write_queue_bytes allows for 10,000"),
    ],
)
def test_room_for_less_than_a_chunk_is_told(url: Any, settings: Any, named: str, tmp_path: Path):
    url = [u.format(tmp_path) for u in url] if isinstance(url, list) else url.format(tmp_path)
    model = tiny("llama")
    cache = RedisChunkCache(model, url, **settings)
    model.generate(tokens(200), past_key_values=cache, max_new_tokens=1)
    (error,) = cache.report.errors
    assert re.search(named, error)
    assert "lower chunk_size" in error


# ------------------------------------------------------------------------ identity


def test_the_weights_are_hashed_once_while_nothing_changes(hashed: Counter) -> None:
    model = tiny("llama")
    state = ModelState.of(model)
    first = state.identity()
    model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2)
    for _ in range(3):
        assert state.identity() is first
    assert hashed.calls == 1


def edit(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1


CHANGES: dict[str, Callable[[PreTrainedModel], object]] = {
    "no_grad": edit,
    "data": lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight.data + 1),
    "data in place": lambda m: m.lm_head.weight.data.add_(1),
    "state": lambda m: m.load_state_dict(tiny("llama", seed=1).state_dict()),
    "half": lambda m: m.half(),
    "attention": lambda m: m.set_attn_implementation("eager"),
    "config": lambda m: setattr(m.config, "sliding_window", 4),
    "layer gone": lambda m: m.model.layers.pop(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_noticed_once(
    change: Callable[[PreTrainedModel], object], hashed: Counter
) -> None:
    model = tiny("llama")
    state = ModelState.of(model)
    before = state.identity()
    change(model)
    after = state.identity()
    assert after.digest != before.digest
    assert state.identity() is after
    assert hashed.calls == 2


def test_a_change_taken_back_is_the_model_of_before(hashed: Counter) -> None:
    model = tiny("llama")
    state = ModelState.of(model)
    before = state.identity()
    with torch.autocast(model.device.type, torch.bfloat16):
        assert state.identity().digest != before.digest
    assert state.identity() == before
    assert hashed.calls <= 3


def test_an_edit_between_samples_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from chunkcache.model import weights

    monkeypatch.setattr(weights, "WHOLE_MODEL_BYTES", 1 << 10)
    monkeypatch.setattr(weights, "WHOLE_TENSOR_BYTES", 1 << 10)
    monkeypatch.setattr(weights, "SAMPLED_RUNS", 8)
    model = tiny("llama")
    state = ModelState.of(model)
    before = state.identity().digest
    weight = model.model.layers[1].mlp.up_proj.weight
    found = {before}
    for _ in range(3):
        with torch.no_grad():
            weight.view(-1)[weight.numel() // 16] += 1
        found.add(state.identity().digest)
    assert len(found) == 4


def test_weights_that_cannot_be_watched_are_hashed_each_time(hashed: Counter) -> None:
    with torch.inference_mode():
        model = tiny("llama", num_hidden_layers=1)
    state = ModelState.of(model)
    before = state.identity()
    assert state.identity().digest == before.digest
    with torch.inference_mode():
        model.lm_head.weight.add_(1)
    assert state.identity().digest != before.digest
    assert hashed.calls == 3


def test_adapters_are_noticed() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = tiny("llama")
    state = ModelState.of(model)
    found = [state.identity().digest]
    adapted = peft.get_peft_model(model, config)
    assert ModelState.of(adapted.get_base_model()) is state
    found.append(state.identity().digest)
    with adapted.disable_adapter():
        found.append(state.identity().digest)
    assert state.identity().digest == found[1]
    adapted.merge_adapter()
    found.append(state.identity().digest)
    assert len(set(found)) == 4


def test_an_adapter_swapped_in_place_is_noticed() -> None:
    peft = pytest.importorskip("peft")
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny("llama"), config)
    state = ModelState.of(adapted.get_base_model())
    before = state.identity().digest
    weights = {
        name: torch.rand_like(weight)
        for name, weight in adapted.state_dict().items()
        if "lora_" in name
    }
    hotswap_adapter_from_state_dict(adapted, weights, "default", config)
    assert state.identity().digest != before


def test_several_threads_see_one_identity(hashed: Counter) -> None:
    model = tiny("llama")
    state = ModelState.of(model)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(state.identity().digest)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 8
    assert hashed.calls == 1


# ------------------------------------------------------------------------ self-test


def test_a_model_is_tested_once(tested: Counter) -> None:
    store = MemoryStore()
    model = tiny("llama")
    verdict = verdict_on(model, store)
    assert verdict.bypass_reason == ""
    assert verdict_on(model, store) is verdict
    # Another process finds the verdict in the store.
    assert verdict_on(tiny("llama"), store) == verdict
    assert tested.calls == 1
    # Other weights are another model.
    assert verdict_on(tiny("llama", seed=1), store) == verdict
    assert tested.calls == 2


def test_a_verdict_against_a_model_is_not_kept_in_the_store(tested: Counter) -> None:
    store = MemoryStore()
    for _ in range(2):
        model = tiny("mamba")
        assert verdict_on(model, store).bypass_reason
    assert tested.calls == 2
    found = ModelState.of(model).identity()
    assert store.read_metadata([str(found.key(found.digest, SELF_TEST_FORMAT))]) == [None]


def test_a_store_that_is_down_costs_no_more_than_the_test(tested: Counter) -> None:
    model = tiny("llama")
    for _ in range(2):
        assert verdict_on(model, down()).bypass_reason == ""
    assert tested.calls == 1


def stored(
    model: PreTrainedModel, fields: dict[str, str], format: str = SELF_TEST_FORMAT
) -> MemoryStore:
    """A store that holds this as the verdict on the model."""
    store = MemoryStore()
    found = ModelState.of(model).identity()
    key = str(found.key(found.digest, format))
    store.write([Entry(key, fields, memoryview(b""))])
    return store


LIES = {
    "nothing": {},
    "passed, of no model": {"passed": "yes"},
    "passed, of another model": {"passed": "yes", "identity": "0" * 64},
    "a layout": {"bypass_reason": "", "layout": "[" * 100_000},
    "garbage": {"passed": "\x00", "identity": "["},
}


@pytest.mark.parametrize("fields", LIES.values(), ids=LIES.keys())
def test_a_stored_verdict_that_lies_is_not_believed(
    fields: dict[str, str], tested: Counter
) -> None:
    truth = verdict_on(tiny("llama"), MemoryStore())
    model = tiny("llama")
    assert verdict_on(model, stored(model, fields)) == truth
    assert tested.calls == 2


def test_a_stored_verdict_is_no_shortcut_for_a_model_known_to_be_unfit() -> None:
    model = tiny("mamba")
    digest = ModelState.of(model).identity().digest
    found = verdict_on(model, stored(model, {"passed": "yes", "identity": digest}))
    assert "not supported" in found.bypass_reason


# ------------------------------------------------------------------------ moving


@pytest.fixture
def scattered(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts how often the costly part of the test for moving is run."""
    counter = Counter(moving._scatter_test)
    monkeypatch.setattr(moving, "_scatter_test", counter)
    return counter


def mover_of(model: PreTrainedModel, store: ChunkStore) -> KeyRotation | str:
    state = ModelState.of(model)
    found = state.identity()
    layout = state.self_test(found, store).layout
    assert layout is not None
    return state.verified_rotation(found, layout, store)


def test_whether_a_model_may_be_moved_is_tested_once(scattered: Counter) -> None:
    store = MemoryStore()
    model = tiny("llama")
    rotation = mover_of(model, store)
    assert isinstance(rotation, KeyRotation)
    assert mover_of(model, store) is rotation
    # Another process finds the verdict in the store, and the rule on its own.
    other = mover_of(tiny("llama"), store)
    assert isinstance(other, KeyRotation)
    assert len(other.layers) == len(rotation.layers)
    assert scattered.calls == 1
    assert isinstance(mover_of(tiny("llama", seed=1), store), KeyRotation)
    assert scattered.calls == 2


def test_that_a_model_may_not_be_moved_is_not_kept_in_the_store() -> None:
    store = MemoryStore()
    model = tiny("gpt2")
    assert isinstance(mover_of(model, store), str)
    found = ModelState.of(model).identity()
    assert store.read_metadata([str(found.key(found.digest, MOVING_FORMAT))]) == [None]


def test_a_store_that_is_down_costs_no_more_than_the_test_for_moving(scattered: Counter) -> None:
    model = tiny("llama")
    for _ in range(2):
        assert isinstance(mover_of(model, down()), KeyRotation)
    assert scattered.calls == 1


@pytest.mark.parametrize("fields", LIES.values(), ids=LIES.keys())
def test_a_stored_verdict_on_moving_that_lies_is_not_believed(
    fields: dict[str, str], scattered: Counter
) -> None:
    model = tiny("llama")
    assert isinstance(mover_of(model, stored(model, fields, MOVING_FORMAT)), KeyRotation)
    assert scattered.calls == 1


def test_a_stored_verdict_does_not_make_a_model_movable() -> None:
    """The rule is found by each process: where there is none, nobody's word helps."""
    model = tiny("gpt2")
    digest = ModelState.of(model).identity().digest
    passed = {"passed": "yes", "identity": digest}
    found = mover_of(model, stored(model, passed, MOVING_FORMAT))
    assert isinstance(found, str)
    assert "no known rotation" in found


def test_the_rule_for_turning_keys_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    state = ModelState.of(model)
    found = state.rotation(state.identity())
    assert isinstance(found, KeyRotation)
    monkeypatch.setattr(model, "forward", None)
    assert state.rotation(state.identity()) is found


# ------------------------------------------------------------------------ what is no verdict


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """Errors that the forwards of self-tests raise, each once, the last one first."""
    errors: list[Exception] = []

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        if errors:
            raise errors.pop()
        return forward(*args, **kwargs)

    for module in (self_test, moving):
        monkeypatch.setattr(module, "forward", failing)
    return errors


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, ValueError])
def test_a_test_that_could_not_run_is_tried_again(
    kind: type[Exception], failures: list[Exception]
) -> None:
    model, store = tiny("llama"), MemoryStore()
    state = ModelState.of(model)
    identity = state.identity()
    failures.append(kind("not now"))
    assert "could not run" in state.self_test(identity, store).bypass_reason
    layout = state.self_test(identity, store).layout
    assert layout is not None
    failures.append(kind("not now"))
    assert "could not run" in str(state.verified_rotation(identity, layout, store))
    assert isinstance(state.verified_rotation(identity, layout, store), KeyRotation)
    failures.append(kind("not now"))
    assert state.rotation(identity) is None
    assert isinstance(state.rotation(identity), KeyRotation)
    failures.append(kind("not now"))
    assert state.zeros_matter(identity, "token_type_ids")  # in doubt, yes
    assert state._zeros == {}


def test_a_test_that_goes_on_failing_is_tried_at_times_only(
    tested: Counter, failures: list[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(model_state.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(model_state, "run_self_test", taking(1.0, now, tested))
    model, store = tiny("llama"), MemoryStore()
    failures += [ValueError("never")] * 99
    for _ in range(8):
        assert "never" in verdict_on(model, store).bypass_reason
    assert tested.calls == 3
    now[0] += 51
    for _ in range(8):
        assert "never" in verdict_on(model, store).bypass_reason
    assert tested.calls == 4
    failures.clear()
    now[0] += 51
    assert verdict_on(model, store).bypass_reason == ""


def taking(seconds: float, clock: list[float], function: Counter) -> Callable[..., Any]:
    def slow(*args: Any) -> Any:
        clock[0] += seconds
        return function(*args)

    return slow
