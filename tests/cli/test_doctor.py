"""`chunkcache doctor`, with a tiny model and a real server."""

from __future__ import annotations

import json
import os
import time

import pytest
from servers import Server, redis_binary
from typer.testing import CliRunner

from chunkcache import RedisChunkCache, catalog, open_store
from chunkcache.cli import app as cli
from tests.models import tiny, tokens
from tests.words import word_tokenizer

runner = CliRunner()


def run(*arguments: str, code: int = 0) -> str:
    result = runner.invoke(cli.app, ["doctor", *arguments])
    assert result.exit_code == code, result.output
    return result.stderr if code == 2 else result.stdout


def test_a_server_that_should_be_set_up(redis_server):
    said = run("--store", redis_server.unix_url, code=1)
    assert "Redis" in said
    assert "CONFIG SET maxmemory" in said


def test_all_is_well_with_a_model(tmp_path):
    tiny().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    options = ("--maxmemory", "200mb", "--maxmemory-policy", "allkeys-lru")
    with Server(redis_binary(), *options) as server:
        arguments = ["doctor", "--store", server.unix_url, "--model", str(tmp_path), "--json"]
        result = runner.invoke(cli.app, arguments)
    told = json.loads(result.stdout)
    assert result.exit_code == (0 if told["good"] else 1)  # a tiny model may not pay
    assert told["stores"][0]["advice"] == []
    assert told["stores"][0]["speed"]["read"] > 1e6
    assert told["model"]["moving"] == ""
    assert told["model"]["break_even"]["prefill_rate"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--store", "redis://localhost:1/0"], "check that the server runs"),
        (["--store", "nope://x"], "nope"),
        (["--model", "MODEL", "--store", "nope://x"], "nope"),
        (["--model", "/nowhere", "--store", "memory://"], "--model"),
    ],
)
def test_mistakes_end_with_2_and_one_line(arguments, said):
    told = run(*arguments, code=2)
    assert said in told
    assert len(told.strip().splitlines()) == 1


def test_what_others_have_stored_stays_as_it_is(tmp_path, redis_server):
    """Not even their time to live is touched: by no other ttl, by no cleaning up."""
    model, ids = tiny(), tokens(300)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    redis_server.client().flushall()
    files = f"file://{tmp_path}/store"
    for url in (redis_server.unix_url, files):
        with RedisChunkCache(model, url, reuse="anywhere") as cache:
            model.generate(ids, past_key_values=cache, max_new_tokens=1)
            cache.flush()
    long_ago = time.time() - 100_000
    for path in (tmp_path / "store").rglob("*"):
        os.utime(path, (long_ago, long_ago))
    with redis_server.client() as client:
        for name in client.keys("anchor@*"):
            client.hset(name, "f" * 64, "0 2020-01-01T00:00:00+00:00")  # a chunk that is gone
        before = set(client.keys())
        for url in (redis_server.unix_url, files):
            runner.invoke(cli.app, ["doctor", "--store", url, "--model", str(tmp_path / "model")])
        after = set(client.keys())
        assert before <= after
        assert {name.split(b"@")[0] for name in after - before} <= {b"self-test", b"moving"}
        assert {client.ttl(name) for name in after} == {-1}
    with open_store(files) as store:
        assert len(list(catalog.entries(store))) == 3


def test_a_store_for_reading_alone_is_measured_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("CHUNKCACHE_WRITE", "no")
    monkeypatch.setenv("CHUNKCACHE_PIN", "yes")
    tiny().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    store = (tmp_path / "store").as_uri()
    arguments = ["doctor", "--store", store, "--model", str(tmp_path / "model"), "--json"]
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code in (0, 1), result.output  # a tiny model may not pay
    assert json.loads(result.stdout)["model"]["break_even"]["points"]


def test_a_model_too_short_to_measure(tmp_path):
    tiny(max_position_embeddings=128).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    store = (tmp_path / "store").as_uri()
    said = run("--store", store, "--model", str(tmp_path / "model"), code=1)
    assert "too short to measure" in said
    assert "too slow" not in said
