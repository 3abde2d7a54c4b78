"""`chunkcache bench`, with a tiny model and a real server."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from chunkcache.cli import app as cli
from chunkcache.inventory import catalog
from chunkcache.stores import open_store
from tests.models import tiny
from tests.words import word_tokenizer

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny model and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tiny(max_position_embeddings=2048).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return str(path)


def bench(*arguments: str):
    return runner.invoke(cli.app, ["bench", "--repeats", "1", "--max-new-tokens", "4", *arguments])


def test_each_arm_at_each_length(folder, redis_server):
    url = redis_server.unix_url
    result = bench(
        "--model", folder, "--store", url, "--tokens", "256", "--tokens", "512", "--json"
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["same"]
    names = ["no cache", "cold", "warm, another question", "warm, same prompt"]
    assert [(arm["tokens"], arm["name"]) for arm in told["arms"]] == [
        (tokens, name) for tokens in (256, 512) for name in names
    ]
    plain, cold, other, same = told["arms"][4:]
    assert plain["reused"] == cold["reused"] == 0
    assert 0 < other["reused"] <= same["reused"] < same["prompt_tokens"]
    assert all(arm["decode_ms"] > 0 for arm in told["arms"])
    assert plain["speed_up"] == 1
    with open_store(url) as store:
        assert not list(catalog.entries(store))


def test_the_table(folder, redis_server):
    result = bench("--model", folder, "--store", redis_server.unix_url, "--tokens", "256")
    assert result.exit_code == 0, result.output
    assert "no cache" in result.stdout
    assert "DIFFERENT" not in result.stdout


def test_a_prompt_too_long_for_the_model(folder, redis_server):
    result = bench("--model", folder, "--store", redis_server.unix_url, "--tokens", "4000")
    assert result.exit_code == 2
    assert "--tokens 4000" in result.stderr


def test_a_store_of_this_process_alone(folder):
    result = bench("--model", folder, "--store", "memory://")
    assert result.exit_code == 2
    assert "lives in one process" in result.stderr
