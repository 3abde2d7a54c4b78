"""Errors of commands: one line, exit status 2, and a traceback only if it is asked for."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from chunkcache.cli import app as cli

runner = CliRunner()


@pytest.fixture
def broken(monkeypatch):
    """A command that meets a bug."""

    def fail(*_):
        raise ZeroDivisionError("a\nb\x1b[2J")

    monkeypatch.setattr("chunkcache.inventory.catalog.stats", fail)
    return ["stats", "--store", "memory://"]


def test_a_bug_is_one_line_and_no_answer(broken):
    result = runner.invoke(cli.app, broken)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("chunkcache: ZeroDivisionError: a b␛[2J (a bug, please report it")


def test_its_traceback_is_shown_on_request(broken):
    result = runner.invoke(cli.app, broken, env={"CHUNKCACHE_DEBUG": "1"})
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["ls", "--limit", "x"], ["show"]])
def test_what_typer_says_of_options_stays(arguments):
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr
    assert "bug" not in result.stderr
