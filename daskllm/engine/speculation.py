"""Whether tokens are guessed, so that a step yields more than one of a sequence, and which.

A guess is run behind the sequence's last token in the same step and verified there: what the model chooses
after each token is kept as far as the guess was right, so that the output is what it would have been
(Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, for greedy choice). It costs a row for each guessed
token, and gains a share of a whole step for each that is right: much for a sequence that runs alone, nothing
where many share a step. Both are told by the engine's own metrics. It refuses to know how steps are run, and
is for kernels that give a row the same bits whatever is beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from daskllm.engine.lookup import Lookup
from daskllm.engine.sequence import SequenceState
from daskllm.engine.sizes import TILE
from daskllm.metrics import EngineMetrics, StepCosts

__all__ = ["Speculation"]

_MOST = TILE - 1
"""Tokens of a guess: with the one before them, they read keys together."""
_ASK_COSTS = 32  # steps between two looks at what steps cost
_TRY_AGAIN = 32  # tokens between two guesses of a sequence whose guesses do not pay
_TRIAL = 2  # tokens of such a guess
_LEAST_COST = 0.02
"""Of a guessed token, as a share of what a step costs in any case: what the measurement may be wrong by."""
_FORGET = 0.98
_FIRST_RATE, _FIRST_TOKENS = 0.3, 16.0  # what is expected before anything was tried, and how firmly


class Speculation:
    """The guesses of one engine.

    Args:
        metrics: the engine's.
        context: positions that a sequence can have.
    """

    def __init__(self, metrics: EngineMetrics, context: int) -> None:
        self._metrics, self._context = metrics, context
        self._costs: StepCosts | None = None
        self._ask_at = 0
        self._drafted, self._right = _FIRST_TOKENS, _FIRST_RATE * _FIRST_TOKENS

    def draft(self, sequence: SequenceState, running: int, most: int) -> Sequence[int]:
        """Tokens to be tried behind the last one of a sequence that decodes; none where that does not pay.

        Args:
            running: sequences in the step.
            most: tokens that there is room for.
        """
        if not sequence.takes_likeliest:
            return ()
        left = min(
            sequence.request.params.max_tokens - sequence.produced, self._context - len(sequence.tokens)
        )
        most = min(most, _MOST, left - 1)
        if most < 1:
            return ()
        lookup = sequence.lookup = sequence.lookup or Lookup()
        if not self._pays(lookup, running):
            lookup.passed += 1
            if lookup.passed < _TRY_AGAIN:
                return ()
            lookup.passed = 0
            most = min(most, _TRIAL)
        return lookup.find(sequence.tokens, min(most, lookup.width))

    def fared(self, sequence: SequenceState, drafted: int, right: int) -> None:
        """Note how many tokens of a draft were right, from the first on."""
        self._metrics.drafted_tokens += drafted
        self._metrics.accepted_tokens += right
        self._drafted = _FORGET * self._drafted + drafted
        self._right = _FORGET * self._right + right
        if sequence.lookup is not None:
            sequence.lookup.fared(drafted, right)

    def _pays(self, lookup: Lookup, running: int) -> bool:
        """Whether the tokens that are won would have cost more than those that are tried."""
        if self._metrics.steps >= self._ask_at:
            self._costs, self._ask_at = self._metrics.costs(), self._metrics.steps + _ASK_COSTS
        costs = self._costs
        if costs is None:
            return False
        row = max(costs.row, _LEAST_COST * costs.step)
        return lookup.rate(self._right / self._drafted) * (costs.step / running + row) > row
