"""Sealing: only with a key, only under the same name, and nothing changed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.errors import BlobError, SealedBlobError, SettingError
from chunkcache.kv import seal as module
from chunkcache.kv.seal import OVERHEAD, Seal

ONE, TWO = bytes(range(32)), bytes(range(1, 33))
SEAL = Seal((ONE,))
SEALED = SEAL.seal(b"the quick brown fox", "name")


@given(st.binary(max_size=300), st.text(max_size=40))
def test_round_trip(data: bytes, name: str) -> None:
    sealed = SEAL.seal(data, name)
    assert len(sealed) == len(data) + OVERHEAD
    back = SEAL.open(sealed, name)
    assert bytes(back) == data
    assert not back.readonly


@given(st.text())
def test_text_round_trip(text: str) -> None:
    sealed = SEAL.seal_text(text, "name")
    assert sealed.isascii()
    assert SEAL.open_text(sealed, "name") == text


def test_equal_data_looks_different_each_time() -> None:
    assert bytes(SEAL.seal(b"data", "name")) != bytes(SEAL.seal(b"data", "name"))
    assert b"quick" not in bytes(SEALED)


def test_every_bit_counts() -> None:
    for at in range(len(SEALED)):
        for bit in range(8):
            damaged = bytearray(SEALED)
            damaged[at] ^= 1 << bit
            with pytest.raises(BlobError):
                SEAL.open(memoryview(damaged), "name")


@given(st.binary(max_size=100), st.integers(0, len(SEALED) - 1))
def test_other_bytes_are_refused(data: bytes, length: int) -> None:
    for garbage in (data, bytes(SEALED[:length]), bytes(SEALED) + data + b"x"):
        with pytest.raises(BlobError):
            SEAL.open(memoryview(garbage), "name")


def test_another_name_is_damage_and_another_key_is_not() -> None:
    with pytest.raises(BlobError, match="seal is broken") as broken:
        SEAL.open(SEALED, "other")
    assert not isinstance(broken.value, SealedBlobError)
    with pytest.raises(SealedBlobError):
        Seal((TWO,)).open(SEALED, "name")


def test_keys_can_be_replaced() -> None:
    both = Seal((TWO, ONE))
    assert bytes(both.open(SEALED, "name")) == b"the quick brown fox"
    fresh = both.seal(b"new", "name")
    assert bytes(Seal((TWO,)).open(fresh, "name")) == b"new"
    with pytest.raises(SealedBlobError):
        SEAL.open(fresh, "name")


@pytest.mark.parametrize("text", ["", "not base64!", "AAAA", "ä"])
def test_text_that_was_not_sealed_is_refused(text: str) -> None:
    with pytest.raises(BlobError):
        SEAL.open_text(text, "name")


def test_keys_are_read() -> None:
    assert Seal.parse(f" {ONE.hex()} , {TWO.hex().upper()}") == Seal((ONE, TWO))


@pytest.mark.parametrize("text", ["", "x", ONE.hex()[:-2], ONE.hex() + "00", f"{ONE.hex()},"])
def test_what_is_no_key_is_one_clear_error_that_does_not_show_it(text: str) -> None:
    with pytest.raises(SettingError, match=r"^seal must be .*64 hexadecimal.*token_hex") as error:
        Seal.parse(text)
    assert not text or ONE.hex()[:8] not in str(error.value)


def test_keys_are_not_shown() -> None:
    assert repr(SEAL) == "Seal()"


def test_a_missing_library_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"pip install 'chunkcache\[seal\]'"):
        Seal.parse(ONE.hex())
