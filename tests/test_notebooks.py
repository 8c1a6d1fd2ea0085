"""The notebooks as they are kept: whole, with outputs that only change when what a reader sees does.

Running them is `make notebooks`, which fails with the first cell that does.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook, new_output

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [
    "01-quickstart",
    "02-cluster-and-dashboard",
    "03-the-layer-graph",
    "04-a-long-job",
    "05-applications",
]
OWN = re.compile(r"/(?:home|root|work|tmp|Users|var)/|\b(?:\d{1,3}\.){3}\d{1,3}\b|\bat 0x[0-9a-f]{4}")
TIMES = re.compile(r"\b\d[\d,.]* ?(?:ms|s|seconds|tokens/s)\b|\b\d\d:\d\d:\d\d\b")

spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
assert spec is not None
assert spec.loader is not None
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)


def outputs(cell: Any) -> str:
    """The text that a reader sees under a cell; pictures, which carry numbers of their own, are left out."""
    parts = []
    for output in cell.get("outputs", []):
        parts.append(output.get("text", ""))
        shown = output.get("data", {})
        parts += [shown[kind] for kind in ("text/plain", "text/html") if kind in shown]
    return re.sub(r"<svg.*?</svg>|style=\"[^\"]*\"", "", "\n".join(parts), flags=re.DOTALL)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_there_are_five() -> None:
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_was_run_from_its_first_cell_to_its_last(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.source.strip() for cell in code)
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    # A tutorial: prose before and between, and something to see under most cells.
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) * 3 >= len(code)
    assert sum(bool(cell.outputs) for cell in code) * 2 > len(code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_would_be_kept_again(path: Path) -> None:
    notebook = read(path)
    assert runner.normalised(notebook) == notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_of_a_machine_and_no_time_is_kept_without_need(path: Path) -> None:
    for cell in read(path).cells:
        text = outputs(cell)
        assert OWN.findall(text.replace("127.0.0.1", "loopback")) == []
        if not runner.TIMED & set(cell.metadata.get("tags", [])):
            assert TIMES.findall(text) == []


def test_the_pictures_are_there() -> None:
    kinds = {
        kind
        for path in NOTEBOOKS
        for cell in read(path).cells
        for out in cell.get("outputs", [])
        for kind in out.get("data", {})
    }
    assert {"image/png", "image/svg+xml", "text/html"} <= kinds


def test_links_lead_somewhere() -> None:
    for path in NOTEBOOKS:
        for cell in read(path).cells:
            for target in re.findall(r"\]\(([^)#]+)\)", cell.source if cell.cell_type == "markdown" else ""):
                assert (FOLDER / target).exists(), target


def test_outputs_are_brought_into_form() -> None:
    logged = new_output("stream", name="stderr", text="12:00:00 a worker died")
    text = "tcp://127.0.0.1:1234 and :1234 <A at 0x7f00aa> /x/y/file\n"
    printed = new_output("stream", name="stdout", text=text)
    html = "tcp://127.0.0.1:99 http://127.0.0.1:4321/status /x/y"
    shown = new_output("execute_result", {"text/html": html})
    cell = new_code_cell("1", outputs=[logged, printed, shown], metadata={"execution": {"started": "now"}})
    kept = runner.normalised(new_notebook(cells=[cell], metadata={"machine": "mine"}), ["/x/y"])
    assert [out.output_type for out in kept.cells[0].outputs] == ["stream", "execute_result"]
    assert kept.cells[0].outputs[0].text == "tcp://127.0.0.1:40001 and :1234 <A> file\n"
    html = kept.cells[0].outputs[1].data["text/html"]
    assert html == "tcp://127.0.0.1:40002 http://127.0.0.1:8787/status ."
    assert "machine" not in kept.metadata
    assert kept.cells[0].metadata == {}
    assert runner.normalised(kept) == kept


@pytest.mark.slow
def test_a_cell_that_fails_fails_the_run(tmp_path: Path) -> None:
    path = tmp_path / "bad.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1"), new_code_cell("1 / 0")]), path)
    before = path.read_text()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        runner.main(["--keep", str(path)])
    assert path.read_text() == before
