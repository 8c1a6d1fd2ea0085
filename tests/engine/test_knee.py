from __future__ import annotations

import itertools

import pytest

from daskllm.engine.knee import FIRST, MOST, Knee, knee
from daskllm.metrics import EngineMetrics, StepCosts, StepRecord


def run(metrics: EngineMetrics, at: Knee, step: float, row: float, steps: int) -> list[int]:
    """What an engine finds whose steps cost this, and whose batch is as wide as it may be or half of it."""
    found = []
    for i in range(steps):
        rows = at.look() // (1 + i % 2)
        metrics.record(StepRecord(0.0, step + row * rows, 0, rows, rows, 0, 1, 1))
        found.append(at.rows)
    return found


@pytest.mark.parametrize(("row", "expected"), [(0.0006, 256), (0.0001, MOST), (0.01, FIRST), (0.0, MOST)])
def test_the_batch_grows_to_the_knee_and_stays(row: float, expected: int) -> None:
    metrics = EngineMetrics()
    found = run(metrics, Knee(metrics), 0.012, row, 300)
    assert found[0] == FIRST
    assert found[-1] == expected
    assert all(after <= 2 * before for before, after in itertools.pairwise(found))


def test_it_shrinks_when_rows_become_dearer() -> None:
    metrics = EngineMetrics()
    at = Knee(metrics)
    run(metrics, at, 0.012, 0.0001, 300)
    assert run(metrics, at, 0.001, 0.01, 8000)[-1] == FIRST


def test_twice_the_knee_gains_less_than_a_twentieth() -> None:
    costs = StepCosts(step=0.012, prefill_token=0.0, decode_token=0.0, row=0.0006)
    rows = knee(costs)

    def rate(n: int) -> float:
        return n / (costs.step + n * costs.row)

    assert rate(2 * rows) < 1.05 * rate(rows)
    assert rate(rows) >= 1.05 * rate(rows // 2)
