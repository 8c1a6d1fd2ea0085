"""How many sequences run together: as many as still make a token cheaper, by the engine's own clock.

A step costs something whatever is in it, since all weights are read, and something more for each row. So
tokens per second are ``rows / (step + row * rows)``: they grow with the rows at first, and hardly behind the
knee of that curve, where more rows in the batch only take memory and make each of them slower.
"""

from __future__ import annotations

from daskllm.metrics import EngineMetrics, StepCosts

__all__ = ["FIRST", "MOST", "Knee", "knee"]

FIRST, MOST = 64, 512
"""Sequences that run together before anything was measured, and at most."""
_GAIN = 0.05
"""Twice as many rows that bring less than this are not worth it."""
_EVERY = 32  # steps between two looks


class Knee:
    """The knee of one engine's curve.

    Args:
        metrics: the engine's.

    Attributes:
        rows: where it is, as far as is known.
    """

    def __init__(self, metrics: EngineMetrics) -> None:
        self.rows = FIRST
        self._metrics, self._look_at = metrics, _EVERY

    def look(self) -> int:
        """Where it is now: looked up now and then, and moved by no more than a factor of two at a time."""
        if self._metrics.steps >= self._look_at:
            self._look_at = self._metrics.steps + _EVERY
            if (costs := self._metrics.costs()) is not None:
                self.rows = min(max(knee(costs), self.rows // 2), 2 * self.rows)
        return self.rows


def knee(costs: StepCosts) -> int:
    """The fewest rows, of `FIRST` and its doubles, that twice as many would not be worth.

    >>> knee(StepCosts(step=0.010, prefill_token=0.0, decode_token=0.0, row=0.001))
    128
    >>> knee(StepCosts(step=0.010, prefill_token=0.0, decode_token=0.0, row=0.010))
    64
    """
    rows = FIRST
    while rows < MOST and costs.step > _GAIN * (costs.step + 2 * rows * costs.row):
        rows *= 2
    return rows
