"""The commands that look into a store, on a real server."""

from __future__ import annotations

import json
import os
import struct
import time
from urllib.parse import quote

import pytest
import torch
from typer.testing import CliRunner

from chunkcache import RedisChunkCache, open_store
from chunkcache.cli import app as cli
from chunkcache.stores.base import EXTRAS, Entry, Listed
from tests.models import tiny, tokens
from tests.words import word_tokenizer

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


def test_terms_that_mean_no_chunk(url):
    for command in ("ls", "stats", "purge"):
        result = runner.invoke(cli.app, [command, "namspace=a", "--store", url])
        assert result.exit_code == 0
        assert "check the terms" in result.stderr
    assert "check" not in runner.invoke(cli.app, ["ls", "namespace=a", "--store", url]).stderr


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
    assert "layer 3: mean L2 norm of keys" in said
    assert "no chunk" in run(url, "show", "f" * 64, code=1)


def test_states_and_outputs_are_told(redis_server):
    url = redis_server.unix_url
    key, plain = (put(url, number, {"namespace": "n"}) for number in (1, 2))
    with open_store(url) as store:
        for ending, size in zip(EXTRAS, (2_000_000, 3_000_000), strict=True):
            blob = memoryview(bytes(size))
            store.write([Entry(key + ending, {ending[1:]: str(size)}, blob, merge=True)])
    lines = run(url, "ls").splitlines()
    assert lines[0].split()[-3:] == ["MB", "state", "MB"]
    assert {tuple(line.split()[-2:]) for line in lines[1:]} == {("5.00", "3.00"), ("0.00", "0.00")}
    (found,) = (e for e in json.loads(run(url, "ls", "--json")) if e["key"] == key)
    assert (found["outputs"], found["state"]) == (2_000_000, 3_000_000)
    assert run(url, "stats").startswith("2 chunks, 0 tokens, 5.0 MB (3.0 MB of it 1 states)")
    redis_server.client().delete(f"{key}@outputs")  # evicted
    told = json.loads(run(url, "show", f"{key}@state", "--json"))
    assert (told["key"], told["blob"], told["outputs"], told["state"]) == (key, 1, 0, 3_000_000)
    assert "state" not in json.loads(run(url, "show", plain, "--json"))


def test_show_with_the_text(url, tmp_path):
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


HOSTILE = "\x1b]0;x\x07\x9b2J\nforged"


def put(url: str, number: int, fields: dict[str, str], blob: bytes = b"x", model: str = "m") -> str:
    """A made-up chunk. Returns its key."""
    key = f"safetensors@{model}@1@0@{number:064x}"
    with open_store(url) as store:
        store.write([Entry(key, fields, memoryview(blob))])
        store.flush()
    return key


@pytest.mark.parametrize("command", [["ls"], ["stats"], ["show", f"{7:064x}"]])
def test_what_others_wrote_does_not_act_on_the_terminal(redis_server, command):
    fields = dict.fromkeys(("namespace", "tags", "positions", "codec", "created", "x"), HOSTILE)
    url = redis_server.unix_url
    put(url, 7, fields, blob_of({HOSTILE: ("F32", [1], 4)}), quote(HOSTILE, safe=""))
    said = run(url, *command)
    assert not {"\x1b", "\x07", "\x9b"} & set(said)
    assert "forged" in said
    assert not any(line.startswith("forged") for line in said.splitlines())


def blob_of(tensors: dict[str, tuple[str, list[int], int]], byte: bytes = b"\0") -> bytes:
    """A safetensors file of these types, shapes and lengths in bytes."""
    header, end = {}, 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + byte * end


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ("c2VhbGVk", "sealed"),
        ('["a"]', "no token ids"),
        ("[-5]", "no token ids"),
        ("[100000000000000000000]", "no token ids"),
        ("[199]", "no token ids"),
        ("[true]", "no token ids"),
        ("{}", "sealed"),
        ("[" * 100_000, "no token ids"),
        ("", "no token ids"),
    ],
)
def test_show_reads_token_ids_that_are_none(redis_server, tmp_path, ids, why):
    word_tokenizer().save_pretrained(tmp_path)
    url = redis_server.unix_url
    key = put(url, 1, {"token_ids": ids, "a": "b"})
    told = json.loads(run(url, "show", key, "--tokenizer", str(tmp_path), "--json"))
    assert why in told["unread"]
    assert told["text"] == ""


def test_show_prints_json_of_blobs_with_nan(redis_server):
    sizes = ("F32", [1, 1, 1], 4)
    blob = blob_of({"layers.0.keys": sizes, "layers.0.values": sizes}, b"\xff")
    key = put(redis_server.unix_url, 1, {"a": "b"}, blob)
    said = run(redis_server.unix_url, "show", key, "--json")
    assert json.loads(said)["norms"] == [{"layer": 0, "keys": None, "values": None}]
    assert "NaN" not in said


@pytest.mark.parametrize(("key", "why"), [("", "ls lists them"), ("0" * 12, "several chunks")])
def test_show_refuses_what_means_no_chunk_or_several(redis_server, key, why):
    for number in (1, 2):
        put(redis_server.unix_url, number, {"a": "b"})
    assert why in run(redis_server.unix_url, "show", key, code=2)


def test_show_loads_the_tokenizer_before_it_asks_the_store(monkeypatch):
    monkeypatch.setattr("chunkcache.inventory.catalog.entries", None)
    assert "--tokenizer" in run("memory://", "show", "abc", "--tokenizer", "/nowhere", code=2)


def test_ls_folds_nothing_where_no_terminal_is(redis_server):
    names = {"namespace": "n" * 100, "tags": "t" * 100}
    put(redis_server.unix_url, 1, names)
    result = runner.invoke(cli.app, ["ls", "--store", redis_server.unix_url])
    assert len(result.stdout.splitlines()) == 1 + 1
    assert names["tags"] in result.stdout


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ls_prints_one_list_of_json(redis_server, count):
    for number in range(count):
        put(redis_server.unix_url, number, {"a": "b"})
    found = json.loads(run(redis_server.unix_url, "ls", "--json", "--limit", "0"))
    assert len(found) == count


def test_ls_prints_json_while_it_looks(monkeypatch, capsys):
    seen = []

    def entries(*_):
        for number in range(3):
            seen.append(capsys.readouterr().out)
            yield Listed(f"safetensors@m@1@0@{number:064x}", {"a": "b"}, 1)

    monkeypatch.setattr("chunkcache.inventory.catalog.entries", entries)
    cli.app(["ls", "--json", "--limit", "0", "--store", "memory://"], standalone_mode=False)
    assert [json.dumps(f"{n:064x}")[1:-1] in text for n, text in enumerate(seen[1:])] == [True] * 2


@pytest.mark.parametrize(
    "arguments",
    [["ls"], ["stats"], ["show", "abc"], ["purge", "a=b"], ["sweep"]],
)
def test_settings_of_the_store_count_here_too(arguments, monkeypatch):
    monkeypatch.setenv("CHUNKCACHE_READ_TIMEOUT", "banana")
    assert "CHUNKCACHE_READ_TIMEOUT" in run("memory://", *arguments, code=2)


@pytest.mark.parametrize("command", [["ls"], ["stats"], ["show", f"{1:064x}"], ["sweep"]])
def test_looking_renews_nothing(redis_server, command, monkeypatch):
    monkeypatch.setenv("CHUNKCACHE_TTL", "1000")
    url, client = redis_server.unix_url, redis_server.client()
    key = put(url, 1, {"a": "b"})
    for half in ("@metadata", "@kv_bytes"):
        client.expire(key + half, 500)
    run(url, *command)
    assert all(0 < client.ttl(key + half) <= 500 for half in ("@metadata", "@kv_bytes"))


def test_index_entries_that_purge_writes_again_expire(redis_server, monkeypatch):
    monkeypatch.setenv("CHUNKCACHE_TTL", "1000")
    url, client, model = redis_server.unix_url, redis_server.client(), tiny()
    for tags in ("new", "old"):
        with RedisChunkCache(model, url, tags=tags, reuse="anywhere", namespace="") as cache:
            ids = torch.cat([tokens(200), tokens(60, seed=len(tags) + (tags == "old"))], 1)
            model.generate(ids, past_key_values=cache, max_new_tokens=2)
            cache.flush()
    run(url, "purge", "tags=old")
    assert (left := client.keys("anchor@*"))
    assert all(client.ttl(name) > 0 for name in left)


def copied(*arguments: str, code: int = 0):
    result = runner.invoke(cli.app, ["copy", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_copy(url, valkey_server):
    target = valkey_server.unix_url
    told = json.loads(copied(url, target, "namespace=a", "--dry-run", "--json").stdout)
    assert (told["chunks"], told["dry_run"]) == (3, True)
    result = copied(url, target, "namespace=a", "--verify")
    assert result.stdout.startswith("3 chunks copied: 300 tokens, ")
    assert result.stderr == ""
    assert "0 chunks copied" in copied(url, target, "namespace=a").stdout
    assert "3 were there already" in copied(url, target).stdout
    assert run(target, "stats") == run(url, "stats")


def test_copy_renews_nothing(tmp_path, monkeypatch):
    """Not even of files, whose age counts from the last time that they were read."""
    source = tmp_path.as_uri()
    put(source, 1, {"a": "b"})
    (file,) = tmp_path.rglob("*.json")
    os.utime(file, (time.time() - 500,) * 2)
    before = file.stat().st_mtime
    monkeypatch.setenv("CHUNKCACHE_TTL", "1000")
    assert copied(source, "memory://").stdout.startswith("1 chunks copied")
    assert file.stat().st_mtime == before


def test_copy_leaves_out_what_is_damaged(url, tmp_path):
    put(url, 1, {"model": "\x1b[2J", "bytes": "7"})
    result = copied(url, tmp_path.as_uri(), "--verify", code=1)
    assert result.stdout.startswith("6 chunks copied")
    assert "1 left out" in result.stdout
    (line,) = result.stderr.splitlines()
    assert "its length" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["URL", "URL"], "are the same store"),
        (["file:///tmp/a", "file:///tmp//a/"], "are the same store"),
        (["memory://", "URL"], "no chunk of the source matches"),
        (["URL", "redis://localhost:1/0"], "check that the server runs"),
        (["redis://localhost:1/0", "URL"], "check that the server runs"),
        (["URL", "memory://?bytes=50KB"], "full|raise that"),
        (["URL", "memory://?bytes=200KB"], "destination has not kept"),
        (["URL", "memory://", "nonsense"], "cannot be understood"),
    ],
)
def test_copies_that_cannot_be_made(url, arguments, said):
    error = copied(*(url if word == "URL" else word for word in arguments), code=2).stderr
    assert any(part in error for part in said.split("|"))
    assert len(error.strip().splitlines()) == 1
