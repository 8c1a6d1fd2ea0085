"""How long answers are, while some are still being written.

Short answers end first, so that the mean of those that ended is too small for as long as there are few of
them. This is the product-limit estimate (Kaplan and Meier 1958), which counts an unfinished answer for what
is known of it: that it is longer than what there is.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable

__all__ = ["Lengths"]


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
