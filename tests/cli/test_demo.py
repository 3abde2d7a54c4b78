"""The demo, run for real: two processes, one server, the sample model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from servers import Server
from typer.testing import CliRunner

from chunkcache.cli import app as cli


@pytest.fixture(scope="module")
def result(valkey_server: Server) -> dict[str, Any]:
    """What `chunkcache demo --json` prints for a short document."""
    arguments = ["--store", valkey_server.unix_url, "--tokens", "300", "--max-new-tokens", "8"]
    done = CliRunner().invoke(cli.app, ["demo", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_answers_are_the_same(result: dict[str, Any]) -> None:
    assert result["same"]
    assert all(run["same"] for run in result["runs"])
    first, second = result["runs"][0]["answer_ids"], result["runs"][3]["answer_ids"]
    assert 0 < len(first) <= 8
    assert first != second  # else "the same" would say little


def test_cold_is_cold_and_warm_is_warm(result: dict[str, Any]) -> None:
    plain, cold, warm, plain_other, warm_other = result["runs"]
    assert plain["reused"] == cold["reused"] == plain_other["reused"] == 0
    assert cold["bytes_written"] > 0
    assert warm["prompt_tokens"] - 128 <= warm["reused"] < warm["prompt_tokens"]
    assert 256 <= warm_other["reused"] < warm["reused"]
    assert all(run["first_token_ms"] > 0 for run in result["runs"])


def test_the_result_says_where_the_chunks_are(
    result: dict[str, Any], valkey_server: Server
) -> None:
    assert result["store"] == valkey_server.unix_url
    assert str(result["runs"][2]["reused"]) in result["runs"][2]["report"]
