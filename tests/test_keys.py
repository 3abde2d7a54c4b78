"""Keys: to text and back, and what is none."""

from __future__ import annotations

import contextlib
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chunkcache.errors import SettingError
from chunkcache.keys import VALUES, ChunkKey
from chunkcache.stores.topology import tagged

HASH = "0123456789abcdef" * 4

names = st.text() | st.text("@%{}[] /:+é\n\x00\ud800*?") | st.just("org/model@main")
counts = st.integers(0, 10**6)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
formats = st.text(string.ascii_lowercase + string.digits + "+.-", min_size=1, max_size=20)


@given(formats, names, counts, counts, hashes)
@example("safetensors", "", 1, 0, HASH)
@example("safetensors", "%40", 1, 0, HASH)
@example("safetensors", "a@b@metadata", 1, 0, HASH)
def test_keys_round_trip(format: str, name: str, size: int, worker: int, hash: str) -> None:
    key = ChunkKey(format, name, size, worker, hash)
    text = str(key)
    assert text.count("@") == 4
    assert text.isascii()
    assert not set(text) & set(" {}*?[]\n\x00")  # nor what means something to Redis
    for suffix in ("", *VALUES):
        assert ChunkKey.parse(text + suffix) == key
        assert ChunkKey.parse(tagged(text) + suffix) == key


@given(names, names)
def test_other_names_have_other_keys(one: str, two: str) -> None:
    texts = {str(ChunkKey("safetensors", name, 1, 0, HASH)) for name in (one, two)}
    assert len(texts) == len({one, two})


def test_common_names_stay_readable() -> None:
    key = ChunkKey("safetensors", "org/Some-Model_1.5+x", 1, 0, HASH)
    assert str(key) == f"safetensors@org/Some-Model_1.5+x@1@0@{HASH}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@@@@",
        f"safetensors@m@1@0@{HASH[:-1]}",
        f"safetensors@m@1@0@{HASH}0",
        f"safetensors@m@1@0@{{{HASH}",
        f"safetensors@m@1@0@{HASH}}}",
        f"safetensors@m@1@0@{{{{{HASH}}}}}",
        f"safetensors@m@1@0@{{{HASH}}}\n",
        f"safetensors@m@1@0@{HASH.upper()}",
        f"safetensors@m@1@0@{HASH}\n",
        f"safetensors@m@1@0@{HASH}@other",
        f"safetensors@m@1@0@{HASH}@metadata@metadata",
        f"safetensors@m@1@0@{HASH}@state@outputs",
        f"safetensors@m@-1@0@{HASH}",
        f"safetensors@m@1@²@{HASH}",
        f"safetensors@m@1@@{HASH}",
        f"safetensors@m@{'9' * 5000}@0@{HASH}",
        f"safetensors@a@b@1@0@{HASH}",
        f"Safe Tensors@m@1@0@{HASH}",
        f"@m@1@0@{HASH}",
        f"safetensors@%ff@1@0@{HASH}",
        f"safetensors@%c3@1@0@{HASH}",
    ],
)
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="not a chunk key"):
        ChunkKey.parse(text)


@given(st.text() | st.text(f"@%1af{HASH}").map(lambda t: f"safetensors@{t}@1@0@{HASH}"))
def test_parsing_fails_in_one_way_only(text: str) -> None:
    with contextlib.suppress(SettingError):
        ChunkKey.parse(text)
