"""What may come next in a sequence by what came before: where its last tokens stood in it already.

It owns one sequence's n-grams and how guesses from them have fared. It refuses to know what a guess costs and
whether one is made (`speculation`).
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Lookup"]

_NGRAMS = (3, 2)
"""Tokens that must be the same, the longest tried first."""
_FORGET = 0.8
"""What an earlier guess counts against the next."""
_PRIOR_TOKENS = 8.0
"""So many guessed tokens count as much as what other sequences have seen."""


class Lookup:
    """One sequence's guesses (Saxena 2023, prompt lookup decoding; Yang et al. 2023,
    https://arxiv.org/abs/2304.04487).

    Attributes:
        width: tokens that are guessed at most, by how the last guess fared.
        passed: how often no guess was made since the last one.

    Example:
        >>> lookup = Lookup()
        >>> lookup.find([1, 2, 3, 4, 5, 1, 2], 3)
        [3, 4, 5]
        >>> lookup.find([1, 2, 3, 4, 5, 1, 2, 9, 9, 9], 4)
        [9, 9, 9, 9]
    """

    __slots__ = ("_behind", "_drafted", "_right", "_seen", "passed", "width")

    def __init__(self) -> None:
        self.width, self.passed = 3, 0
        self._behind: dict[tuple[int, ...], int] = {}  # n-gram -> the place behind its latest occurrence
        self._seen = 0
        self._drafted = self._right = 0.0

    def find(self, tokens: Sequence[int], count: int) -> list[int]:
        """The ``count`` tokens that followed when the last ones stood here before; none if they never did.

        What follows up to the end follows again behind it.

        Args:
            tokens: those of the call before, and more.
        """
        for place in range(max(1, self._seen), len(tokens)):
            for size in _NGRAMS:
                if size <= place:
                    self._behind[tuple(tokens[place - size : place])] = place
        self._seen = len(tokens)
        for size in _NGRAMS:
            at = self._behind.get(tuple(tokens[-size:]))
            if at is not None:
                found = list(tokens[at : at + count])
                repeated = len(found)
                return [found[i % repeated] for i in range(count)]
        return []

    def fared(self, drafted: int, right: int) -> None:
        """Note how many tokens of a guess were right, from the first on."""
        self._drafted = _FORGET * self._drafted + drafted
        self._right = _FORGET * self._right + right
        self.width = 2 * self.width + 1 if right == drafted else right + 1
        self.passed = 0

    def rate(self, others: float) -> float:
        """The share of guessed tokens that is right, of late; ``others`` is that of all sequences."""
        return (self._right + _PRIOR_TOKENS * others) / (self._drafted + _PRIOR_TOKENS)
