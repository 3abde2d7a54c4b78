from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import PreTrainedModel

from chunkcache.model import identity, weights
from chunkcache.model.identity import ModelIdentity, model_name
from tests.models import tiny

HASH = "0123456789abcdef" * 4

# ------------------------------------------------------------------------ names


def named(name: str) -> PreTrainedModel:
    model = tiny("llama", num_hidden_layers=1)
    model.config._name_or_path = name
    return model


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "local").mkdir()
    assert model_name(named("")) == "LlamaForCausalLM"
    assert model_name(named("org/model")) == "org/model"
    assert model_name(named("org/local")) == "local"
    assert model_name(named(str(tmp_path / "org" / "local"))) == "local"
    assert model_name(named("/nowhere/gone")) == "gone"
    assert model_name(named("./org/local")) == "local"
    assert model_name(named("/")) == "LlamaForCausalLM"


# ------------------------------------------------------------------------ identity


def digest(model: torch.nn.Module) -> str:
    return ModelIdentity.of(model).digest


@pytest.fixture(scope="module")
def plain() -> str:
    """The identity that every test below starts from."""
    return digest(tiny("llama"))


def test_the_same_checkpoint_in_another_process(tmp_path: Path) -> None:
    types = ("llama", "gemma3_text", "mixtral", "gpt2")
    for model_type in types:
        tiny(model_type).save_pretrained(tmp_path / model_type)
    code = """
import sys
from transformers import AutoModelForCausalLM
from chunkcache.model.identity import ModelIdentity
for path in sys.argv[1:]:
    print(ModelIdentity.of(AutoModelForCausalLM.from_pretrained(path)).digest)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / model_type) for model_type in types)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [digest(tiny(model_type)) for model_type in types], done.stderr


def test_the_same_weights_twice(plain: str) -> None:
    assert digest(tiny("llama")) == plain


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_name_or_path", "org/model"),
        ("_commit_hash", "abc"),  # of weights of which every byte counts
        ("use_cache", False),
        ("output_hidden_states", True),
        ("output_attentions", True),
        ("architectures", ["Other"]),
        ("transformers_version", "5.0"),
        ("problem_type", "regression"),
        ("id2label", {0: "a"}),
    ],
)
def test_what_does_not_change_kv_does_not_count(name: str, value: object, plain: str) -> None:
    model = tiny("llama", attn_implementation="sdpa")
    if name == "output_attentions":
        model.config._attn_implementation = "eager"
        plain = digest(model)
    setattr(model.config, name, value)
    assert digest(model) == plain


def test_training_flags_and_gradients_do_not_count(plain: str) -> None:
    model = tiny("llama").train()
    model.requires_grad_(False)
    assert digest(model) == plain


def one_weight(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[5, 7] += 1e-3


def one_norm(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] *= 1.001


def frequencies(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq[3] *= 1.001


def layers_swapped(model: PreTrainedModel) -> None:
    first, second, *rest = model.model.layers
    model.model.layers = torch.nn.ModuleList([second, first, *rest])


def layer_removed(model: PreTrainedModel) -> None:
    del model.model.layers[2]


CHANGES: dict[str, Callable[[PreTrainedModel], object]] = {
    "one weight": one_weight,
    "one norm": one_norm,
    "frequencies": frequencies,
    "layers swapped": layers_swapped,
    "layer removed": layer_removed,
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "half and back": lambda m: m.half().float(),
    "embedding grown": lambda m: m.resize_token_embeddings(210),
    "attention": lambda m: m.set_attn_implementation("eager"),
    "sliding window": lambda m: setattr(m.config, "sliding_window", 8),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_to_the_model_counts(
    change: Callable[[PreTrainedModel], object], plain: str
) -> None:
    model = tiny("llama")
    change(model)
    assert digest(model) != plain


@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"seed": 1},
        {"attention_bias": True},
    ],
    ids=str,
)
def test_a_change_to_the_configuration_counts(overrides: dict[str, Any], plain: str) -> None:
    assert digest(tiny("llama", **overrides)) != plain


def test_a_setting_that_is_in_no_weight_counts() -> None:
    one, two = (tiny("gemma2", attn_logit_softcapping=cap) for cap in (50.0, 30.0))
    assert digest(one) != digest(two)


def test_another_class_with_the_same_weights(plain: str) -> None:
    model = tiny("llama")
    model.__class__ = type("OtherForCausalLM", (type(model),), {})
    assert digest(model) != plain


def test_another_class_of_the_same_name(plain: str) -> None:
    model = tiny("llama")
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "remote_code"})
    assert digest(model) != plain


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
def test_switches_that_change_what_is_computed_count(plain: str) -> None:
    model = tiny("llama")
    found = {plain}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(model.device.type, dtype):
            found.add(digest(model))
    torch.set_float32_matmul_precision("medium")
    found.add(digest(model))
    assert len(found) == 4
    torch.set_float32_matmul_precision("highest")
    assert digest(model) == plain


def test_the_sample_of_a_large_model_finds_what_a_watch_saw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "WHOLE_MODEL_BYTES", 1 << 10)
    monkeypatch.setattr(weights, "WHOLE_TENSOR_BYTES", 1 << 10)
    monkeypatch.setattr(weights, "SAMPLED_RUNS", 8)
    model = tiny("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    before, before_whole = ModelIdentity.of(model), ModelIdentity.of(model, {name})
    with torch.no_grad():
        weight.view(-1)[weight.numel() // 16] += 1  # between two of eight runs
    assert ModelIdentity.of(model) == before, "the sample was expected to miss this"
    assert ModelIdentity.of(model, {name}).digest != before_whole.digest
    model.config._commit_hash = "abc"  # which may stand for what no sample shows
    assert ModelIdentity.of(model).digest != before.digest


def test_weights_that_are_elsewhere_are_not_taken_for_equal() -> None:
    # Offloaded parameters show nothing of their content where the model is looked at.
    one, two = (cpu_offload(tiny("llama", seed=seed), torch.device("cpu")) for seed in (0, 1))
    assert next(one.parameters()).device.type == "meta"
    assert digest(one) != digest(two)


def test_parts_tell_what_differs(plain: str) -> None:
    before = dict(ModelIdentity.of(tiny("llama")).parts)
    after = dict(ModelIdentity.of(tiny("llama", seed=1)).parts)
    assert [name for name in before if before[name] != after[name]] == ["weights"]


def test_fields() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    model.config._commit_hash = "abc"
    found = ModelIdentity.of(model)
    assert (found.name, found.revision, found.dtype) == ("LlamaForCausalLM", "abc", "bfloat16")
    assert len(found.digest) == 64
    name = f"LlamaForCausalLM-{found.digest[:8]}"
    assert str(found.key(HASH, "safetensors")) == f"safetensors@{name}@1@0@{HASH}"


def test_each_namespace_model_worker_secret_and_codec_has_a_salt_of_its_own() -> None:
    def of(digest: str, size: int = 1, worker: int = 0) -> ModelIdentity:
        return ModelIdentity("m", "", "float32", digest, (), size, worker)

    salts = [
        of("a").salt(""),
        of("a").salt("team"),
        of("a").salt("team "),
        of("b").salt(""),
        of("a", 2).salt(""),
        of("a", 2, 1).salt(""),
        of('a", "team').salt(""),
        of("a").salt("", "secret"),
        of("a").salt("", "secret\0"),
        of("a").salt("team", "secret"),
        of("a").salt("", "", "safetensors-int8"),
        of("a").salt("safetensors-int8"),
    ]
    assert len(set(salts)) == len(salts)
    assert of("a").salt("") == of("a").salt("")


def test_a_release_of_transformers_has_a_layout_of_its_own(
    monkeypatch: pytest.MonkeyPatch, plain: str
) -> None:
    monkeypatch.setattr(identity, "KV_LAYOUT", "1+transformers-6.0")
    assert digest(tiny("llama")) != plain


# ------------------------------------------------------------------------ adapters

peft = pytest.importorskip("peft")


def with_lora(seed: int = 0, **settings: Any) -> Any:
    """A PEFT model whose adapter does something."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **settings)
    adapted = peft.get_peft_model(tiny("llama"), config)
    add_noise(adapted, seed)
    return adapted.eval()


def add_noise(adapted: Any, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=source))


def base_digest(adapted: Any) -> str:
    return digest(adapted.get_base_model())


def test_adapters_count(plain: str) -> None:
    found = {"no adapter": plain}
    adapted = with_lora()
    found["adapter"] = base_digest(adapted)
    found["other weights"] = base_digest(with_lora(seed=1))
    found["other scale"] = base_digest(with_lora(lora_alpha=32))
    with adapted.disable_adapter():
        found["disabled"] = base_digest(adapted)
    assert base_digest(adapted) == found["adapter"]
    for module in adapted.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    found["scaled"] = base_digest(adapted)
    adapted = with_lora()
    adapted.merge_adapter()
    found["merged"] = base_digest(adapted)
    adapted = with_lora()
    adapted.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    found["second, not active"] = base_digest(adapted)
    adapted.set_adapter("second")
    found["second, active"] = base_digest(adapted)
    assert len(set(found.values())) == len(found), found


def test_the_same_adapter_twice() -> None:
    assert base_digest(with_lora()) == base_digest(with_lora())


def test_an_adapter_folded_into_the_weights_is_a_plain_model_with_other_weights(
    plain: str,
) -> None:
    folded = with_lora().merge_and_unload()
    assert digest(folded) != plain
    assert dict(ModelIdentity.of(folded).parts)["adapters"] == "none"
