"""Models in wrappers: adapters, weights kept elsewhere, images, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from chunkcache import RedisChunkCache
from chunkcache.stores.memory import MemoryStore
from tests import vision
from tests.models import tiny, tokens

IDS = tokens(300, seed=1)
HOW = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def run(model: Any, store: MemoryStore, **inputs: Any) -> tuple[torch.Tensor, Any]:
    cache = RedisChunkCache(model, store)
    out = model.generate(**({"input_ids": IDS} | inputs), past_key_values=cache, **HOW)
    cache.flush()
    return out, cache.report


def lora(rank: int = 4) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


# ------------------------------------------------------------------------------- adapters


def test_every_state_of_an_adapter_is_a_model_of_its_own(store):
    model: Any = get_peft_model(tiny(), lora()).eval()
    model.add_adapter("other", lora(2))

    def check(reused: bool) -> None:
        plain = model.generate(input_ids=IDS, **HOW)
        out, report = run(model, store)
        assert torch.equal(out, plain)
        assert (report.reused > 200) == reused

    for again in (False, True):
        for name in ("default", "other"):
            model.set_adapter(name)
            check(reused=again)
        with model.disable_adapter():
            check(reused=again)
    model.set_adapter("default")
    check(reused=True)
    model.merge_adapter()  # the sums are rounded: another model
    check(reused=False)
    model.unmerge_adapter()


# ------------------------------------------------------------------------------- devices


def spread(model: Any, folder: Any) -> Any:
    return dispatch_model(
        model,
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu",
         "model.layers.2": "disk", "model.layers.3": "cpu", "model.norm": "cpu",
         "model.rotary_emb": "cpu", "lm_head": "cpu"},
        main_device="cpu", offload_dir=folder,
    )  # fmt: skip


@pytest.mark.parametrize("first", ["cache", "dispatch"])
@pytest.mark.parametrize(
    "how",
    [
        lambda model, folder: cpu_offload(model, "cpu"),
        lambda model, folder: disk_offload(model, folder, "cpu"),
        spread,
    ],
    ids=["cpu", "disk", "spread"],
)
def test_weights_kept_elsewhere(store, tmp_path, how, first):
    plain = tiny().generate(IDS, **HOW)
    model: Any = tiny()
    if first == "cache":
        run(model, MemoryStore())
    how(model, tmp_path)
    for _ in range(2):
        out, report = run(model, store)
        assert torch.equal(out, plain)
    assert report.reused > 200
    # Another model of this kind, kept elsewhere too, is told apart.
    other: Any = tiny(seed=1)
    plain = other.generate(IDS, **HOW)
    how(other, tmp_path / "other")
    out, report = run(other, store)
    assert torch.equal(out, plain)
    assert report.reused == 0


def test_an_edit_of_a_weight_kept_elsewhere(store):
    model: Any = tiny()
    cpu_offload(model, "cpu")
    run(model, store)
    weights = model.model.layers[1].self_attn.k_proj._hf_hook.weights_map
    weights["weight"].mul_(1.5)
    out, report = run(model, store)
    assert report.reused == 0
    assert torch.equal(out, model.generate(IDS, **HOW))


def test_moved_to_another_type_after_the_cache_was_made(store):
    model: Any = tiny()
    cache = RedisChunkCache(model, store)
    model.generate(IDS, past_key_values=cache, **HOW)
    cache.flush()
    model.to(torch.bfloat16)
    plain = model.generate(IDS, **HOW)
    out = model.generate(IDS, past_key_values=cache, **HOW)
    assert torch.equal(out, plain)
    assert cache.report.reused == 0


# ------------------------------------------------------------------------------- quantised

FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
NESTED = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
)
EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def quantised(
    folder: Any,
    how: BitsAndBytesConfig | None,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A model whose weights bitsandbytes has quantised, from a checkpoint named as all others."""
    model: Any = tiny()
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data.mul_(scale)
    model.save_pretrained(folder / str(scale) / "model")
    return AutoModelForCausalLM.from_pretrained(
        folder / str(scale) / "model", quantization_config=how, dtype=dtype
    ).eval()


@pytest.mark.parametrize("how", [FOUR_BITS, NESTED, EIGHT_BITS], ids=["4 bits", "nested", "8 bits"])
def test_quantised_weights(store, tmp_path, how):
    run(quantised(tmp_path, None), store)  # the same checkpoint as it is
    # Twice the values have the same numbers, and other scales.
    for scale in (1.0, 2.0):
        for reused in (False, True):  # the second time in another copy
            model = quantised(tmp_path, how, scale=scale)
            out, report = run(model, store)
            assert torch.equal(out, model.generate(IDS, **HOW))
            assert not report.skipped
            assert (report.reused > 200) == reused


def test_text_that_moved_in_a_quantised_model(store, tmp_path):
    model = quantised(tmp_path, FOUR_BITS)
    for ids in (IDS, torch.cat([tokens(30, seed=2), IDS], 1)):
        cache = RedisChunkCache(model, store, reuse="anywhere", repair="full")
        out = model.generate(ids, past_key_values=cache, **HOW)
        cache.flush()
        assert torch.equal(out, model.generate(ids, **HOW))
    assert cache.report.recomputed > 200


def test_an_edit_of_a_scale_alone(store, tmp_path):
    model = quantised(tmp_path, FOUR_BITS)
    run(model, store)
    model.model.layers[1].self_attn.v_proj.weight.quant_state.absmax.mul_(1.5)
    out, report = run(model, store)
    assert report.reused == 0
    assert torch.equal(out, model.generate(IDS, **HOW))


def test_eight_bits_that_look_for_outliers_in_the_whole_prompt_stand_aside(store, tmp_path):
    model = quantised(tmp_path, BitsAndBytesConfig(load_in_8bit=True), dtype=torch.bfloat16)
    for _ in range(2):
        out, report = run(model, store)
        assert torch.equal(out, model.generate(IDS, **HOW))
        assert report.reused == 0
        assert "llm_int8_threshold" in report.skipped


# ------------------------------------------------------------------------------- images


@pytest.mark.parametrize("kind", vision.KINDS)
def test_a_vision_model_reuses_text_and_stands_aside_for_images(store, kind):
    model = vision.a_vision_model(kind)
    how = {"suppress_tokens": [vision.IMAGE, vision.VIDEO]}
    plain = model.generate(input_ids=vision.text(300), **how, **HOW)
    for _ in range(2):
        out, report = run(model, store, input_ids=vision.text(300), **how)
        assert torch.equal(out, plain)
    assert report.reused > 200
    ids = vision.with_image(vision.text(300))
    for seed in (1, 2):  # the same tokens, two images
        image = {"input_ids": ids, **vision.image_inputs(kind, ids, seed), **how}
        plain = model.generate(**image, **HOW)
        out, report = run(model, store, **image)
        assert torch.equal(out, plain)
        assert report.reused == 0
        assert "image" in report.skipped


# ------------------------------------------------------------------------------- compilation


def test_a_compiled_forward(store):
    model: Any = tiny()
    plain = model.generate(IDS, **HOW)
    model.forward = torch.compile(model.forward, backend="eager")
    for _ in range(2):
        out, report = run(model, store)
        assert torch.equal(out, plain)
    assert report.reused > 200


def test_a_compiled_model(store):
    model: Any = tiny()
    plain = model.generate(IDS, **HOW)
    model.compile(backend="eager")
    for _ in range(2):
        out, report = run(model, store)
        assert torch.equal(out, plain)
    assert report.reused > 200
