"""Names of files, and how they are found again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chunkcache.stores.folder import key_of, stem_of


@given(st.text(max_size=400))
def test_any_key_has_a_legal_and_reversible_name(key: str) -> None:
    folder, name = stem_of(key).split("/")
    assert len(folder) == 2
    assert len(f"{name}.safetensors".encode()) <= 255
    assert set(name) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%._=+-~"
    )
    assert key_of(name) in (key, None)
    assert (key_of(name) is None) == (len(name) == 64 and "-" not in name)


@given(st.text(max_size=60), st.text(max_size=60))
def test_two_keys_never_share_a_file_even_where_case_is_ignored(one: str, two: str) -> None:
    assert (stem_of(one).lower() == stem_of(two).lower()) == (one == two)
    assert stem_of("Org@x").lower() != stem_of("org@x").lower()
