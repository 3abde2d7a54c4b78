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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from servers import Server

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README.md"), *(ROOT / "docs").glob("*.md")])
URL = "redis://localhost:6379/0"  # in a block, the test's own server is put in its place
SECONDS = 300
BLOCK = re.compile(r"(<!-- no-test -->\s*)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Loads the model once, and forks a process for each page that it is given as a line of JSON: there
# the blocks run, and a traceback shows the line of the page. Answers with each exit status.
PYTHON = """
import atexit, json, os, sys, traceback
from chunkcache.samples import load_smollm2

model, tokenizer = load_smollm2()
prompt = "The quick brown fox jumps over the lazy dog. " * 20
inputs = tokenizer(prompt, return_tensors="pt")
names = dict(
    __name__="__main__", model=model, tokenizer=tokenizer, prompt=prompt, inputs=inputs
)

def run(page):
    os.chdir(page["folder"])
    os.environ["CHUNKCACHE_URL"] = page["url"]
    with open("output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        for line, code in page["blocks"]:
            exec(compile("\\n" * line + code, page["path"], "exec"), names)
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for given in sys.stdin:
    if not (child := os.fork()):
        status = run(json.loads(given))
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
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


@pytest.fixture(scope="module")
def reader() -> Iterator[subprocess.Popen[str]]:
    """A process that has the model, and forks one for each page."""
    pipes: dict[str, int] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PYTHON], text=True, **pipes) as process:
        yield process


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_is_shown_works(
    path: Path, reader: subprocess.Popen[str], redis_server: Server, tmp_path: Path
) -> None:
    page = path.read_text().replace(URL, redis_server.tcp_url)
    if python := [[block.line, block.text] for block in blocks(page, "python")]:
        assert reader.stdin
        assert reader.stdout
        given = {"path": str(path), "blocks": python, "folder": str(tmp_path)}
        print(json.dumps({**given, "url": redis_server.unix_url}), file=reader.stdin, flush=True)
        assert reader.stdout.readline() == "0\n", (tmp_path / "output").read_text()
    shell = [block.text for block in blocks(page, "bash") if "redis-cli " in block.text]
    assert run(["bash", "-e", "-c", "".join([SHELL, *shell])], folder=tmp_path).stderr == ""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_of_chunkcache_exist(path: Path) -> None:
    for words in commands(path.read_text()):
        run([sys.executable, "-m", "chunkcache.cli.app", *words[1:], "--help"])
