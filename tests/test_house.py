"""The house's own rules: who may import whom, what may be imported where, how long a file may grow."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "daskllm"
FILES = sorted(PACKAGE.rglob("*.py"))
ABOVE_RUNTIME = (
    "aio",
    "runtime",
    "dashboard",
    "jobs",
    "frame",
    "llm",
    "given",
    "texts",
    "bench",
    "demo",
    "tables",
    "cli",
    "__main__",
)
LONGEST = 450


def imported(path: Path) -> set[str]:
    """The top-level names of every module that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def importers(*modules: str) -> set[str]:
    return {str(path.relative_to(PACKAGE)) for path in FILES if imported(path) & set(modules)}


def room(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def test_the_layers_contract_holds() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_lists_every_room_in_the_contract_s_order() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    layers = setup["importlinter:contract:house"]["layers"].split("\n")
    height = {name: i for i, layer in enumerate(layers) for name in layer.replace("|", " ").split()}
    tree = re.search(r"^daskllm/\n((?:  .*\n)+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert tree is not None
    listed = re.findall(r" (\w+)(?:\.py|/)(?=\s)", tree[1])
    assert sorted(listed) == sorted(height)
    assert [height[name] for name in listed] == sorted(height.values())


def test_only_the_array_backend_imports_cupy() -> None:
    assert importers("cupy", "cupyx") <= {"blocks/array.py"}


def test_dask_appears_in_runtime_and_above_only() -> None:
    found = importers("dask", "distributed")
    assert {file for file in found if room(file) not in ABOVE_RUNTIME} == set()


def test_transformers_is_never_a_dependency_of_the_package() -> None:
    assert importers("transformers") <= {"demo/train.py"}


@pytest.mark.parametrize("module", ["numpy", "torch", "numba", "cupy", "pandas", "pyarrow"])
def test_planning_and_types_need_no_array_library(module: str) -> None:
    free = {"types.py", "metrics.py"} | {file for file in importers(module) if room(file) == "graph"}
    assert not importers(module) & free


def test_no_import_is_relative() -> None:
    def relative(path: Path) -> bool:
        nodes = ast.walk(ast.parse(path.read_text()))
        return any(isinstance(node, ast.ImportFrom) and node.level for node in nodes)

    assert [str(path.relative_to(ROOT)) for path in FILES if relative(path)] == []


def test_no_file_outgrows_its_room() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {file: n for file, n in lengths.items() if n > LONGEST} == {}


def test_every_module_says_what_it_owns() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_importing_daskllm_is_light() -> None:
    """A fresh interpreter that imports daskllm has loaded none of what takes long to load."""
    heavy = ["torch", "numba", "transformers", "distributed", "cupy"]
    code = (
        "import sys, json, daskllm; daskllm.SamplingParams(max_tokens=1);"
        f"print(json.dumps(sorted(set({heavy}) & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


CLIENT = """
import sys

def main():
    from distributed import Client
    import daskllm
    from daskllm import demo

    with daskllm.local_cluster(1, 1) as cluster, Client(cluster) as client:
        llm = daskllm.load(demo.model_path(), client=client, answers=None)
        table = demo.table().head(4)
        assert table.llm.chat(llm, "prompt", max_tokens=8)["generated_error"].isna().all()
        llm.close()
    from daskllm.cli import main as run

    run(["plan", "--model", str(demo.model_path()), "--devices", "2"], standalone_mode=False)
    run(["info", "--model", str(demo.model_path())], standalone_mode=False)
    assert not {"torch", "numba", "llvmlite"} & set(sys.modules)

if __name__ == "__main__":
    main()
"""


@pytest.mark.cluster
def test_who_only_asks_workers_or_plans_imports_no_torch(tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
