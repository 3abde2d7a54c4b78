from __future__ import annotations

import json

import pytest

from chunkcache.insight.explanation import Explanation, Finding
from chunkcache.tokens.plan import Kind
from tests.test_report import HOSTILE, WellFormed

FINDINGS = (
    Finding(0, 128, Kind.REUSED, "aa", "store", bytes=1_000_000),
    Finding(128, 256, Kind.REUSED, "bb", "store", bytes=1_000_000),
    Finding(256, 384, Kind.MOVED, "cc", reason="elsewhere", bytes=500_000, old_start=56),
    Finding(384, 512, Kind.MOVED, "dd", reason="elsewhere", bytes=500_000, old_start=184),
    Finding(512, 640, Kind.MOVED, "ee", reason="elsewhere", bytes=500_000, old_start=0),
    Finding(640, 641, Kind.COMPUTED, reason="last"),
    Finding(0, 641, Kind.COMPUTED, reason=HOSTILE.strip(), row=1),
)
EXPLANATION = Explanation(FINDINGS, 3_500_000, errors=("it was slow",))


def test_counts() -> None:
    assert EXPLANATION.prompt_tokens == 2 * 641
    assert (EXPLANATION.reused, EXPLANATION.moved, EXPLANATION.computed) == (256, 384, 642)
    assert not EXPLANATION.exact
    assert Explanation(FINDINGS[:2]).exact
    assert not Explanation(FINDINGS[:2], lossy="safetensors-int8").exact
    assert Explanation(FINDINGS[5:], lossy="safetensors-int8").exact  # all is computed
    assert [found.hit for found in FINDINGS] == [True] * 5 + [False] * 2


def test_a_part_of_a_finding() -> None:
    part = FINDINGS[2].part(300, 310)
    assert (part.start, part.stop, part.old_start, part.origin) == (300, 310, 100, "position 100")
    assert FINDINGS[0].part(3, 5).origin == "store"
    assert part.key == "cc"


def test_in_words_alike_neighbours_are_one_line() -> None:
    head, names, *lines = str(EXPLANATION).splitlines()
    assert head == (
        "256 of 1,282 prompt tokens would be reused, 384 moved, 642 computed, 3.5 MB to read, "
        "it was slow"
    )
    assert names.split() == ["row", "tokens", "chunks", "MB", "why"]
    assert [" ".join(line.split()) for line in lines[:4]] == [
        "0 0 to 256 reused 2 2.0",
        "0 256 to 512 moved 2 1.0 elsewhere (there from 56)",
        "0 512 to 640 moved 1 0.5 elsewhere (there from 0)",
        "0 640 to 641 computed last",
    ]
    assert lines[4].startswith("1 ")


def test_a_long_table_ends_somewhere() -> None:
    many = tuple(Finding(i, i + 1, Kind.COMPUTED, reason=str(i)) for i in range(500))
    lines = str(Explanation(many)).splitlines()
    assert len(lines) == 42
    assert "461 lines more" in lines[-1]


def test_why_it_would_stand_aside() -> None:
    assert "normal prefill: no reason" in str(Explanation((), skipped="no reason"))


def test_html_is_well_formed_and_hostile_texts_stay_texts() -> None:
    parser = WellFormed()
    parser.feed(EXPLANATION._repr_html_())
    parser.close()
    assert parser.open == []
    assert parser.tags <= {"div", "span", "table", "tr", "td"}
    assert parser.attributes <= {"style", "title", "role", "aria-label"}
    assert "reused 256" in parser.text
    assert HOSTILE.strip() in parser.text
    assert len(parser.titles) == len(FINDINGS)


def test_to_dict_is_json_and_complete() -> None:
    found = json.loads(json.dumps(EXPLANATION.to_dict(), allow_nan=False))
    for name in ("prompt_tokens", "reused", "moved", "computed", "bytes_to_read", "exact"):
        assert found[name] == getattr(EXPLANATION, name)
    assert found["errors"] == ["it was slow"]
    assert found["skipped"] == ""
    for mapping, finding in zip(found["chunks"], FINDINGS, strict=True):
        assert Finding(**{**mapping, "kind": Kind(mapping["kind"])}) == finding


def test_to_dataframe() -> None:
    pytest.importorskip("pandas")
    frame = EXPLANATION.to_dataframe()
    assert frame["bytes"].sum() == 3_500_000
    assert list(frame["row"]) == [0] * 6 + [1]
    assert list(Explanation(()).to_dataframe().columns) == list(frame.columns)


def test_reasons_take_one_line_and_do_not_act_on_a_terminal() -> None:
    hostile = "\x1b[2J\nforged line"
    told = Explanation((Finding(0, 8, Kind.COMPUTED, reason=hostile),), errors=(hostile,))
    assert "\x1b" not in str(told) + told._repr_html_()
    assert not any(line.startswith("forged") for line in str(told).splitlines())
