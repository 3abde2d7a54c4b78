"""The README and the documentation: what they tell people to type is typed, and has to work.

The ```python blocks of a page run in order, in one process. They find what a reader is assumed to
have: `model`, `tokenizer`, `prompt` and `inputs`. Its ```bash blocks with redis-cli run after them,
in one shell; commands of chunkcache are only asked for their `--help`. A block behind
`<!-- no-test -->` is left out.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from servers import Server

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README.md"), *(ROOT / "docs").glob("*.md")])
URL = "redis://localhost:6379/0"  # in a block, the test's own server is put in its place
SECONDS = 300
BLOCK = re.compile(r"(<!-- no-test -->\s*)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Reads [[line, code], …] and runs it; a traceback shows the line of the page.
PYTHON = """
import json, sys
from chunkcache.samples import load_smollm2

model, tokenizer = load_smollm2()
prompt = "The quick brown fox jumps over the lazy dog. " * 20
inputs = tokenizer(prompt, return_tensors="pt")
names = dict(
    __name__="__main__", model=model, tokenizer=tokenizer, prompt=prompt, inputs=inputs
)
for line, code in json.load(sys.stdin):
    exec(compile("\\n" * line + code, sys.argv[1], "exec"), names)
"""
# With -e, an error of the server goes to stderr.
SHELL = 'redis-cli() { command redis-cli -e "$@"; }\n'


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, how many lines of the page stand above it, and its text."""

    language: str
    line: int
    text: str


def blocks(page: str, language: str) -> list[Block]:
    """The blocks of a page in that language, without those that are not to be tested."""
    return [
        Block(match[2], page.count("\n", 0, match.start(3)), match[3])
        for match in BLOCK.finditer(page)
        if match[2] == language and not match[1]
    ]


def commands(page: str) -> list[list[str]]:
    """The words of each command of chunkcache in the page's bash blocks."""
    lines = "".join(block.text for block in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("chunkcache ")]


def run(
    command: list[str], given: str = "", folder: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, which has to be a good one."""
    environment: Mapping[str, str] = {**os.environ, **variables}
    done = subprocess.run(
        command,
        input=given,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_there_are_pages() -> None:
    assert PAGES


def test_blocks_are_found() -> None:
    page = (
        "text\n\n```python\na = 1\n```\n\n<!-- no-test -->\n```python\na = 2\n```\n"
        "\n```bash\nchunkcache show \\\n  x  # a remark\nmake\n```\n```\nplain\n```\n"
    )
    assert blocks(page, "python") == [Block("python", 3, "a = 1\n")]
    assert commands(page) == [["chunkcache", "show", "x"]]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_is_shown_works(path: Path, redis_server: Server, tmp_path: Path) -> None:
    page = path.read_text().replace(URL, redis_server.tcp_url)
    if python := [[block.line, block.text] for block in blocks(page, "python")]:
        run(
            [sys.executable, "-c", PYTHON, str(path)],
            json.dumps(python),
            tmp_path,
            CHUNKCACHE_URL=redis_server.unix_url,
        )
    shell = [block.text for block in blocks(page, "bash") if "redis-cli " in block.text]
    assert run(["bash", "-e", "-c", "".join([SHELL, *shell])], folder=tmp_path).stderr == ""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_of_chunkcache_exist(path: Path) -> None:
    for words in commands(path.read_text()):
        run([sys.executable, "-m", "chunkcache.cli.app", *words[1:], "--help"])
