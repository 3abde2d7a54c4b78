"""The notebooks: each runs from top to bottom, and is kept with the outputs of such a run."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from servers import Server

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# What a notebook measures, it measures here once and on short prompts; the code is the same.
FASTER = """lengths, rounds = (64, 200), 1
shots, questions, windows = (10, 20), 2, 2
"""
SHORTER = """from chunkcache import samples
long = samples.document
samples.document = lambda tokens, *more, **how: long(max(tokens // 3, 150), *more, **how)
"""
CELL_SECONDS = 300
PLACES = re.compile(
    "|".join(re.escape(str(place)) for place in (Path.home(), Path(tempfile.gettempdir())))
    + r"|/(home|root|Users|private|var|tmp)/|[A-Z]:\\\\"
)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_runs(
    path: Path, redis_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHUNKCACHE_URL", redis_server.unix_url)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SHORTER))
    for index, cell in enumerate(notebook.cells):
        if "parameters" in cell.metadata.get("tags", []):
            notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(FASTER))
            break
    with redis_server.client() as client:
        client.config_resetstat()
        # Raises CellExecutionError, with the traceback, where a cell fails.
        NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": str(tmp_path)}},
        ).execute()
        assert client.info("stats")["keyspace_hits"] > 0, "it has not used this server"
    printed = "".join(o.text for o in _outputs(notebook) if o.output_type == "stream")
    assert "True" in printed
    assert "False" not in printed  # notebooks print what they compare


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_is_kept_as_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = _outputs(notebook)
    assert outputs
    assert [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"] == []
    found = PLACES.search(json.dumps([_without_images(output) for output in outputs]))
    assert found is None, f"an output tells where it was made: {found}"


def _outputs(notebook: Any) -> list[Any]:
    return [o for cell in notebook.cells for o in cell.get("outputs", [])]


def _without_images(output: Any) -> dict[str, Any]:
    """In base64, anything may occur by chance."""
    data = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
    return {**output, "data": data}
