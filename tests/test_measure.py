"""One measured answer: what is refused, and what a failing process says."""

from __future__ import annotations

import pytest
import torch

from chunkcache.errors import ChunkCacheError, SettingError
from chunkcache.loading import SMOLLM2
from chunkcache.measure import FirstToken, Job, Measurer, in_fresh_process


def test_a_prompt_that_is_too_long_for_the_model_is_refused() -> None:
    job = Job(SMOLLM2, "", "", 8190, 32, 0, use_cache=False)
    with pytest.raises(SettingError, match="--tokens 8190"):
        Measurer(SMOLLM2).measure(job)


def test_a_process_that_fails_is_told_in_its_own_words() -> None:
    job = Job("/no/such/model", "", "", 300, 8, 0, use_cache=False)
    with pytest.raises(ChunkCacheError, match="--model '/no/such/model'"):
        in_fresh_process(job)


def test_the_prompt_is_not_the_first_token() -> None:
    streamer = FirstToken()
    streamer.put(torch.tensor([[1, 2, 3]]))
    assert streamer.seconds == 0
    streamer.put(torch.tensor([4]))
    first = streamer.seconds
    assert first > 0
    streamer.put(torch.tensor([5]))
    assert streamer.seconds == first
