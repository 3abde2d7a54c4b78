"""Fuzzing: what others wrote may be anything, and is the truth or one of our errors."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from fuzzing import CODINGS, FRAMES, INDEXED, TARGETS, weight
from hypothesis import given, note, settings
from hypothesis import strategies as st

DEEP = 100_000


@pytest.fixture(scope="module", autouse=True)
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=100, deadline=None)
@given(source=st.randoms(use_true_random=True))
def test_any_input(name: str, source: Random) -> None:
    target = TARGETS[name]
    made = target.make(source)
    note(f"{made!r:.1000}")
    target.check(made)


def damages(good: bytes) -> list[bytes]:
    header = int.from_bytes(good[:8], "little")
    return [
        b"",
        good[:7],
        good[:-1],
        good + b"x",
        good + bytes(1 << 20),
        (1 << 63).to_bytes(8, "little") + good[8:],
        (header + 1).to_bytes(8, "little") + good[8:],
        good[:8] + b"[" * DEEP,
        good[:8] + b'{"a":' * DEEP,
        *FRAMES,
    ]


# What a fuzzer found, and what it would find too seldom.
MET: list[tuple[str, Any]] = [
    *(("blob", (name, bad)) for name, blobs in CODINGS.items() for bad in damages(blobs.good)),
    *(("blob", (name, blobs.good)) for name, blobs in CODINGS.items()),
    ("settings", ("config", "ttl = " + "[" * DEEP)),
    ("settings", ("config", "ttl = " + "9" * 5000)),
    *(
        (f"{what} of a server", (verb, replies))
        for what, verbs in (
            ("blobs", ("fetch",)),
            ("replies", ("sizes", "read_metadata", "write", "delete", "scan", "connect")),
        )
        for verb in verbs
        for replies in (
            b"$1\r\n0\r\n" * 8,
            b":-5\r\n" * 8,
            b",1.5\r\n" * 8,
            b"-ASK x y z\r\n" * 8,
            b"-MOVED\r\n" * 8,
            b"*2\r\n:0\r\n:0\r\n" * 8,
            b"*2\r\n*0\r\n:1\r\n" * 8,
            b"*2\r\n$1\r\n0\r\n*1\r\n:5\r\n" * 8,
            b"$1048576\r\n" + bytes(1 << 16),
            b"$1048577\r\n" + bytes(1 << 16),
        )
    ),
    *(
        ("metadata", (name, {key: {**each, "token_ids": text} for key, each in fields.items()}))
        for name, (_, fields) in INDEXED.items()
        for text in ("[" * DEEP, "[1e999]", "[" + "9" * 5000 + "]", "[[1],[2,3]]", "[1.5]", "7")
    ),
    ("url", "memory://?bytes=" + "9" * 5000 + "GB"),
    ("url", "redis://[::1"),
    ("url", "redis://host/0?socket_timeout=soon"),
    ("url", "redis://host/0?max_connections=-1"),
    ("url", "rediss://host/0?ssl_cert_reqs=maybe"),
    ("key", ("\ud800@%\x00", "safetensors@%ed%a0%80@1@0@" + "ab" * 32)),
    ("key", ("", "safetensors@%ff@1@0@" + "ab" * 32)),
]


def test_inputs_met_before() -> None:
    for name, met in MET:
        try:
            TARGETS[name].check(met)
        except Exception as error:
            error.add_note(f"{name}: {met!r:.500}")
            raise


@pytest.mark.parametrize("name", CODINGS)
def test_a_sound_blob_is_taken(name: str) -> None:
    """Lest all the others be refused for no reason."""
    blobs = CODINGS[name]
    blobs.feed(blobs.good)
    assert blobs.store.sizes([blobs.key])[0], "it was thrown away"


def test_an_allocation_beyond_the_input_is_noticed() -> None:
    target = TARGETS["key"]
    greedy = type(target)(target.make, lambda given: bytes(1 << 20))
    with pytest.raises(AssertionError, match="allocated"):
        greedy.check(("", "x"))
    assert weight({"ab": ("c", b"de")}) == 5
