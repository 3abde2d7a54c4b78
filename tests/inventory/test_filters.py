from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.errors import SettingError
from chunkcache.inventory.filters import Filter, split_tags
from chunkcache.keys import ChunkKey

KEY = ChunkKey("safetensors-int8", "org/m", 1, 0, "a" * 64)
METADATA = {"namespace": "team-a", "tags": "project=docs, user=7", "temperature": "0.7"}


def made(ago: timedelta) -> dict[str, str]:
    return {**METADATA, "created": (datetime.now(UTC) - ago).isoformat(timespec="seconds")}


@pytest.mark.parametrize(
    ("chosen", "meant"),
    [
        (Filter(), True),
        (Filter(model="org/m"), True),
        (Filter(model="m"), False),
        (Filter(model=""), False),
        (Filter(codec="safetensors-int8"), True),
        (Filter(codec="safetensors"), False),
        (Filter(namespace="team-a"), True),
        (Filter(namespace=""), False),
        (Filter(tags="user=7"), True),
        (Filter(tags="user=7, project=docs"), True),
        (Filter(tags="user=7,other"), False),
        (Filter(tags="user"), False),
        (Filter(fields={"temperature": "0.7"}), True),
        (Filter(fields={"temperature": "0.70"}), False),
        (Filter(fields={"missing": ""}), False),
        (Filter(model="org/m", namespace="team-a", fields={"temperature": "0.8"}), False),
    ],
)
def test_all_that_is_asked_for_must_be_so(chosen: Filter, meant: bool) -> None:
    assert chosen.matches(KEY, METADATA) is meant


def test_chunks_without_metadata_are_meant_by_what_their_key_says() -> None:
    assert Filter(model="org/m").matches(KEY, {})
    assert not Filter(namespace="").matches(KEY, {})
    assert not Filter(tags="a").matches(KEY, {})


@pytest.mark.parametrize(
    ("chosen", "meant"),
    [
        (Filter(min_age=3600), True),
        (Filter(min_age=3 * 3600), False),
        (Filter(max_age=3600), False),
        (Filter(max_age=3 * 3600), True),
        (Filter(min_age=3600, max_age=3 * 3600), True),
    ],
)
def test_age(chosen: Filter, meant: bool) -> None:
    assert chosen.matches(KEY, made(timedelta(hours=2))) is meant


@pytest.mark.parametrize("created", ["", "yesterday", "9999"])
def test_what_has_no_age_is_neither_old_nor_young(created: str) -> None:
    for chosen in (Filter(min_age=0), Filter(max_age=1e12)):
        assert not chosen.matches(KEY, {"created": created})


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("model=org/m", Filter(model="org/m")),
        ("namespace= codec=safetensors", Filter(namespace="", codec="safetensors")),
        ("tags=project=docs,user=7", Filter(tags="project=docs,user=7")),
        ("age>7d  age<2w", Filter(min_age=7 * 86_400, max_age=14 * 86_400)),
        ("age>90 age<1.5h", Filter(min_age=90, max_age=5400)),
        ("age>2m age<90s", Filter(min_age=120, max_age=90)),
        (
            "temperature=0.7 dtype=float32",
            Filter(fields={"temperature": "0.7", "dtype": "float32"}),
        ),
        ("note='two words' x=<3", Filter(fields={"note": "two words", "x": "<3"})),
    ],
)
def test_filters_as_text(text: str, chosen: Filter) -> None:
    assert Filter.parse(text) == chosen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("model", "'model' cannot be understood"),
        ("=x", "cannot be understood"),
        ("age=7d", "write name=value, age>7d or age<1h"),
        ("age>soon", "cannot be understood"),
        ("age>-1d", "cannot be understood"),
        ("temperature>0.5", "cannot be understood"),
        ("min_age=3", "cannot be understood"),
        ("fields=3", "cannot be understood"),
        ("model=a model=b", "'model=b' says twice"),
        ("x=1 x=1", "says twice"),
        ("age>1d age>2d", "says twice"),
        ("x='open", "No closing quotation"),
    ],
)
def test_text_that_is_no_filter(text: str, message: str) -> None:
    with pytest.raises(SettingError, match=re.escape(message)):
        Filter.parse(text)


@given(st.text() | st.text("age<>=17dhx '\"\\"))
def test_parsing_fails_in_one_way_only(text: str) -> None:
    try:
        chosen = Filter.parse(text)
    except SettingError:
        return
    assert chosen != Filter()  # what is written never means all


def test_tags() -> None:
    assert split_tags(" a, b=c,,a ,") == {"a", "b=c"}
    assert split_tags("") == set()


@pytest.mark.parametrize("tags", ["", " ", ",", " , "])
def test_no_tag_is_not_every_chunk(tags: str) -> None:
    for make in (lambda: Filter(tags=tags), lambda: Filter.parse(f"'tags={tags}'")):
        with pytest.raises(SettingError, match="names no tag"):
            make()
