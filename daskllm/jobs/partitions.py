"""What prompts are like in partitions that nobody has read yet, from those that were.

A table is often sorted, or drifts, and Dask takes its partitions in an order of its own: often from the end.
So what is not read goes by what lies next to it, as far as neighbours are more alike than any two.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from daskllm.runtime.progress import Increment

__all__ = ["Partitions", "along"]

_NEWS = 1 / 64
"""So much more must be known before all is told anew: a table may have 100,000 partitions."""


@dataclass(slots=True)
class _Part:
    """Of one partition its rows and the estimate of their prompts; what was answered and read of them."""

    rows: int = 0
    estimate: int = 0
    answered: int = 0
    read: int = 0
    reused: int = 0

    @property
    def done(self) -> bool:
        return 0 < self.rows <= self.answered


class Partitions:
    """Takes a table's increments, and tells of its partitions that are not done.

    Args:
        numbers: of all partitions; none where nobody knows.

    Attributes:
        size: estimated tokens of a prompt where nothing was read yet, on average.
        computed: what part of the prompts' tokens that are still to come has to be computed.

    Example:
        >>> partitions = Partitions(range(10))
        >>> for part in (9, 8, 7, 2, 0):
        ...     partitions.take(Increment(job="chat", part=part, cut_rows=10, cut_tokens=100 + 100 * part))
        >>> round(partitions.size, 1)  # those that were read have 62, the others, were it known, 50
        54.5
    """

    def __init__(self, numbers: Collection[int] = ()) -> None:
        self._numbers = frozenset(numbers)
        self._jobs: dict[str, dict[int, _Part]] = {}
        self._news = self._told = 0
        self.size, self.computed = 0.0, 1.0

    def take(self, new: Increment) -> None:
        """Take one event."""
        part = self._jobs.setdefault(new.job, {}).setdefault(new.part, _Part())
        part.rows += new.cut_rows
        part.estimate += new.cut_tokens
        part.answered += new.rows
        part.read += new.prompt_tokens
        part.reused += new.reused_tokens
        self._news += new.cut_rows + new.rows
        if self._news > self._told * (1 + _NEWS):
            self._told = self._news
            self._tell()

    def _tell(self) -> None:
        every = [part for job in self._jobs.values() for part in job.values()]
        rows, read = sum(part.rows for part in every), sum(part.read for part in every)
        mean = sum(part.estimate for part in every) / max(1, rows)
        share = sum(part.reused for part in every) / max(1, read)
        unread, left, again = [], 0.0, 0.0
        for job in self._jobs.values():
            sizes = {number: part.estimate / part.rows for number, part in job.items() if part.rows}
            done = {number: part for number, part in job.items() if part.done}
            reused = {number: part.reused / part.read for number, part in done.items() if part.read}
            to_come = list(self._numbers.difference(done))
            size = along(sizes, to_come, mean)
            unread += [one for number, one in zip(to_come, size.tolist(), strict=True) if number not in sizes]
            left += float(size.sum())
            again += float(size @ along(reused, to_come, share))
        self.size = float(np.mean(unread)) if unread else mean
        self.computed = 1 - (again / left if left else share)


def along(known: Mapping[int, float], wanted: Sequence[int], mean: float) -> npt.NDArray[np.float64]:
    """Some figure of partitions, from those that are known: float64 ``[wanted]``.

    Args:
        mean: of the figure, for those that have nothing to do with their neighbours.

    >>> along({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0, 6: 7.0}, [2, 5, 9], mean=3.7).round(1).tolist()
    [3.0, 5.3, 6.0]
    """
    if len(known) < 3 or not wanted:
        return np.array([known.get(number, mean) for number in wanted])
    at, figures = np.array(sorted(known.items())).T
    spread = float(np.var(figures, ddof=1))
    # Half the square of a step between neighbours is the spread of those that have nothing in common (von
    # Neumann 1941); by chance it is off by a part that falls with the root of how many there are.
    apart = float(np.mean(np.diff(figures) ** 2)) / 2 / spread if spread else 0.0
    alike = max(0.0, 1 - apart * (1 + 2 / len(at) ** 0.5))
    between = mean + alike * (np.interp(wanted, at, figures) - mean)
    return np.where(np.isin(wanted, at), np.interp(wanted, at, figures), between)
