"""Run the notebooks: `make notebooks` only runs them, `make keep-notebooks` keeps their new outputs as well.

    python notebooks/run.py [--keep] [NOTEBOOK ...]

Each runs from its first cell to its last in a kernel and an empty directory of its own, with no answers kept
from before. The first cell that fails ends it, with its traceback. What is kept is brought into a form that
changes only where what a reader sees does: no paths or ports of this machine, no times of day, no log lines.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TIMED = {"measured", "predicted"}
"""Tags of cells whose point is how long something takes; no other keeps a time."""
_SECONDS = 300
_ADDRESS = re.compile(r"\b(tcp|tls|http|https)://(?:127\.0\.0\.1|localhost):(\d+)")
_MEMORY = re.compile(r" at 0x[0-9a-f]+")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", action="store_true", help="put the outputs into the notebooks")
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    asked = parser.parse_args(argv)
    begun = time.perf_counter()
    for path in asked.notebooks:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
            ran = run(nbformat.read(path, as_version=4), Path(folder).resolve())
            if asked.keep:
                nbformat.write(normalised(ran, [folder, str(ROOT)]), path)
        cells = sum(cell.cell_type == "code" for cell in ran.cells)
        print(f"{path.name}: {cells} cells in {time.perf_counter() - started:.0f} s", flush=True)
    print(f"{len(asked.notebooks)} notebooks in {time.perf_counter() - begun:.0f} s")
    return 0


def run(notebook: Any, folder: Path) -> Any:
    """The notebook as it comes out of a run in that folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    os.environ["DASK_DASKLLM__ANSWERS"] = str(folder / "answers")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    resources = {"metadata": {"path": str(folder)}}
    # Over sockets in a folder of this user's own, where no other process of the machine reads along.
    kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=str(folder / "kernel"))
    client = NotebookClient(notebook, km=kernel, timeout=_SECONDS, resources=resources)
    client.owns_km = True  # so that it ends the kernel
    return client.execute()


def normalised(notebook: Any, folders: Iterable[str] = ()) -> Any:
    """The notebook in the form in which it is kept; one that is in it stays as it is.

    Args:
        folders: whose paths are written as if one stood in them.
    """
    kept = copy.deepcopy(notebook)
    kept.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    ports: dict[str, int] = {}
    for number, cell in enumerate(kept.cells):
        cell.id = f"cell-{number:02d}"
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = [_output(out, ports, folders) for out in cell.outputs if not _is_log(out)]
    return kept


def _is_log(output: Any) -> bool:
    return bool(output.output_type == "stream" and output.name == "stderr")


def _output(output: Any, ports: dict[str, int], folders: Iterable[str]) -> Any:
    if output.output_type == "stream":
        output.text = _text(output.text, ports, folders)
    for kind, data in output.get("data", {}).items():
        if isinstance(data, str) and kind != "image/png":
            output.data[kind] = _text(data, ports, folders)
    return output


def _text(text: str, ports: dict[str, int], folders: Iterable[str]) -> str:
    def address(found: re.Match[str]) -> str:
        if found[1].startswith("http"):
            return f"{found[1]}://127.0.0.1:8787"
        return f"{found[1]}://127.0.0.1:{ports.setdefault(found[2], 40001 + len(ports))}"

    for folder in folders:
        text = text.replace(f"{folder}/", "").replace(folder, ".")
    return _MEMORY.sub("", _ADDRESS.sub(address, text))


if __name__ == "__main__":
    sys.exit(main())
