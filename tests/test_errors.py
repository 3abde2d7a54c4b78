"""The errors: their classes, and that each message names what is at fault and its remedy."""

from __future__ import annotations

from dataclasses import fields

import pytest
import typer
from typer.testing import CliRunner

from chunkcache import Settings, errors, open_store
from chunkcache.cli import app as cli


@pytest.mark.parametrize(
    ("error", "also"),
    [
        (errors.SettingError, ValueError),
        (errors.UnsupportedModelError, TypeError),
        (errors.UnsupportedCallError, ValueError),
        (errors.PickleError, TypeError),
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


# What a setting may be wrong by, what the message must name, and words of the remedy.
SETTINGS = [
    ({"reuse": "sometimes"}, "reuse", 'use "prefix" or "anywhere" or "off"'),
    ({"repair": "glue:4"}, "repair", "head:k"),
    ({"repair": 4}, "repair", "must be a name or a Repair"),
    ({"chunk_size": 0}, "chunk_size", "whole number of at least 1"),
    ({"chunk_overlap": -1}, "chunk_overlap", "whole number of at least 0"),
    ({"chunk_overlap": 128}, "chunk_overlap", "must be smaller than chunk_size=128"),
    ({"store_tail": "yes"}, "store_tail", "must be True or False"),
    ({"namespace": 7}, "namespace", "must be a string"),
    ({"namespace": "\ud800"}, "namespace", "text that UTF-8 can express"),
    ({"codec": "zip"}, "codec", '"safetensors-int8"'),
    ({"secret": "short"}, "secret", "at least 16 random ones"),
    ({"secret": 7}, "secret", "must be a string"),
    ({"seal": "xyz"}, "seal", "hexadecimal"),
    ({"tags": 7}, "tags", "must be a string"),
    ({"metadata": "x"}, "metadata", "must be a mapping, as"),
    ({"metadata": {"1": "x"}}, "metadata", "not begin with a digit"),
    ({"metadata": {"model": "x"}}, "metadata", "choose another name"),
    ({"metadata": {"x": 7}}, "metadata", "must be a string"),
    ({"write": 1}, "write", "must be True or False"),
    ({"hooks": "seen"}, "hooks", '"fallback" or "observers"'),
    ({"on_error": "ignore"}, "on_error", 'use "compute" or "raise"'),
    ({"connect_timeout": 0}, "connect_timeout", "positive number of seconds"),
    ({"read_timeout": -1}, "read_timeout", "positive number of seconds"),
    ({"max_delay": float("nan")}, "max_delay", "positive number of seconds"),
    ({"write_queue_bytes": 0.5}, "write_queue_bytes", "whole number of at least 0"),
    ({"ttl": -1}, "ttl", "or 0 for no end"),
    ({"refresh_ttl": "no"}, "refresh_ttl", "must be True or False"),
    ({"min_gain": -1}, "min_gain", "or 0 to read always"),
    ({"pin": None}, "pin", "must be True or False"),
    ({"variants": "x"}, "variants", 'use "any" or "prepared"'),
    ({"audit_rate": 2}, "audit_rate", "from 0 to 1"),
    ({"audit_bound": -1}, "audit_bound", "or 0 for none"),
    ({"audit_in": "x"}, "audit_in", 'use "background" or "call"'),
    ({"reproducible": 1}, "reproducible", "must be True or False"),
    ({"piece_tokens": 1}, "piece_tokens", "Set it to 2 or more"),
    ({"state_every": -1}, "state_every", "of at least 0"),
    ({"chunksize": 7}, "chunksize", "the settings are reuse, repair, variants"),
]
URLS = [
    ("localhost:6379", "scheme", "for instance redis://localhost:6379/0"),
    ("nope://x", "nope", "known are redis://"),
    ("redis://host:port/0", "store's URL", "redis://user:password@host:6379/0"),
    ("redis://host/0?protocol=3", "protocol", "known are client_name"),
    ("redis+sentinel://host", "store URL", "redis+sentinel://host:26379/mymaster/0"),
    ("redis+cluster://host/1", "store URL", "write no path"),
    ("memory://x", "memory://", "write memory://?bytes=2GB"),
    ("memory://?bytes=many", "'many'", "such as 2GB"),
    ("memory://?byte=2GB", "'byte'", "known are bytes"),
    ("file://", "file://", "write file:///path?bytes=50GB"),
    ("file://folder", "file://", "with three slashes"),
    ("file:///dev/null", "/dev/null", "name another with file:///path"),
    ([], "store", "one URL per tier"),
    (5, "store", "must be a URL"),
]
COMMANDS = [
    (["ls", "nonsense"], "'nonsense'", "write name=value, age>7d or age<1h"),
    (["ls", "'open"], "filter", "write name=value"),
    (["purge"], "purge needs terms", "such as namespace=team-a"),
    (["stats", "--store", "redis://localhost:1/0"], "localhost:1", "check that the server runs"),
    (["explain", "nowhere.txt", "--model", "x"], "nowhere.txt", "Name a UTF-8 text file"),
    (["explain", "/dev/null", "--model", "x"], "/dev/null", "put the prompt's text into it"),
    (["explain", __file__, "--model", "/dev"], "--model", "Name a model's folder, a hub id"),
    (["warm", "--model", "x"], "warm", "name what to compute"),
    (["warm", "nowhere.txt", "--model", "x"], "nowhere.txt", "Name a text file"),
    (["doctor", "--store", "nope://"], "nope", "known are redis://"),
    (
        ["copy", "memory://?bytes=1GB", "file:///nowhere/x"],
        "no chunk",
        "check its URL and the terms",
    ),
    (["copy", "memory://", "memory://"], "SRC and DST", "name two"),
    (["bench"], "--model", "use --preset demo"),
    (["show", ""], "show needs a key", "ls lists them"),
]


def test_each_setting_is_in_the_list() -> None:
    named = {name for given, *_ in SETTINGS for name in given}
    assert {field.name for field in fields(Settings)} <= named


def test_each_command_is_in_the_list() -> None:
    never = {"sweep"}  # no argument of theirs can be wrong but --store
    assert set(typer.main.get_command(cli.app).commands) - never == {row[0][0] for row in COMMANDS}


@pytest.mark.parametrize(("given", "named", "remedy"), SETTINGS)
def test_settings(given: dict[str, object], named: str, remedy: str) -> None:
    with pytest.raises(errors.SettingError) as raised:
        Settings.load(**given)
    assert named in str(raised.value)
    assert remedy in str(raised.value)


@pytest.mark.parametrize(("url", "named", "remedy"), URLS)
def test_urls(url: str | list[str], named: str, remedy: str) -> None:
    with pytest.raises(errors.SettingError) as raised, open_store(url) as store:
        store.sizes(["x"])
    assert named in str(raised.value)
    assert remedy in str(raised.value)


@pytest.mark.parametrize(("command", "named", "remedy"), COMMANDS)
def test_commands(command: list[str], named: str, remedy: str) -> None:
    result = CliRunner().invoke(cli.app, command, env={"CHUNKCACHE_URL": "memory://"})
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert named in result.stderr
    assert remedy in result.stderr
