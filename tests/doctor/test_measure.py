"""One measured answer: what is refused, and what a failing process says."""

from __future__ import annotations

import pytest
import torch

from chunkcache.doctor.measure import Job, Measurer, Stopwatch, in_fresh_process
from chunkcache.errors import ChunkCacheError, SettingError
from chunkcache.model.loading import SMOLLM2


def test_a_prompt_that_is_too_long_for_the_model_is_refused() -> None:
    job = Job(SMOLLM2, "", "", 8190, 32, 0, use_cache=False)
    with pytest.raises(SettingError, match="--tokens 8190"):
        Measurer(SMOLLM2).measure(job)


def test_a_process_that_fails_is_told_in_its_own_words() -> None:
    job = Job("/no/such/model", "", "", 300, 8, 0, use_cache=False)
    with pytest.raises(ChunkCacheError, match="--model '/no/such/model'"):
        in_fresh_process(job)


def test_the_prompt_is_not_the_first_token() -> None:
    watch = Stopwatch()
    watch.put(torch.tensor([[1, 2, 3]]))
    assert watch.tokens == []
    watch.put(torch.tensor([4]))
    assert watch.first_token_ms > 0
    assert watch.decode_ms == 0
    first = watch.first_token_ms
    watch.put(torch.tensor([5]))
    watch.put(torch.tensor([6]))
    assert watch.first_token_ms == first
    assert watch.decode_ms == 500 * (watch.tokens[2] - watch.tokens[0])
