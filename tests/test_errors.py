from __future__ import annotations

import pytest

from chunkcache import errors


@pytest.mark.parametrize(
    ("error", "also"),
    [
        (errors.SettingError, ValueError),
        (errors.UnsupportedModelError, TypeError),
        (errors.UnsupportedCallError, ValueError),
        (errors.StoreError, Exception),
        (errors.BlobError, Exception),
    ],
)
def test_all_errors_are_caught_by_their_base_and_by_the_builtin_they_are(
    error: type[Exception], also: type[Exception]
) -> None:
    for kind in (errors.ChunkCacheError, also):
        with pytest.raises(kind, match="the reason"):
            raise error("the reason")


def test_every_error_derives_from_the_base() -> None:
    for value in vars(errors).values():
        if isinstance(value, type) and value.__module__ == errors.__name__:
            assert issubclass(value, errors.ChunkCacheError)
