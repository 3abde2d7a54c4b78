"""ChunkCacheLM gives lm-eval what its own HFLM gives, and computes less."""

from __future__ import annotations

from typing import Any

import pytest

from chunkcache import metrics
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens
from tests.words import word_tokenizer, words

pytest.importorskip("lm_eval")


def text(count: int, seed: int) -> str:
    return words((tokens(count, seed=seed)[0].clamp(min=4)).tolist())


def likelihoods(lm: Any) -> list[tuple[float, bool]]:
    from lm_eval.api.instance import Instance

    shots = text(120, seed=1)
    pairs = [
        (f"{shots} {text(5 + 3 * (number // 2), seed=2)}", f" {text(2 + number % 3, seed=number)}")
        for number in range(8)
    ]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    answers: list[tuple[float, bool]] = lm.loglikelihood(requests, disable_tqdm=True)
    return answers


@pytest.mark.parametrize("batch", [1, 3])
def test_log_likelihoods_are_those_of_lm_eval(batch: int) -> None:
    from lm_eval.models.huggingface import HFLM

    from chunkcache.harness import ChunkCacheLM

    how = {"tokenizer": word_tokenizer(), "batch_size": batch}
    plain = likelihoods(HFLM(pretrained=tiny("llama"), **how))
    before = metrics.snapshot()["tokens"]["reused"]
    lm = ChunkCacheLM(pretrained=tiny("llama"), store=MemoryStore(), chunk_size=16, **how)
    for (mine, greedy), (theirs, theirs_greedy) in zip(likelihoods(lm), plain, strict=True):
        assert abs(mine - theirs) < 1e-3
        assert greedy == theirs_greedy
    assert metrics.snapshot()["tokens"]["reused"] - before >= 5 * 112
