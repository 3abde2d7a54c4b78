"""The structure that CONTRIBUTING.md promises: imports run one way, and in no circle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import chunkcache

PACKAGE = Path(chunkcache.__file__).parent
TABLE = PACKAGE.parent / "CONTRIBUTING.md"
MODULES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
}


def imports(module: str) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in its code."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inside]
        else:
            continue
        yield from (name for name in names if name in MODULES)


def levels() -> dict[str, int]:
    """The place in the table of each part of the package."""
    rows = re.findall(r"^\| (`.*`) \|", TABLE.read_text(), re.MULTILINE)
    return {name.strip("`/"): number for number, row in enumerate(rows) for name in row.split(", ")}


def test_each_part_imports_only_those_above_it() -> None:
    level = levels()
    parts = {module.split(".")[1] for module in MODULES if "." in module}
    assert parts == level.keys()
    below = [
        (module, other)
        for module in MODULES
        for other in imports(module)
        if module != "chunkcache" and other != "chunkcache"
        if level[other.split(".")[1]] > level[module.split(".")[1]]
    ]
    assert not below


def test_no_imports_run_in_a_circle() -> None:
    graph = {
        module: {other for other in imports(module) if other not in (module, "chunkcache")}
        for module in MODULES
        if module != "chunkcache"
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


PREFIX = """
import sys
from tests.models import tiny, tokens
from chunkcache import RedisChunkCache

model, ids = tiny("llama"), tokens(200)
for _ in range(2):
    cache = RedisChunkCache(model, "memory://")
    model.generate(ids, past_key_values=cache, max_new_tokens=2)
assert cache.report.reused == 199
print(*(name for name in sys.modules if name.startswith("chunkcache.anywhere")))
"""


def test_prefix_reuse_does_without_reuse_anywhere() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PREFIX], cwd=PACKAGE.parent, text=True, capture_output=True,
        check=True,
    )  # fmt: skip
    assert not done.stdout.strip()
