"""`chunkcache export | import`, from one real server to another."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from chunkcache import RedisChunkCache
from chunkcache.cli import app as cli
from chunkcache.library.pack_entry import FORMAT
from tests.models import tiny, tokens

runner = CliRunner()


@pytest.fixture
def source(redis_server) -> str:
    model = tiny()
    with RedisChunkCache(model, redis_server.unix_url, namespace="a") as cache:
        model.generate(tokens(300), past_key_values=cache, max_new_tokens=2)
        cache.flush()
    return redis_server.unix_url


def run(*arguments: str, code: int = 0):
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == code, result.output
    return result


def test_out_and_in(source, valkey_server, tmp_path):
    pack, target = str(tmp_path / "a.safetensors"), valkey_server.unix_url
    told = json.loads(run("export", pack, "namespace=a", "--store", source, "--json").stdout)
    assert (told["chunks"], told["tokens"]) == (3, 300)
    run("export", pack, "--store", source, code=2)
    assert run("export", pack, "--store", source, "--force").stdout.startswith("3 chunks, 300")
    assert run("import", pack, "--store", target).stdout.startswith("3 chunks, 300 tokens")
    again = json.loads(run("import", pack, "--store", target, "--json").stdout)
    assert again["skipped"] == 3
    assert run("stats", "--store", target).stdout == run("stats", "--store", source).stdout


def test_bad_entries_end_with_1(source, tmp_path):
    pack = tmp_path / "a.safetensors"
    run("export", str(pack), "--store", source)
    content = bytearray(pack.read_bytes())
    at = content.index(b'"checksum": "') + 13
    content[at] = ord("0") if content[at] != ord("0") else ord("1")
    pack.write_bytes(content)
    result = run("import", str(pack), "--store", "memory://", code=1)
    assert result.stdout.startswith("2 chunks, ")
    assert "its blob is damaged" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "a", "namespace=b"], "check the terms"),
        (["export", "a", "nonsense"], "nonsense"),
        (["import", "nowhere"], "nowhere"),
        (["export", ".", "--force"], "it is a folder"),
        (["export", "/", "--force"], "it is a folder"),
        (["export", "a" * 300], "cannot be written"),
        (["export", "a" * 250], "cannot be written"),
        (["export", "no/such/folder"], "no such folder"),
    ],
)
def test_mistakes_end_with_2_and_one_line(source, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stderr = run(*arguments, "--store", source, code=2).stderr
    assert said in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_what_a_pack_says_does_not_act_on_the_terminal(tmp_path):
    name = "\x1b]0;x\x07\x1b[2Jno key\nchunkcache: all good"
    parts = {f"{name}@metadata": np.frombuffer(b"{}", dtype=np.uint8)}
    save_file(parts, tmp_path / "pack", metadata={"format": FORMAT})
    result = run("import", str(tmp_path / "pack"), "--store", "memory://", code=1)
    (line,) = result.stderr.splitlines()
    assert "␛]0;x␇␛[2Jno key␊chunkcache: all good" in line
