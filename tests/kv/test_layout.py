from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from chunkcache.errors import BlobError
from chunkcache.kv.layout import BufferPool, KVLayout, LayerKV, LayerShape, TensorFile, encode

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
HASH = "ab" * 32
LAYOUT = KVLayout(torch.float32, (LayerShape(2, 4, 2, 4), None, LayerShape(1, 6, 1, 2)))
TOKENS = [7, 100_000, 0]


def random_kv(layout: KVLayout, tokens: int, seed: int = 0) -> list[LayerKV | None]:
    source = torch.Generator().manual_seed(seed)

    def tensor(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(heads, tokens, dim, generator=source).to(layout.dtype)

    return [
        shape
        and (tensor(shape.key_heads, shape.key_dim), tensor(shape.value_heads, shape.value_dim))
        for shape in layout.layers
    ]


def check(form: TensorFile, blob: bytes | memoryview) -> None:
    """Check a blob as a reader does: its header, then its data in pieces of any size."""
    view = memoryview(bytes(blob))
    cut = len(form.header)
    middle = cut + (len(view) - cut) // 3
    form.check(view[:cut], [view[cut:middle], view[middle:]])


shapes = st.builds(LayerShape, *(st.integers(1, size) for size in (3, 9, 3, 9)))
layouts = st.builds(
    KVLayout,
    st.sampled_from(DTYPES),
    st.lists(st.none() | shapes, min_size=1, max_size=5).map(tuple).filter(any),
)
token_ids = st.lists(st.integers(0, 2**40), min_size=1, max_size=20)


@given(layouts, token_ids, st.integers(0, 10**6))
def test_round_trip(layout: KVLayout, tokens: list[int], start: int) -> None:
    form = TensorFile.of(layout, tokens, start, HASH)
    layers = random_kv(layout, len(tokens))
    blob = encode(form, layers)
    assert blob.nbytes == form.size
    check(form, blob)
    for back, given_kv in zip(form.views(form.data(blob)), layers, strict=True):
        assert (back is None) == (given_kv is None)
        if back and given_kv:
            for a, b in zip(back, given_kv, strict=True):
                assert a.dtype == layout.dtype
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_reads_a_blob(dtype: torch.dtype, tmp_path: Path) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    layers = random_kv(layout, len(TOKENS))
    path = tmp_path / "chunk.safetensors"
    path.write_bytes(encode(TensorFile.of(layout, TOKENS, 40, HASH), layers))
    with safe_open(path, "pt") as file:
        names = {f"layers.{i}.{part}" for i in (0, 2) for part in ("keys", "values")}
        assert set(file.keys()) == names
        for i in (0, 2):
            kv = layers[i]
            assert kv is not None
            for part, tensor in zip(("keys", "values"), kv, strict=True):
                read = file.get_tensor(f"layers.{i}.{part}")
                assert read.dtype == dtype
                assert torch.equal(read, tensor)
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["chunk_hash"] == HASH
    assert metadata["tokens"] == "[7,100000,0]"
    assert metadata["positions"] == "40-43"
    assert metadata["layout"] == "[kv_heads, tokens, head_dim]"
    assert metadata["checksum"].startswith("xxh3_128:")


def test_views_of_other_memory_and_tensors_with_gaps_are_encoded_right() -> None:
    form = TensorFile.of(LAYOUT, TOKENS, 0, HASH)
    layers = random_kv(LAYOUT, 3)
    gaps = [
        kv and tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in kv) for kv in layers
    ]
    assert encode(form, gaps) == encode(form, layers)  # type: ignore[arg-type]


def test_tensors_that_require_grad_are_encoded() -> None:
    form = TensorFile.of(LAYOUT, TOKENS, 0, HASH)
    layers = random_kv(LAYOUT, 3)
    plain = encode(form, layers)
    for kv in layers:
        for tensor in kv or ():
            tensor.requires_grad_()
    assert encode(form, layers) == plain


def test_a_missing_layer_is_not_filled_in() -> None:
    form = TensorFile.of(LAYOUT, TOKENS, 0, HASH)
    with pytest.raises(ValueError, match="shorter"):
        encode(form, random_kv(LAYOUT, 3)[:2])


# ------------------------------------------------------------------------ damage

FORM = TensorFile.of(LAYOUT, TOKENS, 40, HASH)
BLOB = bytes(encode(FORM, random_kv(LAYOUT, 3)))


def test_the_sound_blob_passes() -> None:
    check(FORM, BLOB)


def test_every_byte_of_the_header_and_every_bit_of_the_data_counts() -> None:
    dice = random.Random(0)
    places = [(at, dice.randrange(8)) for at in range(len(FORM.header))]
    places += [(at, bit) for at in range(len(FORM.header), len(BLOB)) for bit in range(8)]
    for at, bit in places:
        damaged = bytearray(BLOB)
        damaged[at] ^= 1 << bit
        with pytest.raises(BlobError):
            check(FORM, bytes(damaged))


@given(st.integers(0, len(BLOB) - 1), st.binary(min_size=1, max_size=40))
def test_truncated_or_extended(length: int, more: bytes) -> None:
    with pytest.raises(BlobError):
        check(FORM, BLOB[:length])
    with pytest.raises(BlobError):
        check(FORM, BLOB + more)


@pytest.mark.parametrize(
    "other",
    [
        TensorFile.of(LAYOUT, TOKENS, 41, HASH),
        TensorFile.of(LAYOUT, [7, 100_001, 0], 40, HASH),
        TensorFile.of(LAYOUT, [7, 0, 100_000], 40, HASH),
        TensorFile.of(LAYOUT, TOKENS, 40, "cd" * 32),
        TensorFile.of(replace(LAYOUT, layers=LAYOUT.layers[::-1]), TOKENS, 40, HASH),
        TensorFile.of(
            replace(LAYOUT, layers=(LayerShape(1, 8, 1, 8), *LAYOUT.layers[1:])), TOKENS, 40, HASH
        ),
    ],
    ids=["position", "token", "token order", "chunk", "layers", "heads"],
)
def test_the_blob_of_another_chunk_is_refused(other: TensorFile) -> None:
    theirs = encode(other, random_kv(other.layout, 3))
    check(other, theirs)
    with pytest.raises(BlobError, match="not of this chunk"):
        check(FORM, theirs)


def test_bits_of_another_data_type_are_refused() -> None:
    half = replace(LAYOUT, dtype=torch.float16)
    form = TensorFile.of(half, TOKENS, 40, HASH)
    brain = TensorFile.of(replace(LAYOUT, dtype=torch.bfloat16), TOKENS, 40, HASH)
    with pytest.raises(BlobError, match="not of this chunk"):
        check(brain, encode(form, random_kv(half, 3)))


def test_the_message_tells_damage_from_a_wrong_chunk() -> None:
    damaged = bytearray(BLOB)
    damaged[-1] ^= 1
    with pytest.raises(BlobError, match="damaged"):
        check(FORM, bytes(damaged))


# ------------------------------------------------------------------------ layout


@given(layouts, st.integers(1, 9))
def test_layout_counts_bytes(layout: KVLayout, tokens: int) -> None:
    slots = layout.slots(tokens)
    assert slots[0].begin == 0
    assert [slot.begin for slot in slots[1:]] == [slot.end for slot in slots[:-1]]
    assert slots[-1].end == tokens * layout.token_bytes


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_comes_back_when_its_last_user_is_gone() -> None:
    memory = BufferPool()
    array = memory.take(1000)
    home = address(array)
    tensor = torch.from_numpy(array)[10:20]
    view = array.data[5:]
    del array
    assert address(memory.take(1000)) != home, "a tensor and a view still see it"
    del tensor
    assert address(memory.take(1000)) != home, "a view still sees it"
    del view
    assert address(memory.take(900)) == home


def test_only_memory_of_about_that_size_is_used_again() -> None:
    memory = BufferPool()
    for first, then, again in ((1000, 1001, False), (1000, 499, False), (1000, 500, True)):
        home = address(memory.take(first))
        array = memory.take(then)
        assert array.nbytes == then
        assert (address(array) == home) == again
        del array


def test_so_many_pieces_are_kept_and_no_large_ones() -> None:
    memory = BufferPool(pieces=2, most_bytes=2000)
    arrays = [memory.take(1000) for _ in range(3)]
    homes = [address(array) for array in arrays]
    arrays.clear()
    assert len(memory._spare) == 2
    again = [memory.take(1000) for _ in range(2)]
    assert {address(array) for array in again} <= set(homes)
    del again
    memory.take(2001)
    assert {len(piece) for piece in memory._spare} == {1000}
    BufferPool(pieces=0).take(1000)


def test_no_two_users_have_the_same_memory() -> None:
    memory = BufferPool(pieces=4)
    clashes: list[int] = []

    def work(number: int) -> None:
        for _ in range(300):
            array = memory.take(64)
            array[:] = number
            clashes.extend(array[array != number].tolist())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
