from __future__ import annotations

import copy
import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.cache import RedisChunkCache
from chunkcache.errors import SettingError
from chunkcache.report import Report, RowReport
from chunkcache.stores.memory import MemoryStore
from chunkcache.tokens.plan import Kind, Span
from tests.models import tiny
from tests.models import tokens as random_ids
from tests.words import word_tokenizer

COUNTS = ("reused", "moved", "recomputed", "computed")
HOSTILE = '</div><script>alert(\'x\')</script>"&<b onmouseover="x">\n'


@st.composite
def rows(draw: st.DrawFn) -> RowReport:
    """A row of neighbouring spans with any texts in them."""
    position, spans = 0, []
    for _ in range(draw(st.integers(0, 6))):
        stop = position + draw(st.integers(1, 2000))
        texts = draw(st.tuples(*[st.sampled_from(["", "plain", HOSTILE]) | st.text()] * 3))
        spans.append(Span(position, stop, draw(st.sampled_from(Kind)), *texts))
        position = stop
    return RowReport(spans)


reports = st.builds(
    Report,
    rows=st.lists(rows(), max_size=3),
    bytes_read=st.integers(0, 10**12),
    bytes_saved=st.integers(0, 10**12),
    lossy=st.sampled_from(["", "safetensors-int8"]),
    bytes_written=st.integers(0, 10**12),
    bytes_dropped=st.integers(0, 10**12),
    lookup_ms=st.floats(0, 1e6),
    prefill_ms=st.floats(0, 1e6),
    store_errors=st.integers(0, 5),
    errors=st.lists(st.text() | st.just(HOSTILE), max_size=2),
    skipped=st.text() | st.just(HOSTILE),
)


class WellFormed(HTMLParser):
    """Follows the tags, and collects what a browser would show and the hover texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.titles: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(report: Report) -> WellFormed:
    parser = WellFormed()
    parser.feed(report._repr_html_())
    parser.close()
    return parser


@given(reports)
def test_counts_add_up(report: Report) -> None:
    assert sum(getattr(report, name) for name in COUNTS) == report.prompt_tokens
    for row in report.rows:
        assert sum(getattr(row, name) for name in COUNTS) == row.prompt_tokens
        assert row.prompt_tokens == (row.spans[-1].stop if row.spans else 0)
    for name in (*COUNTS, "prompt_tokens"):
        assert sum(getattr(row, name) for row in report.rows) == getattr(report, name)
    assert report.exact == (not report.lossy)
    report.approximate = True
    assert not report.exact


@given(reports)
def test_html_is_well_formed_and_hostile_texts_stay_texts(report: Report) -> None:
    html = parsed(report)
    assert html.open == []
    assert html.tags <= {"div", "span"}
    assert html.attributes <= {"style", "title", "role", "aria-label"}


def test_html_shows_each_span_and_its_reason() -> None:
    spans = [
        Span(0, 128, Kind.REUSED, "ab" * 32, "store"),
        Span(128, 130, Kind.COMPUTED, "cd" * 32, reason=HOSTILE.strip()),
    ]
    report = Report([RowReport(spans)], skipped=HOSTILE.strip())
    html = parsed(report)
    assert html.titles[0].splitlines() == [
        "reused: tokens 0 to 128",
        "from: store",
        "chunk abababababab…",
    ]
    assert HOSTILE.strip() in html.titles[1]
    assert HOSTILE.strip() in html.text
    assert "reused 128" in html.text
    assert "moved" not in html.text


def test_ids_and_tokenizer_are_for_drawing_only() -> None:
    tokenizer = word_tokenizer()
    row = RowReport([Span(0, 2, Kind.COMPUTED)], np.array([77, 78]))
    report = Report([row], tokenizer=tokenizer)
    assert "w77 w78" in parsed(report).text
    row.ids = None
    assert "w77" not in parsed(report).text
    row.ids = np.array([77, 78])
    assert "7" not in repr(report)
    found = report.to_dict()
    assert "tokenizer" not in found
    assert "77" not in json.dumps(found)
    assert report == Report([RowReport([Span(0, 2, Kind.COMPUTED)])])


def test_show_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    spans = [Span(0, 2, Kind.REUSED, "k"), Span(2, 3, Kind.COMPUTED, "l")]
    report = Report([RowReport(spans, np.array([77, 78, 79]))], errors=["[red]\x1b[31m"])
    report.show()
    assert "w77" not in capsys.readouterr().out
    report.show(word_tokenizer())
    out = capsys.readouterr().out
    assert "[reused] w77 w78│[computed]  w79" in out
    assert "[red]␛[31m" in out
    assert "\x1b" not in out


def test_show_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    report = Report([RowReport([Span(0, 1, Kind.REUSED)], np.array([77]))])
    report.show(word_tokenizer())
    assert "w77" in shown[0]["text/html"]
    assert shown[0]["text/plain"] == str(report)


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(SettingError, match="AutoTokenizer"):
        Report().show("SmolLM2")  # type: ignore[arg-type]


@given(reports)
def test_to_dict_is_json_and_complete(report: Report) -> None:
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    for name in (*COUNTS, "prompt_tokens", "exact", "bytes_read", "bytes_written", "bytes_dropped"):
        assert found[name] == getattr(report, name)
    for name in ("lookup_ms", "read_ms", "move_ms", "prefill_ms", "store_errors", "skipped"):
        assert found[name] == getattr(report, name)
    assert found["errors"] == report.errors
    assert [row["reused"] for row in found["rows"]] == [row.reused for row in report.rows]
    spans = [(i, span) for i, row in enumerate(report.rows) for span in row.spans]
    for chunk, (index, span) in zip(found["chunks"], spans, strict=True):
        assert chunk["row"] == index
        for name in ("start", "stop", "kind", "key", "origin", "reason"):
            assert chunk[name] == getattr(span, name)


def test_to_dict_is_a_copy() -> None:
    report = Report(errors=["first"])
    report.to_dict()["errors"].append("second")
    assert report.errors == ["first"]


def test_without_pandas_the_mend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        Report().to_dataframe()


def test_html_for_a_page_of_ones_own() -> None:
    row = RowReport([Span(0, 2, Kind.COMPUTED)])
    row.ids = np.array([5, 6])
    report, decoder = Report([row]), word_tokenizer()
    assert report.to_html() == report._repr_html_()
    assert report.to_html(decoder) == Report([row], tokenizer=decoder)._repr_html_()
    assert report.to_html(decoder) != report.to_html()
    with pytest.raises(SettingError, match="tokenizer"):
        report.to_html("gpt2")  # type: ignore[arg-type]


def test_to_dataframe() -> None:
    pytest.importorskip("pandas")
    columns = ["row", "start", "stop", "kind", "key", "origin", "reason"]
    assert list(Report().to_dataframe().columns) == columns
    report = Report(
        [RowReport([Span(0, 4, Kind.REUSED, "k", "store")]), RowReport([Span(0, 9, Kind.COMPUTED)])]
    )
    frame = report.to_dataframe()
    assert list(frame.columns) == columns
    assert frame.to_dict("records") == report.chunks
    assert frame.groupby("kind")["stop"].sum().to_dict() == {"computed": 9, "reused": 4}


def test_in_words() -> None:
    assert str(Report()) == "no prompt yet"
    spans = [Span(0, 1500, Kind.REUSED), Span(1500, 2000, Kind.COMPUTED)]
    report = Report([RowReport(spans)], bytes_read=2_500_000, skipped="no reason")
    assert str(report) == (
        "1,500 of 2,000 prompt tokens reused, 500 computed, 2.5 MB read, "
        "lookup 0.0 + read 0.0 + prefill 0.0 ms, normal prefill: no reason"
    )
    assert "read 0.0 + move 2.0 + prefill" in str(Report(report.rows, move_ms=2))


@given(reports)
def test_words_never_fail(report: Report) -> None:
    assert str(report)


def test_each_cause_is_listed_once_and_each_failure_counted() -> None:
    report = Report()
    for text in ("down", "down", "slow", "not asked until 12:00:00: slow"):
        report.note_error(ConnectionError(text))
    assert report.errors == ["down", "slow"]
    assert report.store_errors == 4
    report.rows = [RowReport([Span(0, 1, Kind.COMPUTED)])]
    assert "4 store errors: down; slow" in str(report)


def held_by_each_row(cache: RedisChunkCache) -> list[list[int]]:
    found = []
    for row in cache.report.rows:
        assert row.ids is not None
        assert len(row.ids) == row.prompt_tokens
        found.append(row.ids.tolist())
    return found


def test_the_ids_are_those_of_the_prompt() -> None:
    model, store = tiny("llama"), MemoryStore()
    ids = random_ids(150, rows=2)
    for chunked in ({}, {"prefill_chunk_size": 60}):
        cache = RedisChunkCache(model, store, tokenizer=word_tokenizer())
        model.generate(ids, past_key_values=cache, max_new_tokens=3, **chunked)
        assert held_by_each_row(cache) == ids.tolist()
    longer = torch.cat([ids, random_ids(20, rows=2, seed=1)], dim=1)
    model.generate(longer, past_key_values=cache, max_new_tokens=1)
    assert held_by_each_row(cache) == longer.tolist()
    assert f"w{longer[1, -1]}" in parsed(cache.report).text
    assert copy.deepcopy(cache).report.tokenizer is cache.report.tokenizer


def test_padding_is_not_drawn() -> None:
    model = tiny("llama")
    ids, mask = random_ids(40, rows=2), torch.ones(2, 40, dtype=torch.long)
    mask[0, :15] = 0
    cache = RedisChunkCache(model, MemoryStore())
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=1)
    assert held_by_each_row(cache) == [ids[0, 15:].tolist(), ids[1].tolist()]


def test_ids_where_the_cache_stands_aside() -> None:
    model = tiny("llama").train()
    ids = random_ids(50)
    cache = RedisChunkCache(model, MemoryStore())
    for chunked in ({}, {"prefill_chunk_size": 20}):
        cache.reset()
        model.generate(ids, past_key_values=cache, max_new_tokens=1, **chunked)
        assert cache.report.skipped
        assert held_by_each_row(cache) == ids.tolist()
    cache.reset()
    embeds = model.get_input_embeddings()(ids)
    model.generate(inputs_embeds=embeds, past_key_values=cache, max_new_tokens=1)
    assert [row.ids for row in cache.report.rows] == [None]
    assert cache.report._repr_html_()
