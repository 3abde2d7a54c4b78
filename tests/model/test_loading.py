"""Models by name."""

from __future__ import annotations

import json

import pytest

from chunkcache import SettingError
from chunkcache.model.loading import SMOLLM2, load_model, load_tokenizer
from tests.models import tiny
from tests.words import word_tokenizer


def test_a_folder(tmp_path):
    tiny().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    assert not model.training
    assert tokenizer("w7")["input_ids"] == [1, 7]


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "nonsense"}'])
def test_what_cannot_be_loaded(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SettingError, match=r"(?s)--model .* cannot be loaded: .* hub id"):
        load_model(str(tmp_path))


def test_damaged_weights(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(SettingError, match=r"(?s)--model .* cannot be loaded"):
        load_model(str(tmp_path))


def test_a_tokenizer_alone(tmp_path):
    word_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("w7")["input_ids"] == [1, 7]
    assert load_tokenizer(SMOLLM2).decode([28]) == ","
    with pytest.raises(SettingError, match="--tokenizer '/no/such'"):
        load_tokenizer("/no/such")


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: change_config(folder, hidden_size=32, num_attention_heads=2),
        lambda folder: change_config(folder, hidden_size="x"),
        lambda folder: change_config(folder, num_attention_heads=0),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "pytorch_model.bin").write_bytes(b"garbage"),
        ),
    ],
    ids=["other weights", "type", "no heads", "tokenizer", "pickle"],
)
def test_a_folder_with_something_wrong(tmp_path, damage):
    tiny().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(SettingError, match=r"(?s)--model .* cannot be loaded: .* hub id"):
        load_model(str(tmp_path))
