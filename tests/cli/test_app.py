"""The command line: what it answers, and that mistakes end with 2 and one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from servers import Server
from typer.testing import CliRunner

from chunkcache import open_store
from chunkcache.cli import app as cli
from chunkcache.cli import demo
from chunkcache.doctor.measure import Run
from chunkcache.stores.base import Entry

runner = CliRunner()


def outcome(second_answer: list[int]) -> demo.Outcome:
    def run(milliseconds: float, reused: int, answer: list[int]) -> Run:
        said = f"{reused} reused"
        return Run(milliseconds, 9, 50, 1000, reused, 46_000_000, answer, "text", said)

    first, second = run(2000, 0, [1, 2]), run(3000, 0, [3, 4])
    rows = [
        demo.Row("no cache", first, first),
        demo.Row("cold", run(2100, 0, [1, 2]), first),
        demo.Row("warm", run(100, 999, [1, 2]), first),
        demo.Row("no cache", second, second),
        demo.Row("warm", run(200, 896, second_answer), second),
    ]
    return demo.Outcome("a model", "redis://ann:secret@host/0", "demo-1", rows)


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """Replace the runs by made-up ones, to see what is printed of them."""

    def fake(second_answer: list[int]) -> None:
        monkeypatch.setattr(demo, "ready_store", lambda url: url)
        monkeypatch.setattr(demo, "run_demo", lambda *_: outcome(second_answer))
        monkeypatch.setenv("COLUMNS", "120")

    return fake


def test_version() -> None:
    result = runner.invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"chunkcache {version('chunkcache')}\n"


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_names_the_commands(arguments: list[str]) -> None:
    result = runner.invoke(cli.app, arguments)
    assert "demo" in result.output
    assert "Redis" in result.output


def test_help_of_the_demo_names_its_options() -> None:
    result = runner.invoke(cli.app, ["demo", "--help"])
    assert result.exit_code == 0
    for option in ("--store", "--model", "--tokens", "--max-new-tokens", "--json"):
        assert option in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--store", "nope://x"], "nope"),
        (["--store", "memory://"], "memory://"),
        (["--store", "redis://127.0.0.1:1/0"], "127.0.0.1:1"),
    ],
)
def test_a_store_that_cannot_work_is_one_line(arguments: list[str], said: str) -> None:
    result = runner.invoke(cli.app, ["demo", *arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("chunkcache: ")
    assert said in result.stderr


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    store = tmp_path.joinpath("store").as_uri()
    result = runner.invoke(cli.app, ["demo", "--store", store, "--model", str(tmp_path)])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "--model" in result.stderr


def test_the_same_answers_end_with_0(fake_runs: Callable[[list[int]], None]) -> None:
    fake_runs([3, 4])
    result = runner.invoke(cli.app, ["demo"])
    assert result.exit_code == 0
    assert "20.0×" in result.stdout
    assert "15.0×" in result.stdout
    assert "896 / 1,000" in result.stdout
    assert result.stdout.count("same") == 3
    assert "999 reused" in result.stdout
    assert "46 MB" in result.stdout
    assert "secret" not in result.stdout
    assert "redis://ann:***@host/0" in result.stdout


def test_json_has_all_and_no_password(fake_runs: Callable[[list[int]], None]) -> None:
    fake_runs([3, 4])
    result = runner.invoke(cli.app, ["demo", "--json"])
    assert json.loads(result.stdout)["runs"][4]["reused"] == 896
    assert "secret" not in result.stdout


def test_a_changed_answer_ends_with_1(fake_runs: Callable[[list[int]], None]) -> None:
    fake_runs([3, 5])
    result = runner.invoke(cli.app, ["demo"])
    assert result.exit_code == 1
    assert result.stdout.count("DIFFERENT") == 1


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
    pack = str(tmp_path / "pack")
    commands = [
        ["--version"], ["--help"],
        ["ls"], ["ls", "--json"], ["stats"], ["sweep"], ["purge", "namespace=b"],
        ["show", key], ["export", pack], ["import", pack], ["doctor"],
    ]  # fmt: skip
    program = """
import contextlib, json, sys
from chunkcache.cli.app import app
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
        app(arguments)
    print(arguments[0], *sorted({"torch", "transformers"} & set(sys.modules)))
"""
    told = [[*each, "--store", url] if not each[0].startswith("--") else each for each in commands]
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(told)], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [each[0] for each in commands], done.stderr
    assert "layer 0: a token's key is 2.00 long" in done.stderr  # so they did their work
    assert "1 chunks, 3 tokens" in done.stderr
    assert "a lookup takes" in done.stderr
