"""Ways of calling that have nothing to do with K/V: none is refused, or missed, without need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from chunkcache import RedisChunkCache, open_store
from chunkcache.report import Report
from chunkcache.stores.base import ChunkStore
from chunkcache.stores.memory import MemoryStore
from tests.models import PAD, tiny, tokens
from tests.prompts import padded, same_answer
from tests.test_processes import ENVIRONMENT
from tests.vision import a_vision_model, image_inputs, text, with_image
from tests.words import byte_tokenizer

IDS = tokens(150, seed=1)
DTYPES = [torch.float32, torch.bfloat16]
FULL = {
    "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True,
    "output_logits": True,
}  # fmt: skip


def ask(model: Any, ids: Tensor, cache: Any = None, **inputs: Any) -> Any:
    inputs = {"attention_mask": torch.ones_like(ids), **inputs}
    return model.generate(input_ids=ids, past_key_values=cache, **{**FULL, **inputs})


def new(model: Any, store: ChunkStore, **settings: Any) -> RedisChunkCache:
    return RedisChunkCache(model, store, **{"chunk_size": 16, **settings})


def check_warm(model: Any, ids: Tensor, store: ChunkStore | None = None, **inputs: Any) -> None:
    """Cold and warm the answer of a plain run; warm, all of the prompt is reused."""
    store = store or MemoryStore()
    want = ask(model, ids, **inputs)
    for _ in range(2):
        cache = new(model, store)
        assert same_answer(ask(model, ids, cache, **inputs), want)
        assert cache.report.skipped == ""
        assert cache.flush(5)
    assert cache.report.computed == len(ids)


# ------------------------------------------------------------------ arguments of generate()


class Quiet(BaseStreamer):
    def put(self, value: Tensor) -> None:
        pass

    def end(self) -> None:
        pass


def stop_strings() -> dict[str, Any]:
    return {"tokenizer": byte_tokenizer(), "stop_strings": ["ab", "Z"]}


ARGUMENTS: dict[str, Any] = {
    "tokenizer": lambda: {"tokenizer": byte_tokenizer()},
    "stop_strings": stop_strings,
    "streamer": lambda: {"streamer": Quiet()},
    "logits_processor": lambda: {
        "logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(9, 2, tokens(1).device)])
    },
    "stopping_criteria": lambda: {
        "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(153)])
    },
    "prefix_allowed_tokens_fn": lambda: {"prefix_allowed_tokens_fn": lambda *_: [7, 8, 9]},
    "generation_config": lambda: {"generation_config": GenerationConfig(repetition_penalty=1.2)},
    "synced_gpus": lambda: {"synced_gpus": False},
    "use_cache": lambda: {"use_cache": True},
    "logits_to_keep": lambda: {"logits_to_keep": 3},
    "num_items_in_batch": lambda: {"num_items_in_batch": 1},
    "labels that are none": lambda: {"labels": None},
}


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def llama(request: pytest.FixtureRequest) -> Any:
    return tiny(dtype=request.param)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_no_model_reads(llama: Any, name: str) -> None:
    store = MemoryStore()
    arguments = ARGUMENTS[name]()
    want = ask(llama, IDS, **arguments)
    computed = []
    for _ in range(2):
        cache = new(llama, store)
        assert same_answer(ask(llama, IDS, cache, **arguments), want)
        assert cache.report.skipped == ""
        # The last tokens may be drafts where outputs of several are wanted: no tail is kept.
        computed.append(cache.report.computed)
    assert computed == [150, 6 if name == "logits_to_keep" else 1]


@pytest.mark.parametrize("name", ["colour", "token_type_ids", "encoder_outputs_of_mine"])
def test_arguments_that_nobody_knows_are_refused_as_ever(llama: Any, name: str) -> None:
    for cache in (None, new(llama, MemoryStore())):
        with pytest.raises(ValueError, match=name):
            ask(llama, IDS, cache, **{name: torch.zeros_like(IDS)})


def test_an_argument_that_the_model_reads_is_no_prompt_of_text(llama: Any) -> None:
    """Whatever its name is: here that of one of generate()'s own."""

    class Reads(type(llama)):
        def forward(
            self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
            logits_to_keep=0, tokenizer=None, **kwargs,
        ):  # fmt: skip
            if tokenizer is not None:
                input_ids = (input_ids + tokenizer) % 199
            return super().forward(
                input_ids, attention_mask, position_ids, past_key_values,
                logits_to_keep=logits_to_keep, **kwargs,
            )  # fmt: skip

    model = tiny(dtype=llama.dtype)
    model.__class__ = Reads
    store = MemoryStore()
    plain, other = ask(model, IDS), ask(model, IDS, tokenizer=1)
    assert not same_answer(plain, other)
    for number, want in ((0, plain), (1, other), (0, plain)):
        cache = new(model, store)
        inputs = {"tokenizer": 1} if number else {}
        assert same_answer(ask(model, IDS, cache, **inputs), want)
        assert ("tokenizer may change" in cache.report.skipped) == bool(number)


# ------------------------------------------------------------------ token types


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "name", "matter"),
    [
        ("gpt2", "token_type_ids", True),
        ("gemma3", "token_type_ids", False),
        ("qwen2_vl", "mm_token_type_ids", False),
        ("qwen3_vl", "mm_token_type_ids", False),
    ],
)
def test_token_types(kind: str, name: str, matter: bool, dtype: torch.dtype) -> None:
    """Zeros are reused where they mean nothing; on one store they are not taken for others."""
    model = tiny(kind, dtype=dtype) if kind == "gpt2" else a_vision_model(kind, dtype=dtype)
    ids, store = text(150, seed=3), MemoryStore()
    zeros, some = torch.zeros_like(ids), torch.zeros_like(ids)
    some[:, 20:90] = 1
    for types in (zeros, None, some, zeros, None, some):
        inputs = {} if types is None else {name: types}
        want, cache = ask(model, ids, **inputs), new(model, store)
        assert same_answer(ask(model, ids, cache, **inputs), want)
        if types is some or (types is zeros and matter):
            assert f"{name} may change" in cache.report.skipped
        else:
            assert cache.report.skipped == ""
    assert cache.report.reused == 0
    cache = new(model, store)
    ask(model, ids, cache, **({} if matter else {name: zeros}))
    assert cache.report.reused == 149


def test_text_with_types_behind_an_image_has_no_place_in_the_store() -> None:
    model = a_vision_model("gemma3")
    store, ids = MemoryStore(), with_image(text(100, 3))
    ask(model, ids, new(model, store), **image_inputs("gemma3", ids))
    check_warm(model, text(100, 3), store, token_type_ids=torch.zeros_like(ids))


# ------------------------------------------------------------------ generation settings


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma2", "llama"])
def test_a_checkpoint_that_names_the_hybrid_cache(kind: str, tmp_path: Path) -> None:
    tiny(kind).save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cache_implementation": "hybrid"}))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert model.generation_config.cache_implementation == "hybrid"
    model.generation_config.pad_token_id = PAD
    check_warm(model, IDS)
    store = MemoryStore()
    with_own = {"generation_config": GenerationConfig(cache_implementation="hybrid")}
    check_warm(tiny(kind), IDS, store, **with_own)


# ------------------------------------------------------------------ folders


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_one_checkpoint_in_several_folders(tmp_path: Path) -> None:
    """A copy, a snapshot of the Hub, an output folder, and the object itself."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    model: Any = tiny()
    folders = [tmp_path / "a", tmp_path / "run" / "checkpoint-500", tmp_path / "snapshots" / commit]
    for folder in folders:
        model.save_pretrained(folder)
    others = [loaded(folder) for folder in folders]
    others[2].config._commit_hash = commit  # as some releases do, by the folder's name
    store = MemoryStore()
    cache = new(model, store)
    want = ask(model, IDS, cache)
    for other in others:
        assert new(other, store).explain(IDS).reused == 149
        cache = new(other, store)
        assert same_answer(ask(other, IDS, cache), want)
        assert cache.report.reused == 149
    # One name, other weights.
    (tmp_path / "b").mkdir()
    tiny(seed=1).save_pretrained(tmp_path / "b" / "a")
    other = loaded(tmp_path / "b" / "a")
    check_warm(other, IDS, store)
    assert same_answer(ask(others[0], IDS, new(others[0], store)), want)


# ------------------------------------------------------------------ turns of padded batches


def batch() -> dict[str, Tensor]:
    made = padded(tokens(90, seed=1), tokens(61, seed=2), tokens(33, seed=3))
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def endings(model: Any) -> list[int]:
    """Ids of which some end the first answers early, each row's at another place."""
    ids, mask = batch().values()
    said = ask(model, ids, attention_mask=mask).sequences[:, ids.shape[1] :]
    return [int(said[0, 1]), int(said[2, 5])]


def turns(
    model: Any, cache: Any, masks_pads: bool, reports: list[Report] | None = None
) -> list[Any]:
    """A conversation of a batch; where wanted, padding behind an answer is masked."""
    (ids, mask), answers = batch().values(), []
    how = {"eos_token_id": endings(model), "max_new_tokens": 12}
    for turn in range(3):
        answers.append(ask(model, ids, cache, attention_mask=mask, **how))
        if reports is not None:
            reports.append(cache.report)
        out = answers[-1].sequences
        fresh = (out[:, ids.shape[1] :] != PAD).long()
        mask = torch.cat([mask, fresh if masks_pads else torch.ones_like(fresh)], dim=1)
        more = torch.cat([tokens(9, seed=40 + 10 * turn + row) for row in range(3)])
        ids = torch.cat([out, more], dim=1)
        mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    return answers


@pytest.mark.parametrize("masks_pads", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float32) for kind in ("llama", "gemma3_text", "gpt2", "bloom")]
    + [("llama", torch.bfloat16)],
)
def test_turns_of_a_padded_batch(kind: str, masks_pads: bool, dtype: torch.dtype) -> None:
    model = tiny(kind, dtype=dtype)
    store = MemoryStore()
    want = turns(model, None, masks_pads)
    assert (want[0].sequences[:, 90:] == PAD).any(), "no row was over early"
    for _ in range(2):  # the second time from the store, too
        cache = new(model, store)
        reports: list[Report] = []
        got = turns(model, cache, masks_pads, reports)
        for mine, its in zip(got, want, strict=True):
            if dtype == torch.bfloat16 and not torch.equal(mine.sequences, its.sequences):
                assert same_answer(mine, its)
                break  # from here on the turns are others
            assert same_answer(mine, its)
        if kind == "bloom":  # takes no positions: its default counts padding
            continue
        for report in reports[1:]:
            assert "from the store" not in report.skipped
            assert report.reused > 180
            assert ("first gap" in report.skipped) == masks_pads


@pytest.mark.parametrize("mode", ["prefix", "anywhere"])
@pytest.mark.parametrize("seed", range(3))
def test_masks_with_gaps(llama: Any, seed: int, mode: str) -> None:
    """Wherever they are, nothing behind the first is reused or stored, on one object or anew."""
    draw = torch.Generator().manual_seed(seed)
    ids = tokens(150, rows=2, seed=seed)
    store = MemoryStore()
    settings = {"reuse": mode, "repair": "full"} if mode == "anywhere" else {}
    held = new(llama, store, **settings)
    how = {"max_new_tokens": 2}
    for _ in range(4):
        mask = torch.ones_like(ids)
        mask[0, : int(torch.randint(0, 30, (1,), generator=draw))] = 0
        for row in range(2):
            begin, size = torch.randint(20, 140, (2,), generator=draw).tolist()
            mask[row, begin : begin + size // 4] = 0
        given = mask if torch.rand(1, generator=draw) < 0.7 else torch.ones_like(ids)
        want = ask(llama, ids, attention_mask=given, **how)
        for cache in (held, new(llama, store, **settings)):
            assert same_answer(ask(llama, ids, cache, attention_mask=given, **how), want)
            assert "from the store" not in cache.report.skipped  # caught as late as that
            assert cache.flush(5)
    check_warm(llama, ids, store)


def test_a_gap_in_a_known_text_and_back(llama: Any) -> None:
    ids, store = tokens(150, rows=2, seed=1), MemoryStore()
    mask = torch.ones_like(ids)
    mask[0, 40:60] = 0
    check_warm(llama, ids, store)
    cache = new(llama, store)
    want = ask(llama, ids, attention_mask=mask)
    assert same_answer(ask(llama, ids, cache, attention_mask=mask), want)
    assert cache.report.reused == 64
    assert "first gap" in cache.report.skipped
    (first, *_), rest = cache.report.rows[0].spans, cache.report.rows[0].spans[-1]
    assert (first.kind, "first gap" in rest.reason) == ("reused", True)
    assert same_answer(ask(llama, ids, cache), ask(llama, ids))
    assert cache.report.skipped == ""
    assert cache.report.reused == 298


# ------------------------------------------------------------------ outputs that are wanted


@pytest.mark.parametrize(
    ("keep", "computed"),
    [
        (1, 1), (5, 6), (0, 1), (torch.tensor(-1), 1), (torch.tensor(149), 1),
        (torch.tensor([-1]), 1), (torch.tensor([149]), 1), (torch.tensor([140, 149]), 1),
        (torch.tensor([-3, 120, -1]), 1), (torch.tensor([0, 149]), 1),
        (torch.tensor([148], dtype=torch.int32), 1),
    ],
)  # fmt: skip
def test_logits_to_keep(llama: Any, keep: Any, computed: int) -> None:
    store = MemoryStore()
    with torch.no_grad():
        want = llama(IDS, logits_to_keep=keep).logits
        for reused in (0, 150 - computed):
            cache = new(llama, store)
            got = llama(IDS, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
            assert got.shape == want.shape
            assert torch.allclose(got.float(), want.float(), atol=0.05 * float(want.abs().max()))
            if llama.dtype == torch.float32:
                assert torch.allclose(got, want, rtol=1e-3, atol=1e-3)
            assert cache.report.reused == reused


# ------------------------------------------------------------------ prompt learning


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), "prefix tuning"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), "prompt tuning"),
        (
            PromptEncoderConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16
            ),
            "P-tuning",
        ),
    ],
    ids=["prefix", "prompt", "p-tuning"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prompt_learning_says_why(config: Any, why: str, dtype: torch.dtype) -> None:
    base: Any = tiny(dtype=dtype)
    plain = ask(base, IDS)
    model: Any = get_peft_model(base, config).eval()
    with torch.no_grad():
        torch.manual_seed(0)
        for weight in model.prompt_encoder.parameters():
            weight.normal_()
    store = MemoryStore()
    want = ask(model, IDS)
    assert not same_answer(want, plain)
    for _ in range(2):
        cache = new(model, store)
        assert same_answer(ask(model, IDS, cache), want)
        assert why in cache.report.skipped
        assert why in str(cache.report)
        assert cache.report.reused == 0
    check_warm(base, IDS, store)


# ------------------------------------------------------------------ two processes


def in_turn(folder: str, url: str) -> list[Any]:
    """Answers and reused tokens of some of the calls above."""
    model = loaded(Path(folder))
    found: list[Any] = []
    with open_store(url) as store:
        for inputs in (stop_strings(), {"logits_to_keep": 2}):
            cache = new(model, store)
            found.append((ask(model, IDS, cache, **inputs).sequences.tolist(), cache.report.reused))
        cache = new(model, store)
        answers = turns(model, cache, masks_pads=True)
        found.append(([out.sequences.tolist() for out in answers], cache.report.reused))
        cache.flush()
    return found


def test_another_process_with_the_checkpoint_elsewhere(tmp_path: Path, redis_server: Any) -> None:
    model: Any = tiny()
    for name in ("here", "there"):
        model.save_pretrained(tmp_path / name)
    here = in_turn(str(tmp_path / "here"), redis_server.unix_url)
    script = "import json, sys; from tests.reuse.test_calls import in_turn;"
    script += "print(json.dumps(in_turn(*sys.argv[1:])))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "there"), redis_server.unix_url],
        capture_output=True, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    there = json.loads(done.stdout.splitlines()[-1])
    plain = ask(model, IDS).sequences.tolist()
    assert here[0][0] == there[0][0] == ask(model, IDS, **stop_strings()).sequences.tolist()
    assert here[1][0] == there[1][0] == plain
    assert here[2][0] == there[2][0]
    assert here[2][0] == [out.sequences.tolist() for out in turns(model, None, masks_pads=True)]
    assert [reused for _, reused in there][:2] == [149, 148]
    assert there[2][1] >= here[2][1] > 180
