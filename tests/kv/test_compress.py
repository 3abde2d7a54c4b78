"""zstd: what was compressed comes back, what is anything else is refused before memory is taken."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.errors import BlobError
from chunkcache.kv.compress import compress, decompress, most_bytes


@given(st.binary(max_size=40), st.binary(max_size=400), st.sampled_from([1, 2, 4, 8]))
def test_round_trip(head: bytes, data: bytes, width: int) -> None:
    blob = head + data[: len(data) // width * width]
    packed = compress(memoryview(blob), len(head), width)
    assert packed.nbytes <= most_bytes(len(blob))
    back = decompress(packed, len(blob), len(head), width)
    assert bytes(back) == blob
    assert not back.readonly


@pytest.mark.parametrize("size", [0, 1, 1000, 1 << 17, 3 << 20])
def test_what_cannot_be_compressed_has_a_bound(size: int) -> None:
    noise = np.random.default_rng(0).bytes(size)
    assert compress(memoryview(noise), 0, 1).nbytes <= most_bytes(size)


def test_sorting_by_significance_pays() -> None:
    numbers = np.random.default_rng(0).normal(size=1 << 18).astype(np.float32)
    view = memoryview(numbers.tobytes())
    sorted_, plain = (compress(view, 0, width).nbytes for width in (4, 1))
    assert sorted_ < 0.93 * plain


BLOB = bytes(range(200)) * 4
PACKED = bytes(compress(memoryview(BLOB), 8, 4))


@given(st.integers(0, len(PACKED) - 1), st.integers(1, 255))
def test_damage_is_refused_or_changes_nothing_but_bytes(at: int, flip: int) -> None:
    damaged = bytearray(PACKED)
    damaged[at] ^= flip
    try:
        back = decompress(memoryview(bytes(damaged)), len(BLOB), 8, 4)
    except BlobError:
        return
    assert len(back) == len(BLOB)  # the checksum inside tells the rest


@pytest.mark.parametrize(
    "packed",
    [b"", b"zstd", PACKED[:-1], PACKED + b"x", PACKED + PACKED, BLOB,
     b"\x50\x2a\x4d\x18" + len(BLOB).to_bytes(4, "little") + BLOB],
    ids=["empty", "text", "short", "long", "twice", "plain", "skippable"],
)  # fmt: skip
def test_other_bytes_are_refused(packed: bytes) -> None:
    with pytest.raises(BlobError, match="damaged"):
        decompress(memoryview(packed), len(BLOB), 8, 4)


def test_a_bomb_is_refused_before_memory_is_taken() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26))
    small = bytearray(zstandard.ZstdCompressor().compress(bytes(1 << 16)))
    assert zstandard.frame_content_size(bytes(small)) == 1 << 16
    tracemalloc.start()
    for packed in (bomb, silent):
        with pytest.raises(BlobError):
            decompress(memoryview(packed), 1 << 10, 0, 1)
    # One that claims the size wanted and holds more.
    small[5:7] = (0).to_bytes(2, "little")
    assert zstandard.frame_content_size(bytes(small)) == 256
    with pytest.raises(BlobError):
        decompress(memoryview(bytes(small)), 256, 0, 1)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
