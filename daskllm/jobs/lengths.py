"""How long answers are, while some are still being written, and how that goes with their prompts' lengths.

Short answers end first, so that the mean of those that ended is too small for as long as there are few of
them. `Lengths` is the product-limit estimate (Kaplan and Meier 1958), which counts an unfinished answer for
what is known of it: that it is longer than what there is. `Trend` is for tables whose rows get longer or
shorter on the way: translations, summaries, whatever writes more the more it has read; and for prompts, which
have some tokens of their template and more the larger their row is.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable

__all__ = ["Lengths", "Trend"]

_DOUBT = 4.0
"""Times what chance explains of a line is taken off: below two standard errors there is none."""

_FURTHEST = 3.0
"""Times the mean, at most: a line through what was seen says little of what is far from it."""


class Lengths:
    """Lengths of answers in tokens, as far as they are known.

    Args:
        ended: length -> how many ended with it.
        under_way: so many tokens each unfinished one has.
        most: that there may be.

    Example:
        >>> Lengths({4: 2, 8: 2}, [], most=16).mean
        6.0
        >>> Lengths({4: 2}, [4, 4], most=8).mean  # half go on, for as long as the others took
        6.0
    """

    def __init__(self, ended: Counter[int] | dict[int, int], under_way: Iterable[int], most: int) -> None:
        self._most = float(most)
        waiting = Counter(under_way)
        known = sum(ended.values())
        at_risk = known + sum(waiting.values())
        time_at_risk = sum(t * n for t, n in ended.items()) + sum(t * n for t, n in waiting.items())
        # Where nobody has got to, answers end as often as anywhere.
        self._scale = time_at_risk / known if known else self._most
        self._times, self._alive, self._area = [0.0], [1.0], [0.0]
        for time in sorted({*ended, *waiting}):
            alive = self._alive[-1]
            self._area.append(self._area[-1] + alive * (time - self._times[-1]))
            self._times.append(float(time))
            self._alive.append(alive * (1 - ended.get(time, 0) / at_risk))
            at_risk -= ended.get(time, 0) + waiting[time]

    @property
    def mean(self) -> float:
        """Of all answers, those that have not begun included."""
        return self._area[-1] + self._tail()

    def rest(self, length: float) -> float:
        """How many tokens are still to come of an answer that has so many."""
        i = bisect.bisect_right(self._times, length) - 1
        alive = self._alive[i]
        if alive <= 1e-9:  # it is the longest of all so far
            return min(self._scale, max(0.0, self._most - length))
        before = self._area[i] + alive * (length - self._times[i])
        left = (self._area[-1] - before + self._tail()) / alive if i + 1 < len(self._times) else self._scale
        return min(left, max(0.0, self._most - length))

    def _tail(self) -> float:
        """What is to come after the longest length that was seen."""
        return self._alive[-1] * min(self._scale, max(0.0, self._most - self._times[-1]))


class Trend:
    """How one length goes with another, answers' with their prompts', by a line through groups of rows.

    Example:
        >>> trend = Trend()
        >>> for prompt in (10, 20, 30, 40):
        ...     trend.add(rows=5, given=5 * prompt, found=5 * (10 + prompt // 2))
        >>> round(trend.factor(45), 2)  # an answer of 32.5 tokens, where they had 22.5
        1.44
        >>> round(trend.found(45), 1)
        32.5
    """

    def __init__(self) -> None:
        self._groups = 0
        self._sums: tuple[float, ...] = (0.0,) * 6

    def add(self, rows: int, given: int, found: int) -> None:
        """Note that so many rows have so much of both lengths in all."""
        if rows < 1:
            return
        x, y = given / rows, found / rows
        self._groups += 1
        new = (rows, given, found, given * x, found * y, given * y)
        self._sums = tuple(a + b for a, b in zip(self._sums, new, strict=True))

    def factor(self, given: float) -> float:
        """Times the mean what a row has whose given length this is; 1 as far as that is chance."""
        rise, sure = self._line(given)
        return min(_FURTHEST, max(1 / _FURTHEST, 1 + sure * rise))

    def found(self, given: float) -> float:
        """What a row has whose given length this is: some part that all have, the rest in proportion.

        All of it in proportion as far as the line is chance.
        """
        n, x, y, *_ = self._sums
        if not x or not y:
            return given
        rise, sure = self._line(given)
        times = given * n / x
        return y / n * min(max(1.0, times), max(min(1.0, times), times + sure * (1 + rise - times)))

    def _line(self, given: float) -> tuple[float, float]:
        """By what part of the mean the line is above it, and how far it is to be believed.

        It counts for as much as it explains beyond what a line through so many groups does by chance.
        """
        n, x, y, xx, yy, xy = self._sums
        if self._groups < 4 or not y:
            return 0.0, 0.0
        spread, height, slope = xx - x * x / n, yy - y * y / n, xy - x * y / n
        if spread <= 1e-9 * xx or height <= 1e-9 * yy:
            return 0.0, 0.0
        explained = min(1.0, slope * slope / (spread * height))
        chance = _DOUBT * (1 - explained) / (self._groups - 2)
        sure = max(0.0, 1 - chance / explained) if explained else 0.0
        return slope / spread * (given - x / n) / (y / n), sure
