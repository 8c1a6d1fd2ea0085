"""The small form of the benchmark that kills a job's workers, its client and its scheduler."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def measured(*command: object) -> dict[str, Any]:
    """What a benchmark prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=BENCHMARKS.parents[1],
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


@pytest.mark.cluster
@pytest.mark.slow
def test_workers_client_and_scheduler_die_and_no_row_is_lost() -> None:
    found = measured(BENCHMARKS / "chaos.py", "--rows", 600, "--every", 4, "--limit", 300)
    assert {name: found[name] for name in ("lost", "doubled", "changed", "out_of_place")} == {
        "lost": 0, "doubled": 0, "changed": 0, "out_of_place": 0,
    }  # fmt: skip
    disturbed = found["disturbed"]
    assert (disturbed["rows_said"], disturbed["errors"]) == (600, 0)
    # Each of the faults has happened, and each process was started again.
    assert min(disturbed["kills"].values()) >= 1
    assert disturbed["starts"]["scheduler"] == 2
    assert disturbed["starts"]["client"] >= 3
    assert disturbed["starts"]["workers"] > 2
    assert disturbed["rows_generated"] >= 600
