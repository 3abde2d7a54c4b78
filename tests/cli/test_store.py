"""The commands that look into a store, on a real server."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from chunkcache import RedisChunkCache
from chunkcache.cli import app as cli
from tests.models import tiny, tokens

runner = CliRunner()


@pytest.fixture
def url(redis_server) -> str:
    redis_server.client().flushall()
    model = tiny()
    for namespace in ("a", "b"):
        settings = {"namespace": namespace, "tags": "project=x,[red]", "reuse": "anywhere"}
        with RedisChunkCache(model, redis_server.unix_url, **settings) as cache:
            model.generate(tokens(300), past_key_values=cache, max_new_tokens=2)
            cache.flush()
    return redis_server.unix_url


def run(url: str, *arguments: str, code: int = 0) -> str:
    result = runner.invoke(cli.app, [*arguments, "--store", url], env={"COLUMNS": "140"})
    assert result.exit_code == code, result.output
    return result.stdout if not code else result.stderr


def test_ls(url):
    lines = run(url, "ls").splitlines()
    assert len(lines) == 1 + 6
    assert "LlamaForCausalLM" in lines[1]
    assert "project=x,[red]" in lines[1]
    assert len(run(url, "ls", "namespace=a").splitlines()) == 1 + 3
    assert len(run(url, "ls", "--limit", "2").splitlines()) == 1 + 2
    found = json.loads(run(url, "ls", "namespace=a", "--json"))
    assert {entry["metadata"]["namespace"] for entry in found} == {"a"}
    assert {entry["nbytes"] > 40_000 for entry in found} == {True}


def test_stats(url):
    assert run(url, "stats").startswith("6 chunks, 600 tokens")
    told = json.loads(run(url, "stats", "namespace=b", "--json"))
    assert told["total"]["chunks"] == 3
    assert list(told["namespaces"]) == ["b"]


def test_show(url):
    key = json.loads(run(url, "ls", "--json"))[0]["key"]
    beginning = key.rpartition("@")[2][:12]
    for name in (key, f"{key}@metadata", f"{key}@kv_bytes", beginning):
        told = json.loads(run(url, "show", name, "--json"))
        assert told["key"] == key
        assert told["blob"] == int(told["bytes"])
        assert f"key: {key}" in run(url, "show", name)
    assert told["header"]["__metadata__"]["chunk_hash"] == key.rpartition("@")[2]
    assert [norms["layer"] for norms in told["norms"]] == [0, 1, 2, 3]
    said = run(url, "show", key)
    assert "header: 8 tensors; layers.0.keys is F32" in said
    assert "layer 3: a token's key is" in said
    assert "no chunk" in run(url, "show", "f" * 64, code=1)


def test_show_with_the_text(url, tmp_path):
    from tests.words import word_tokenizer

    word_tokenizer().save_pretrained(tmp_path)
    key = json.loads(run(url, "ls", "--json"))[0]["key"]
    told = json.loads(run(url, "show", key, "--json", "--tokenizer", str(tmp_path)))
    assert told["text"].split()[0] == f"w{json.loads(told['token_ids'])[0]}"


def test_purge(url):
    kept = len(json.loads(run(url, "ls", "--json", "--limit", "0")))
    said = json.loads(run(url, "purge", "namespace=a", "--dry-run", "--json"))
    assert said == {**said, "chunks": 3, "tokens": 300, "dry_run": True}
    assert said["mentions"] > 10
    assert len(json.loads(run(url, "ls", "--json", "--limit", "0"))) == kept
    assert run(url, "purge", "namespace=a").startswith("3 chunks deleted: 300 tokens")
    assert len(json.loads(run(url, "ls", "--json"))) == kept - 3
    assert json.loads(run(url, "stats", "namespace=a", "--json"))["total"]["chunks"] == 0


def test_sweep(url, redis_server):
    key = json.loads(run(url, "ls", "--json"))[0]["key"]
    redis_server.client().delete(f"{key}@metadata")
    assert json.loads(run(url, "sweep", "--dry-run", "--json"))["chunks"] == 1
    assert json.loads(run(url, "sweep", "--json"))["chunks"] == 1
    assert json.loads(run(url, "sweep", "--json"))["chunks"] == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["purge"], "needs terms"),
        (["ls", "nonsense"], "nonsense"),
        (["stats", "age>soon"], "age"),
    ],
)
def test_mistakes_end_with_2_and_one_line(url, arguments, why):
    said = run(url, *arguments, code=2)
    assert why in said
    assert len(said.splitlines()) == 1


def test_a_server_that_is_not_there():
    said = run("redis://localhost:1/0", "stats", code=2)
    assert "check that the server runs" in said
