from __future__ import annotations

import numpy as np
import pytest
import torch

from chunkcache import SettingError
from chunkcache.tokens.texts import TextReader
from tests.models import VOCABULARY, tiny
from tests.words import word_tokenizer

BOS = 1


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def reader(model):
    return TextReader(model, word_tokenizer())


def test_a_text_gets_no_special_tokens(reader):
    assert reader.read("w5 w6", "it").tolist() == [5, 6]


@pytest.mark.parametrize(
    "given",
    [[5, 6], (5, 6), np.array([5, 6], dtype=np.int32), torch.tensor([5, 6]), range(5, 7)],
    ids=str,
)
def test_ids_stay_as_they_are(reader, given):
    ids = reader.read(given, "it")
    assert ids.tolist() == [5, 6]
    assert ids.dtype == np.int64


def test_nothing_is_read_as_nothing(reader):
    assert reader.read("", "it").shape == reader.read([], "it").shape == (0,)


@pytest.mark.parametrize(
    "given",
    [None, 7, 1.5, [1.0, 2.0], [True, False], ["w5"], [[5, 6]], torch.tensor([[5, 6]]),
     torch.tensor(5), [[1], [2, 3]], {"input_ids": [5]}, b"w5", torch.tensor([1.0]),
     torch.tensor([1.0], dtype=torch.bfloat16), [10**30]],
    ids=str,
)  # fmt: skip
def test_what_is_neither_text_nor_ids_is_refused(reader, given):
    with pytest.raises(SettingError, match="document 7 is neither a text nor"):
        reader.read(given, "document 7")


@pytest.mark.parametrize("given", [[5, VOCABULARY], [-1], np.array([2**63], dtype=np.uint64)])
def test_ids_that_the_model_does_not_know_are_refused(reader, given):
    with pytest.raises(SettingError, match=r"document 7 has token ids.*own tokenizer"):
        reader.read(given, "document 7")


def test_a_text_needs_a_tokenizer(model):
    bare = TextReader(model, None)
    assert bare.read([5], "it").tolist() == [5]
    for read in (lambda: bare.read("w5", "prefix"), lambda: bare.read_prefix("w5")):
        with pytest.raises(SettingError, match="prefix is a text: pass tokenizer="):
            read()
    with pytest.raises(SettingError, match="tokenizer="):
        TextReader(model, "gpt2")


def test_the_prefix_as_the_tokenizer_begins_a_prompt(model):
    reader = TextReader(model, word_tokenizer())
    assert reader.read_prefix(None).tolist() == [BOS]
    assert reader.read_prefix("").tolist() == [BOS]
    assert reader.read_prefix("w5").tolist() == [BOS, 5]
    assert reader.read_prefix("<s> w5").tolist() == [BOS, 5]  # as chat templates have it
    assert reader.read_prefix([5]).tolist() == [5]
    assert reader.read_prefix([]).tolist() == []


def test_a_tokenizer_that_adds_several_tokens_on_both_sides(model):
    reader = TextReader(model, word_tokenizer("<pad> <s> $A </s>"))
    assert reader.read_prefix(None).tolist() == [0, BOS]
    assert reader.read_prefix("w5").tolist() == [0, BOS, 5]


def test_a_tokenizer_that_adds_nothing(model):
    reader = TextReader(model, word_tokenizer("$A"))
    assert reader.read_prefix(None).tolist() == [BOS]
    assert reader.read_prefix("w5").tolist() == [5]


def test_without_a_tokenizer_the_model_has_the_bos_token(model):
    assert TextReader(model, None).read_prefix(None).tolist() == [BOS]
    assert TextReader(tiny(bos_token_id=None), None).read_prefix(None).tolist() == []


def test_a_prefix_leaves_room(model, reader):
    assert len(reader.read_prefix([5] * (reader.longest - 1))) == 511
    with pytest.raises(SettingError, match=r"512 tokens.*no room"):
        reader.read_prefix([5] * 512)


def test_a_text_that_utf_8_cannot_express(reader):
    with pytest.raises(SettingError, match=r"document 3 .* UTF-8 .* character 3"):
        reader.read("w5 \ud800", "document 3")
    with pytest.raises(SettingError, match="prefix is no text"):
        reader.read_prefix("\udcff")


def test_a_model_without_positions_takes_texts_of_any_length():
    model = tiny("bloom")
    del model.config.max_position_embeddings  # as in BLOOM's own configuration
    reader = TextReader(model, word_tokenizer())
    assert len(reader.read_prefix([5] * 5000)) == 5000
