from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from chunkcache.errors import SettingError
from chunkcache.reuse.prompt import Prompt
from tests.models import tiny

MODEL = tiny("llama")
IDS = [[5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_every_form_of_ids(make: Any) -> None:
    batch = Prompt.of(make(IDS))
    assert batch.ids.tolist() == IDS
    assert batch.mask.tolist() == [[1] * 3] * 2
    assert Prompt.of(make(IDS[0])).ids.tolist() == IDS[:1]


def test_the_caller_may_change_its_ids() -> None:
    ids = torch.tensor(IDS)
    prompt = Prompt.of(ids.int())
    assert prompt.ids.dtype == torch.long
    longer = prompt.followed_by(torch.tensor([[1], [2]]))
    assert longer.ids.tolist() == [[5, 6, 7, 1], [8, 9, 10, 2]]
    assert prompt.ids.tolist() == IDS


@pytest.mark.parametrize(
    "mask", [[[0, 0, 2], [1, 1, 1]], torch.tensor([[0, 0, 1], [1, 1, 1]], dtype=torch.bool)]
)
def test_padding(mask: Any) -> None:
    prompt = Prompt.of(IDS, mask)
    assert prompt.mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert prompt.positions.tolist() == [[0, 0, 0], [0, 1, 2]]
    assert prompt.followed_by(torch.tensor([[1], [2]])).positions.tolist() == [
        [0, 0, 0, 1],
        [0, 1, 2, 3],
    ]
    call = prompt.as_call(MODEL)
    assert call.pads() == [2, 0]
    assert call.follows(0, [2, 0])


def test_holes_are_not_padding() -> None:
    call = Prompt.of(IDS, [[1, 0, 1], [1, 1, 1]]).as_call(MODEL)
    assert not call.follows(0, call.pads())


@pytest.mark.parametrize(
    "ids",
    [
        "a text",
        [[1, 2], [3]],
        [[0.5]],
        [[[1]]],
        1,
        None,
        [],
        [[]],
        {"input_ids": IDS},
        BatchEncoding({"input_ids": IDS}),
        ["a", "b"],
        [1 << 70],
    ],
    ids=str,
)
def test_what_is_no_prompt(ids: Any) -> None:
    with pytest.raises(SettingError, match="input_ids"):
        Prompt.of(ids)


@pytest.mark.parametrize("mask", [[[1, 1]], [[1.0] * 3] * 2, [[1, 1, 1]], "left"], ids=str)
def test_what_is_no_mask(mask: Any) -> None:
    with pytest.raises(SettingError, match="attention_mask"):
        Prompt.of(IDS, mask)
