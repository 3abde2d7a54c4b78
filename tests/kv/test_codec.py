"""Codecs: what comes back, and that a blob which is anything else than it must be is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.errors import BlobError, SealedBlobError
from chunkcache.keys import BF16, CODECS, INT8, PLAIN, ZSTD
from chunkcache.kv.codec import BlobForm, Codec
from chunkcache.kv.layout import KVLayout, LayerKV, TensorFile, encode
from chunkcache.kv.seal import Seal
from tests.kv.test_layout import DTYPES, HASH, TOKENS, layouts, random_kv, token_ids
from tests.kv.test_quantise import LAYOUT, ROTATION

SEAL = Seal((b"k" * 32,))
KEY = f"format@model@1@0@{HASH}"
MOVERS = {name: ROTATION if name.startswith(INT8) else None for name in CODECS}
ALL = [Codec(name, seal, MOVERS[name]) for name in CODECS for seal in (None, SEAL)]
every_codec = pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.format)


def form_of(codec: Codec, layout: KVLayout = LAYOUT, key: str = KEY) -> BlobForm:
    return codec.form(layout, TOKENS, 40, HASH, key)


def pairs(
    mine: Sequence[LayerKV | None], its: Sequence[LayerKV | None]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    assert [kv is None for kv in mine] == [kv is None for kv in its]
    return [
        parts for a, b in zip(mine, its, strict=True) if a and b for parts in zip(a, b, strict=True)
    ]


@given(
    st.sampled_from([codec for codec in ALL if codec.rotation is None]),
    layouts, token_ids, st.integers(0, 10**5),
)  # fmt: skip
def test_round_trip(codec: Codec, layout: KVLayout, tokens: list[int], start: int) -> None:
    form = codec.form(layout, tokens, start, HASH, KEY)
    layers = random_kv(layout, len(tokens))
    blob = form.encode(layers)
    assert form.may_have(blob.nbytes)
    for back, given_part in pairs(form.decode(blob), layers):
        assert back.dtype == layout.dtype
        if codec.is_exact(layout.dtype):
            assert torch.equal(back, given_part)
        else:
            assert (back - given_part).abs().max() <= 2**-6 * given_part.abs().max()


@every_codec
def test_exact_or_not(codec: Codec) -> None:
    for dtype in DTYPES:
        layout = replace(LAYOUT, dtype=dtype)
        form, layers = form_of(codec, layout), random_kv(layout, 3, seed=5)
        same = all(torch.equal(a, b) for a, b in pairs(form.decode(form.encode(layers)), layers))
        assert same == codec.is_exact(dtype)


def test_the_plain_codec_adds_nothing() -> None:
    form = form_of(Codec())
    blob = form.encode(random_kv(LAYOUT, 3))
    assert blob == encode(TensorFile.of(LAYOUT, TOKENS, 40, HASH), random_kv(LAYOUT, 3))
    assert form.is_direct
    back = form.decode(blob)
    blob[-1] ^= 1  # what is decoded is a view of it
    assert not torch.equal(back[2][1], random_kv(LAYOUT, 3)[2][1])  # type: ignore[index]
    assert form.saved(blob.nbytes) == 0
    assert form.saved(blob.nbytes - 5) == 5


def test_only_blobs_of_the_layers_very_bytes_are_read_in_place() -> None:
    half = replace(LAYOUT, dtype=torch.bfloat16)
    direct = {(c.format, k.dtype) for c in ALL for k in (LAYOUT, half) if form_of(c, k).is_direct}
    assert direct == {
        (PLAIN, torch.float32), (PLAIN, torch.bfloat16), (BF16, torch.bfloat16)
    }  # fmt: skip


# ------------------------------------------------------------------------ worlds


def test_no_two_codecs_share_a_key_or_a_hash() -> None:
    assert len({codec.format for codec in ALL}) == len(ALL)
    worlds = {codec.world for codec in ALL} | {Codec(INT8).world}
    assert len(worlds) == len(ALL) + 1
    assert Codec().world == ""
    assert (
        Codec(PLAIN, SEAL).world == Codec(PLAIN, Seal((b"l" * 32,))).world
    )  # keys may be replaced


@pytest.mark.parametrize("what", ["first", "interleaved", "sign", "inv_freq"])
def test_another_rule_for_turning_is_another_world(what: str) -> None:
    rule = ROTATION.layers[0]
    assert rule is not None
    assert rule.keys is not None
    value = getattr(rule.keys, what)
    other = value + 1e-6 if what == "inv_freq" else -value if what == "sign" else 1 - value
    changed = replace(ROTATION, layers=(replace(rule, keys=replace(rule.keys, **{what: other})),))
    same = replace(ROTATION, layers=ROTATION.layers[:1])
    assert Codec(INT8, rotation=changed).world != Codec(INT8, rotation=same).world


# ------------------------------------------------------------------------ damage


@every_codec
def test_damage_anywhere_is_refused(codec: Codec) -> None:
    form, layers = form_of(codec), random_kv(LAYOUT, 3)
    sound = form.encode(layers)
    given_back = form.decode(sound)
    dice = random.Random(0)
    refused = 0
    for at in range(len(sound)):
        damaged = memoryview(bytearray(sound))
        damaged[at] ^= 1 << dice.randrange(8)
        try:
            back = form.decode(damaged)
        except BlobError:
            refused += 1
        else:  # some bits of a zstd frame say nothing
            assert all(torch.equal(a, b) for a, b in pairs(back, given_back))
    assert refused >= len(sound) - (3 if codec.name.endswith(ZSTD) else 0)


@every_codec
@given(length=st.integers(0, 10**6), more=st.binary(min_size=1, max_size=40))
def test_truncated_or_extended(codec: Codec, length: int, more: bytes) -> None:
    form = form_of(codec)
    sound = form.encode(random_kv(LAYOUT, 3))
    for bad in (bytes(sound[: length % len(sound)]), bytes(sound) + more):
        with pytest.raises(BlobError):
            form.decode(memoryview(bad))


@every_codec
def test_the_blob_of_another_chunk_is_refused(codec: Codec) -> None:
    theirs = codec.form(LAYOUT, TOKENS, 41, HASH, KEY)
    blob = theirs.encode(random_kv(LAYOUT, 3))
    theirs.decode(blob)
    with pytest.raises(BlobError):
        form_of(codec).decode(blob)


def test_the_blob_of_another_codec_is_refused() -> None:
    for mine in ALL:
        for its in ALL:
            if mine is not its:
                blob = form_of(its).encode(random_kv(LAYOUT, 3))
                with pytest.raises(BlobError):
                    form_of(mine).decode(blob)


def test_keys_turned_by_the_writer_alone_are_refused() -> None:
    turned, not_turned = Codec(INT8, rotation=ROTATION), Codec(INT8)
    for mine, its in ((turned, not_turned), (not_turned, turned)):
        with pytest.raises(BlobError):
            form_of(mine).decode(form_of(its).encode(random_kv(LAYOUT, 3)))


@every_codec
def test_no_other_length_is_possible(codec: Codec) -> None:
    form = form_of(codec)
    size = form.encode(random_kv(LAYOUT, 3)).nbytes
    assert form.may_have(size)
    assert not form.may_have(0)
    assert not form.may_have(2 * form.file.size)
    assert form.may_have(size - 1) == codec.name.endswith(ZSTD)


# ------------------------------------------------------------------------ seals


def test_sealed_blobs_cannot_be_swapped() -> None:
    """Not even where their content would pass."""
    codec = Codec(seal=SEAL)
    blob = form_of(codec, key="one").encode(random_kv(LAYOUT, 3))
    with pytest.raises(BlobError, match="seal is broken"):
        form_of(codec, key="two").decode(blob)


def test_a_key_of_others_is_told_from_damage() -> None:
    blob = form_of(Codec(seal=SEAL)).encode(random_kv(LAYOUT, 3))
    with pytest.raises(SealedBlobError):
        form_of(Codec(seal=Seal((b"l" * 32,)))).decode(blob)


def test_a_sealed_text_is_no_blob_and_the_other_way_round() -> None:
    codec = Codec(seal=SEAL)
    assert codec.reveal(codec.hide("[1,2]", KEY), KEY) == "[1,2]"
    for sealed, key in ((codec.hide("[1,2]", KEY), "other"), (SEAL.seal_text("[1,2]", KEY), KEY)):
        with pytest.raises(BlobError):
            codec.reveal(sealed, key)
    assert Codec().reveal(Codec().hide("[1,2]", KEY), KEY) == "[1,2]"


def test_nothing_shows_keys() -> None:
    assert "kkkk" not in repr(form_of(Codec(seal=SEAL)))
