"""`chunkcache bench`, with a tiny model and a real server."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from typer.testing import CliRunner

from chunkcache import RedisChunkCache, StoreError
from chunkcache.cli import app as cli
from chunkcache.doctor.bench import Arm, Bencher, Stopwatch, _clean_up
from chunkcache.inventory import catalog
from chunkcache.model.loading import SMOLLM2
from chunkcache.stores import open_store
from chunkcache.stores.redis import RedisStore
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
    names = ["no cache", "cold", "warm, other question", "warm, same prompt"]
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


def test_the_demo_is_a_preset():
    """With the sample model; what is given counts more than what the preset says."""
    result = bench("--preset", "demo", "--store", "memory://", "--tokens", "150", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["model"], told["repeats"], told["store"]) == (SMOLLM2, 1, "memory://")
    plain, cold, other, same = told["arms"]
    assert plain["tokens"] == 150
    assert plain["reused"] == cold["reused"] == 0
    assert 128 <= other["reused"] < same["reused"] == same["prompt_tokens"] - 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--preset demo"),
        (["--preset", "large"], "'large'"),
        (["--model", "x", "--store", "nope://x"], "nope"),
        (["--model", "x", "--store", "redis://ann:secret@127.0.0.1:1/0"], "127.0.0.1:1"),
        (["--model", "/nowhere", "--store", "memory://"], "--model"),
    ],
)
def test_mistakes_end_with_2_and_one_line(arguments, said):
    result = bench(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert "secret" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(("same", "code"), [(True, 0), (False, 1)])
def test_what_is_shown(monkeypatch, folder, same, code):
    times = {"no cache": 2000.0, "cold": 2100.0, "warm, same prompt": 100.0}
    arms = tuple(Arm(900, name, ms, 9.0, 999, 1000, same) for name, ms in times.items())
    monkeypatch.setattr(Bencher, "run", lambda *_: arms)
    monkeypatch.setenv("COLUMNS", "120")
    result = bench("--model", folder, "--store", "memory://")
    assert result.exit_code == code
    assert "20.0×" in result.stdout
    assert result.stdout.count("DIFFERENT") == (0 if same else 2)


def test_the_prompt_is_not_the_first_token():
    watch = Stopwatch()
    for token in ([[1, 2, 3]], [4]):
        watch.put(torch.tensor(token))
    first = watch.first_token_ms
    assert first == 1e3 * (watch.times[2] - watch.times[0]) > 0
    assert watch.decode_ms == 0
    for token in ([5], [6]):
        watch.put(torch.tensor(token))
    assert watch.first_token_ms == first
    assert watch.decode_ms == 500 * (watch.times[4] - watch.times[2])


def test_the_same_length_twice_is_measured_once(folder, redis_server):
    url = redis_server.unix_url
    result = bench("--model", folder, "--store", url, *["--tokens", "256"] * 2, "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["arms"]) == 4


def test_all_lengths_are_checked_before_any_is_measured(folder, redis_server, monkeypatch):
    monkeypatch.setattr(Bencher, "_answer", None)
    url = redis_server.unix_url
    result = bench("--model", folder, "--store", url, "--tokens", "64", "--tokens", "4000")
    assert result.exit_code == 2
    assert "--tokens 4000" in result.stderr


@pytest.mark.parametrize(("name", "value"), [("WRITE", "no"), ("REUSE", "off")])
def test_settings_with_which_nothing_can_be_reused(folder, redis_server, monkeypatch, name, value):
    monkeypatch.setenv(f"CHUNKCACHE_{name}", value)
    monkeypatch.setattr("chunkcache.model.loading.load_model", None)
    result = bench("--model", folder, "--store", redis_server.unix_url)
    assert result.exit_code == 2
    assert f"CHUNKCACHE_{name}" in result.stderr


def test_a_run_in_which_nothing_was_reused_is_told(folder, redis_server, monkeypatch):
    monkeypatch.setenv("CHUNKCACHE_CHUNK_SIZE", "1500")
    monkeypatch.setenv("CHUNKCACHE_STORE_TAIL", "no")
    url = redis_server.unix_url
    result = bench("--model", folder, "--store", url, "--tokens", "256", "--json")
    assert json.loads(result.stdout)["without_reuse"] == [256]
    assert "--tokens 256: nothing was reused" in result.stderr


def test_tiers_in_the_environment(folder, redis_server, tmp_path, monkeypatch):
    near = tmp_path / "near"
    url = f"{near.as_uri()} {redis_server.unix_url}"
    monkeypatch.setenv("CHUNKCACHE_URL", url)
    result = bench("--model", folder, "--tokens", "256", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["store"] == url
    assert [path.name for path in tmp_path.iterdir()] == ["near"]


def test_what_waits_to_be_written_is_deleted_too(folder, redis_server, monkeypatch):
    flush, write = RedisChunkCache.flush, RedisStore.write
    writes = threading.Semaphore(0)

    def interrupted(cache, timeout=None):
        if timeout is None:
            raise KeyboardInterrupt
        return flush(cache, 0)

    def held(store, entries):
        if any(entry.nbytes for entry in entries):
            writes.acquire(timeout=30)  # until the measuring is over
        return write(store, entries)

    def clean_up(store, run):
        writes.release(1000)
        _clean_up(store, run)

    monkeypatch.setattr(RedisChunkCache, "flush", interrupted)
    monkeypatch.setattr(RedisStore, "write", held)
    monkeypatch.setattr("chunkcache.doctor.bench._clean_up", clean_up)
    url = redis_server.unix_url
    assert bench("--model", folder, "--store", url, "--tokens", "1000").exit_code == 130
    with open_store(url) as store:
        store.flush()
        assert not list(catalog.entries(store))


def test_chunks_that_cannot_be_deleted_are_told(folder, redis_server, monkeypatch, caplog):
    def fail(*_):
        raise StoreError("the server is gone")

    monkeypatch.setattr("chunkcache.inventory.catalog.delete", fail)
    result = bench("--model", folder, "--store", redis_server.unix_url, "--tokens", "256")
    assert result.exit_code == 0
    assert "the server is gone" in caplog.text
    assert "chunkcache purge tags=bench-" in caplog.text
