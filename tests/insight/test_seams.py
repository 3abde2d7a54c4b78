"""Seams: the same text with other tokens, found beside what is known."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from chunkcache import RedisChunkCache
from chunkcache.anywhere.matching import Match, StoredChunk
from chunkcache.insight.seams import Seam, find_seams
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny

LETTERS = [*"abcdefghijklmnopqrstuvwxyz .\n"]
JOINED = ["a" + "b", ".\n", " c", "de", "def"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A token per letter, but for a few that are joined."""
    vocabulary = {text: number for number, text in enumerate([*LETTERS, *JOINED], 3)}
    merges = [("a", "b"), (".", "\n"), (" ", "c"), ("d", "e"), ("de", "f")]
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.decoder = decoders.Fuse()
    return made


def seams(tokenizer: Tokenizer, here: list[int], stored: list[int], start: int, stop: int, at: int):
    """The seams of a prompt of which tokens start to stop are the stored ones from `at` on."""
    assert here[start:stop] == stored[at : at + stop - start]
    chunk = StoredChunk("f" * 64, 0, np.array(stored))
    found = find_seams(
        np.array(here), [Match(start, stop, chunk, at)], lambda ids: tokenizer.decode(ids), 1
    )
    return [(seam.position, seam.here, seam.stored) for seam in found]


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids


def test_an_end_that_is_joined_with_what_follows(tokenizer):
    stored, here = ids(tokenizer, "xyz."), ids(tokenizer, "xyz.\n\nq")
    assert seams(tokenizer, here, stored, 0, 3, 0) == [(3, (".\n",), (".",))]


def test_a_start_that_is_joined_with_what_stands_before(tokenizer):
    stored, here = ids(tokenizer, "cxyz"), ids(tokenizer, "q cxyz")
    assert seams(tokenizer, here, stored, 2, 5, 1) == [(1, (" c",), ("c",))]


def test_several_tokens_until_both_meet(tokenizer):
    text = "xyz" + "def" + "gh"
    here = ids(tokenizer, text)
    stored = [*ids(tokenizer, "xyz"), *ids(tokenizer, "d"), *ids(tokenizer, "e"), *here[4:]]
    stored.insert(5, *ids(tokenizer, "f"))
    assert seams(tokenizer, here, stored, 0, 3, 0) == [(3, ("def",), ("d", "e", "f"))]
    before = seams(tokenizer, here, stored, 4, 6, 6)
    assert before == [(3, ("def",), ("d", "e", "f"))]


@pytest.mark.parametrize(
    ("stored", "here"),
    [
        ("xyz", "xyzq"),  # the stored text ends
        ("xyzq", "xyz"),  # the prompt ends
        ("xyzr", "xyzq"),  # the text goes on otherwise
        ("xyz r", "xyz c"),  # only a space is the same
    ],
)
def test_other_texts_are_no_seams(tokenizer, stored, here):
    assert seams(tokenizer, ids(tokenizer, here), ids(tokenizer, stored), 0, 3, 0) == []


def test_explain_shows_them(tokenizer):
    model = tiny()
    text = "thequickbrownfoxjumpsoverthelazydogandthenitwent" * 2 + "."
    stored, store = ids(tokenizer, text), MemoryStore()
    with RedisChunkCache(model, store, reuse="anywhere") as cache:
        prompt = np.array([stored])
        import torch

        model.generate(torch.from_numpy(prompt), past_key_values=cache, max_new_tokens=1)
    here = ids(tokenizer, text + "\nand more than that")
    told = RedisChunkCache(model, store).explain(here, tokenizer=tokenizer)
    assert told.seams == (Seam(0, len(stored) - 1, (".\n",), (".",)),)
    assert told.to_dict()["seams"][0]["here"] == (".\n",)
    line = "tokenised differently at the seam, row 0, token 96: '.\\n' here, '.' in the store"
    assert str(told).splitlines()[-1] == line
    assert "tokenised differently" in told._repr_html_()
    assert RedisChunkCache(model, store).explain(here).seams == ()
