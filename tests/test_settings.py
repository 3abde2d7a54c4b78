from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from chunkcache import settings as module
from chunkcache.errors import ChunkCacheError, SettingError
from chunkcache.settings import Settings
from chunkcache.stores import open_store

NAMES = [field.name for field in dataclasses.fields(Settings)]

KEY = "0123456789abcdef" * 4

# One value other than the default for each setting, as Python and as text.
OTHER: dict[str, tuple[Any, str]] = {
    "reuse": ("off", "off"),
    "chunk_size": (64, "64"),
    "chunk_overlap": (16, "16"),
    "repair": ("head:8+query:0.1", "head:8+query:0.1"),
    "variants": ("prepared", "prepared"),
    "audit_rate": (0.5, "0.5"),
    "audit_bound": (0.1, "0.1"),
    "audit_in": ("call", "call"),
    "reproducible": (True, "yes"),
    "piece_tokens": (64, "64"),
    "state_every": (1024, "1024"),
    "store_tail": (False, "no"),
    "namespace": ("team-a", "team-a"),
    "tags": ("run=1", "run=1"),
    "metadata": ({"temperature": "0.7", "run": "a=b"}, " temperature=0.7, run = a=b,"),
    "write": (False, "off"),
    "codec": ("safetensors-int8", "safetensors-int8"),
    "secret": ("correct horse battery", "correct horse battery"),
    "seal": (f"{KEY},{KEY[::-1]}", f"{KEY},{KEY[::-1]}"),
    "on_error": ("raise", "raise"),
    "hooks": ("observers", "observers"),
    "connect_timeout": (1.5, "1.5"),
    "read_timeout": (9.0, "9"),
    "max_delay": (2.5, "2.5"),
    "min_gain": (1.5, "1.5"),
    "write_queue_bytes": (4096, "4096"),
    "ttl": (3600.0, "3600"),
    "refresh_ttl": (False, "no"),
    "pin": (True, "yes"),
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("CHUNKCACHE_"):
            monkeypatch.delenv(name)


def test_every_setting_is_tested_here() -> None:
    assert set(OTHER) == set(NAMES)
    for name, (value, _) in OTHER.items():
        assert value != getattr(Settings(), name)


def toml(value: object) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name} = {toml(each)}' for name, each in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.mark.parametrize("name", NAMES)
def test_from_everywhere_in_order(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    value, text = OTHER[name]
    default = getattr(Settings(), name)
    assert getattr(Settings.load(), name) == default
    assert getattr(Settings.load(**{name: value}), name) == value

    file = tmp_path / "settings.toml"
    file.write_text(f"{name} = {toml(value)}\n")
    monkeypatch.setenv("CHUNKCACHE_CONFIG", str(file))
    assert getattr(Settings.load(), name) == value

    # The environment wins over the file, a keyword over both.
    file.write_text(f"{name} = {toml(default)}\n")
    monkeypatch.setenv(f"CHUNKCACHE_{name.upper()}", text)
    assert getattr(Settings.load(), name) == value
    assert getattr(Settings.load(**{name: default}), name) == default


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reuse", "everywhere"),
        ("repair", "tail:3"),
        ("repair", "head"),
        ("repair", "random:2"),
        ("repair", 4),
        ("reuse", ""),
        ("reuse", None),
        ("reuse", ["prefix"]),
        ("on_error", "ignore"),
        ("codec", "int8"),
        ("codec", "safetensors+zstd+zstd"),
        ("codec", None),
        ("secret", None),
        ("secret", "short"),
        ("secret", "half a \ud800 character"),
        ("seal", b"0" * 64),
        ("seal", KEY[:-1]),
        ("seal", f"{KEY},"),
        ("seal", KEY[:-1] + "g"),
        ("chunk_size", 0),
        ("chunk_size", -1),
        ("chunk_size", 1.5),
        ("chunk_size", "128"),
        ("chunk_size", True),
        ("chunk_size", None),
        ("chunk_overlap", -1),
        ("chunk_overlap", 128),
        ("chunk_overlap", 1000),
        ("chunk_overlap", False),
        ("write_queue_bytes", -1),
        ("write_queue_bytes", 1e9),
        ("connect_timeout", 0),
        ("connect_timeout", -0.1),
        ("connect_timeout", None),
        ("connect_timeout", "1"),
        ("connect_timeout", True),
        ("connect_timeout", float("nan")),
        ("connect_timeout", float("inf")),
        ("read_timeout", 0),
        ("read_timeout", float("nan")),
        ("read_timeout", float("inf")),
        ("max_delay", 0),
        ("min_gain", -1),
        ("min_gain", float("nan")),
        ("min_gain", True),
        ("max_delay", float("inf")),
        ("ttl", -1),
        ("ttl", "3600"),
        ("ttl", None),
        ("ttl", True),
        ("ttl", float("nan")),
        ("ttl", float("inf")),
        ("refresh_ttl", 1),
        ("pin", "yes"),
        ("namespace", None),
        ("namespace", b"bytes"),
        ("namespace", "half a \ud800 character"),
        ("tags", {"a": 1}),
        ("tags", "half a \ud800 character"),
        ("store_tail", 1),
        ("store_tail", "yes"),
        ("store_tail", None),
    ],
)
def test_a_wrong_value_is_named(name: str, value: object) -> None:
    with pytest.raises(SettingError, match=name):
        Settings.load(**{name: value})


def test_a_store_gets_its_settings() -> None:
    given = Settings(ttl=7.0, refresh_ttl=False, read_timeout=9.0, chunk_size=64).of_store
    assert given["ttl"] == 7.0
    with open_store("memory://", **given) as store:
        assert store.sizes(["a"]) == [0]


def test_an_unknown_setting_is_named_and_the_known_ones_are_listed() -> None:
    with pytest.raises(SettingError, match=r"'chunksize'.*chunk_size"):
        Settings.load(chunksize=128)


def test_a_size_that_fits_the_overlap_only_together() -> None:
    assert Settings.load(chunk_size=4, chunk_overlap=3).chunk_overlap == 3
    with pytest.raises(SettingError, match=r"chunk_overlap=4.*chunk_size=4"):
        Settings.load(chunk_size=4, chunk_overlap=4)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chunk_size", "many"),
        ("chunk_size", ""),
        ("chunk_size", "1.5"),
        ("chunk_size", "0"),
        ("store_tail", "maybe"),
        ("store_tail", ""),
        ("read_timeout", "soon"),
        ("read_timeout", "nan"),
        ("read_timeout", "inf"),
        ("reuse", "sometimes"),
    ],
)
def test_a_wrong_variable_is_named(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"CHUNKCACHE_{name.upper()}", text)
    with pytest.raises(SettingError, match=f"(?i){name}"):
        Settings.load()


@pytest.mark.parametrize("text", ["1", "true", "YES", "On"])
def test_ways_to_say_yes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKCACHE_STORE_TAIL", text)
    assert Settings.load().store_tail is True


@pytest.mark.parametrize("text", ["0", "false", "NO", "Off"])
def test_ways_to_say_no(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKCACHE_STORE_TAIL", text)
    assert Settings.load().store_tail is False


@pytest.mark.parametrize("content", [b"chunk_size = ", b"\xff\xfe", b"[]", None])
def test_a_file_that_cannot_be_read_is_named(
    content: bytes | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("CHUNKCACHE_CONFIG", str(file))
    with pytest.raises(SettingError, match=r"CHUNKCACHE_CONFIG.*settings\.toml"):
        Settings.load()


def test_a_file_in_utf_8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_bytes('namespace = "équipe"'.encode())
    monkeypatch.setenv("CHUNKCACHE_CONFIG", str(file))
    assert Settings.load().namespace == "équipe"


@pytest.mark.parametrize(
    ("content", "named"),
    [("chunk_sise = 3", "chunk_sise"), ('chunk_size = "3"', "chunk_size"), ("[a]\nb = 1", "'a'")],
)
def test_a_wrong_setting_in_a_file_is_named(
    content: str, named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(content)
    monkeypatch.setenv("CHUNKCACHE_CONFIG", str(file))
    with pytest.raises(SettingError, match=named):
        Settings.load()


def test_settings_cannot_be_changed_behind_the_checks() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().chunk_size = 0  # type: ignore[misc]


def test_a_setting_error_is_a_value_error_of_ours() -> None:
    assert issubclass(SettingError, ValueError)
    assert issubclass(SettingError, ChunkCacheError)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("temperature=0.7", "must be a mapping"),
        ({"temperature": 0.7}, r"metadata\['temperature'\]=0.7 must be a string"),
        ({"a": "\udcff"}, "UTF-8"),
        ({"tokens": "3"}, "'tokens' is a field that chunks have already"),
        ({"age": "3"}, "choose another name"),
        ({"": "3"}, "the name ''"),
        ({"two words": "3"}, "the name 'two words'"),
        ({"1st": "3"}, "not begin with a digit"),
        ({3: "3"}, "the name 3"),
    ],
)
def test_metadata_that_cannot_work(given: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Settings(metadata=given)


def test_metadata_is_not_changed_from_outside() -> None:
    given = {"temperature": "0.7"}
    settings = Settings(metadata=given)
    given["tokens"] = "3"
    assert settings.metadata == {"temperature": "0.7"}
    assert hash(settings) == hash(Settings(metadata={}))  # settings can be keys of a dict


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("CHUNK_SIZE", "a whole number"), ("MIN_GAIN", "a number"), ("WRITE", "yes or no")],
)
def test_numbers_and_switches_in_the_environment(
    name: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"CHUNKCACHE_{name}", "maybe")
    with pytest.raises(SettingError, match=f"CHUNKCACHE_{name}='maybe' must be {wanted}"):
        Settings.load()


def test_a_variable_that_is_nearly_a_setting_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URL", "CONFIG_DIR", "DEBUG", "CACHE_DIR", "CHUNK_SIZE"):
        monkeypatch.setenv(f"CHUNKCACHE_{name}", "64")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Settings.load()
    monkeypatch.setenv("CHUNKCACHE_CHUNKSIZE", "64")
    with pytest.warns(UserWarning, match="CHUNKCACHE_CHUNKSIZE; did you mean CHUNKCACHE_CHUNK_S"):
        Settings.load()


def test_metadata_in_the_environment_is_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKCACHE_METADATA", "temperature")
    with pytest.raises(SettingError, match="CHUNKCACHE_METADATA='temperature' must be name=value"):
        Settings.load()


def test_a_missing_library_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"zstd.*pip install 'chunkcache\[zstd\]'"):
        Settings(codec="safetensors+zstd")
