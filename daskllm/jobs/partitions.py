"""What prompts are like in partitions that nobody has read yet, from those that were.

A table is often sorted, or drifts, and Dask takes its partitions in an order of its own: often from the end.
So what is not read goes by what lies next to it, as far as neighbours are more alike than any two.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from daskllm.runtime.progress import Increment

__all__ = ["Partitions", "along"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Partitions:
    """Takes a table's increments, and tells of its partitions that are not done.

    To take one costs the same however many partitions there are; `size` and `computed` go over all of them
    when they are asked for after news. A partition that was lost is cut and answered again, and counts once.

    Args:
        numbers: of all partitions; none where nobody knows.

    Attributes:
        cuts: how many partitions were cut, of all jobs together.
        cut_rows, cut_tokens: the rows of those, and about how many tokens their prompts have.
        answered: rows answered, of a partition at most those that it has.

    Example:
        >>> partitions = Partitions(range(10))
        >>> for part in (9, 8, 7, 2, 0):
        ...     partitions.take(Increment(job="chat", part=part, cut_rows=10, cut_tokens=100 + 100 * part))
        >>> round(partitions.size, 1)  # those that were read have 62, the others, were it known, 50
        54.5
    """

    def __init__(self, numbers: Collection[int] = ()) -> None:
        self._numbers: Ints = np.array(sorted(numbers), np.int64)
        # Of each partition its rows and the estimate of their prompts; what was answered, read and reused.
        self._jobs: dict[str, Ints] = {}
        self.cuts = self.cut_rows = self.cut_tokens = self.answered = 0
        self._news = False
        self._told = 0.0, 1.0

    def take(self, new: Increment) -> None:
        """Take one event."""
        figures = self._figures(new.job, new.part)[:, new.part]
        self._count(figures, -1)
        if new.cut_rows:  # set, not added: a cut that was lost runs again
            figures[:2] = new.cut_rows, new.cut_tokens
        figures[2:] += (new.rows, new.prompt_tokens, new.reused_tokens)
        self._count(figures, +1)
        self._news = True

    @property
    def size(self) -> float:
        """Estimated tokens of a prompt where nothing was read yet, on average."""
        return self._tell()[0]

    @property
    def computed(self) -> float:
        """What part of the prompts' tokens that are still to come has to be computed."""
        return self._tell()[1]

    def _count(self, figures: Ints, sign: int) -> None:
        """Add a partition's figures to those of all, or take them away."""
        rows, estimate, answered = (int(figure) for figure in figures[:3])
        self.cuts += sign * (rows > 0)
        self.cut_rows += sign * rows
        self.cut_tokens += sign * estimate
        self.answered += sign * (min(answered, rows) if rows else answered)

    def _figures(self, job: str, part: int) -> Ints:
        """Of a job int64 ``[5, numbers]``, with room for that partition."""
        figures = self._jobs.get(job)
        if figures is None:
            room = max(part, int(self._numbers[-1]) if len(self._numbers) else 0) + 1
            figures = self._jobs[job] = np.zeros((5, room), np.int64)
        elif part >= figures.shape[1]:
            figures = self._jobs[job] = np.pad(figures, ((0, 0), (0, 2 * part + 1 - figures.shape[1])))
        return figures

    def _tell(self) -> tuple[float, float]:
        if not self._news:
            return self._told
        self._news = False
        total = sum((figures.sum(axis=1) for figures in self._jobs.values()), np.zeros(5, np.int64))
        mean, share = float(total[1] / max(1, total[0])), float(total[4] / max(1, total[3]))
        unread, left, again = [], 0.0, 0.0
        for figures in self._jobs.values():
            rows, estimate, answered, read, reused = figures
            done = (rows > 0) & (rows <= answered)
            cut, computed = np.flatnonzero(rows), np.flatnonzero(done & (read > 0))
            to_come = self._numbers[~done[self._numbers]]
            size = along(cut, estimate[cut] / rows[cut], to_come, mean)
            unread.append(size[rows[to_come] == 0])
            left += float(size.sum())
            again += float(size @ along(computed, reused[computed] / read[computed], to_come, share))
        sizes = np.concatenate(unread)
        self._told = float(sizes.mean()) if len(sizes) else mean, 1 - (again / left if left else share)
        return self._told


def along(at: Ints, known: Floats, wanted: Ints, mean: float) -> Floats:
    """Some figure of partitions, from those that are known: float64 ``[wanted]``.

    Args:
        at: the numbers of those that are known, ascending.
        known: their figures, ``[at]``.
        mean: of the figure, for those that have nothing to do with their neighbours.

    >>> at, known = np.array([0, 1, 2, 3, 4, 6]), np.array([1.0, 2.0, 3.0, 4.0, 5.0, 7.0])
    >>> along(at, known, np.array([2, 5, 9]), mean=3.7).round(1).tolist()
    [3.0, 5.3, 6.0]
    """
    if not len(at):
        return np.full(len(wanted), mean)
    near, alike = np.interp(wanted, at, known), 0.0
    if len(at) >= 3:
        spread = float(np.var(known, ddof=1))
        # Half the square of a step between neighbours is the spread of those that have nothing in common (von
        # Neumann 1941); by chance it is off by a part that falls with the root of how many there are.
        apart = float(np.mean(np.diff(known) ** 2)) / 2 / spread if spread else 0.0
        alike = max(0.0, 1 - apart * (1 + 2 / len(at) ** 0.5))
    return np.where(np.isin(wanted, at), near, mean + alike * (near - mean))
