"""How many rows may fail before a job stops.

It owns the arguments ``on_error`` and ``max_errors`` and what they mean. It refuses to know what runs.
"""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

from daskllm.jobs.manifest import Part, total
from daskllm.types import JobError, RowError

__all__ = ["Limit", "OnError", "check_on_error"]

OnError: TypeAlias = Literal["raise", "keep", "drop"]
FEWEST_ROWS = 100
"""A share of fewer rows tells little: one that fails among the first ten is no sign of a tenth."""


def check_on_error(on_error: Any) -> None:
    """Refuse what is none of the three (ValueError)."""
    if on_error not in get_args(OnError):
        raise ValueError(f'on_error must be "raise", "keep" or "drop", not {on_error!r}')


class Limit:
    """The most rows that may fail.

    Args:
        most: a number of rows (int), a share of those that are done (float, 0 to 1, looked at from
            `FEWEST_ROWS` on and at the end), or None for any number.

    Raises:
        TypeError, ValueError: another value.

    Example:
        >>> Limit(0.2).exceeded(3, 10, at_end=False), Limit(0.2).exceeded(3, 10, at_end=True)
        (False, True)
    """

    def __init__(self, most: Any) -> None:
        wanted = f"max_errors must be a number of rows, a share between 0.0 and 1.0, or None, not {most!r}"
        if most is not None and (isinstance(most, bool) or not isinstance(most, Real)):
            raise TypeError(wanted)
        if most is not None and (most < 0 or (not isinstance(most, Integral) and not most <= 1)):
            raise ValueError(wanted)
        self._most: Any = int(most) if isinstance(most, Integral) else most

    def exceeded(self, errors: int, rows: int, *, at_end: bool) -> bool:
        """Whether so many of so many rows are too many."""
        if self._most is None or not errors:
            return False
        if isinstance(self._most, int):
            return errors > self._most
        return (at_end or rows >= FEWEST_ROWS) and errors > self._most * rows

    def check(self, done: Collection[Part], on_error: str, *, at_end: bool) -> None:
        """Stop where too many rows failed.

        Raises:
            JobError: more than the limit.
            RowError: any, where one is to end the job.
        """
        sums = total(done)
        errors = sums["errors"]
        bad = next((part for part in done if part.errors), None)
        if bad is None:
            return
        example = f"the first of part {bad.number}: {bad.why}" if bad.why else f"some in part {bad.number}"
        if on_error == "raise":
            raise RowError(f"{errors} rows of the parts that are there failed; {example}")
        # Dropped rows are in no part's rows.
        rows = sums["rows"] + (errors if on_error == "drop" else 0)
        if self.exceeded(errors, rows, at_end=at_end):
            raise JobError(
                f"{errors} of {rows} rows failed, and max_errors is {self._most}; {example}. What was "
                "finished stays; retry_errors=True asks the failed rows again"
            )
