from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from chunkcache.errors import SettingError
from chunkcache.samples import load_smollm2
from chunkcache.tokens.plan import Kind, Span
from chunkcache.tokens.token_text import Decoder, check_decoder, shown, span_texts, visible


@cache
def smollm2() -> Decoder:
    tokenizer: Decoder = load_smollm2()[1]
    return tokenizer


def spans_of(borders: list[int]) -> list[Span]:
    return [Span(a, b, Kind.COMPUTED) for a, b in pairwise(borders) if a < b]


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1), st.lists(st.integers(0, 30), max_size=6), st.integers(0, 5))
def test_the_texts_of_spans_are_the_text(text: str, cuts: list[int], first: int) -> None:
    tokenizer = smollm2()
    ids = np.array(tokenizer(text)["input_ids"])  # type: ignore[operator]
    borders = sorted({0, *(cut for cut in cuts if cut < len(ids)), len(ids)})
    spans = spans_of([first + border for border in borders])
    assert "".join(span_texts(tokenizer, ids, spans)) == tokenizer.decode(ids.tolist())


def test_a_character_in_two_spans_stands_in_the_second() -> None:
    ids = np.array(smollm2()("a 漢 b")["input_ids"])  # type: ignore[operator]
    spans = spans_of(list(range(len(ids) + 1)))
    texts = span_texts(smollm2(), ids, spans)
    assert "".join(texts) == "a 漢 b"
    assert "" in texts
    assert "\ufffd" not in "".join(texts)


def test_spaces_stay_where_a_decoder_drops_the_first_one() -> None:
    raw = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1}, unk_token="▁one"))
    raw.decoder = decoders.Metaspace()

    class Sentences:
        def decode(self, token_ids: list[int], **_: object) -> str:
            return str(raw.decode(token_ids))

    assert Sentences().decode([1]) == "two"
    assert span_texts(Sentences(), np.array([0, 1]), spans_of([0, 1, 2])) == ["one", " two"]


def test_nothing_acts_on_a_terminal_or_a_page() -> None:
    given = "a\tb\nc\r\x00\x1b[31m\x7f\x9b\u202e\u2066\ud800é漢"
    assert visible(given) == "a\tb\nc␍␀␛[31m␡\ufffd\ufffd\ufffd\ufffdé漢"


def test_what_is_shown_takes_one_line() -> None:
    assert shown("a\tb\nc\r\n\u2028\x1b\ud800é") == "a␉b␊c␍␊␊␛\ufffdé"


def test_what_is_no_tokenizer_is_refused() -> None:
    check_decoder(smollm2())
    with pytest.raises(SettingError, match="tokenizer='gpt2' must be"):
        check_decoder("gpt2")
