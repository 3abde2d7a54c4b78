"""The command line: what it answers, and that mistakes end with 2 and one line."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from servers import Server
from typer.testing import CliRunner

from chunkcache import open_store
from chunkcache.cli import app as cli
from chunkcache.stores.base import Entry

runner = CliRunner()


def test_version() -> None:
    result = runner.invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"chunkcache {version('chunkcache')}\n"


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_names_the_commands(arguments: list[str]) -> None:
    result = runner.invoke(cli.app, arguments)
    assert "bench" in result.output
    assert "Redis" in result.output


@pytest.mark.parametrize("kind", ["file", "redis"])
def test_commands_that_only_need_a_store_import_no_torch(
    kind: str, redis_server: Server, tmp_path: Path
) -> None:
    url = redis_server.unix_url if kind == "redis" else tmp_path.joinpath("store").as_uri()
    key = f"safetensors@m@1@0@{1:064x}"
    blob = save({f"layers.0.{part}": torch.ones(2, 3, 4) for part in ("keys", "values")})
    with open_store(url) as store:
        store.write([Entry(key, {"tokens": "3", "namespace": "a"}, memoryview(blob))])
        store.flush()
    copy = tmp_path.joinpath("copy").as_uri()
    commands = [
        ["--version"], ["--help"],
        ["ls"], ["ls", "--json"], ["stats"], ["sweep"], ["purge", "namespace=b"],
        ["show", key], ["copy", url, copy, "--verify"], ["doctor"],
    ]  # fmt: skip
    program = """
import contextlib, json, sys
from chunkcache.cli.app import app
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
        app(arguments)
    print(arguments[0], *sorted({"torch", "transformers"} & set(sys.modules)))
"""
    bare = ("--version", "--help", "copy")
    told = [each if each[0] in bare else [*each, "--store", url] for each in commands]
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(told)], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [each[0] for each in commands], done.stderr
    assert "layer 0: mean L2 norm of keys 2.00, of values" in done.stderr  # so they did their work
    assert "1 chunks, 3 tokens" in done.stderr
    assert "0 chunks copied" in done.stderr
    assert "a lookup takes" in done.stderr
