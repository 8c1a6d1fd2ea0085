"""What a text gives where nothing is generated: how likely it is, and what it means as a vector.

Plain data that travels from the process that has the model. It refuses to know how it comes about.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Embedding", "Score"]


@dataclass(frozen=True, slots=True)
class Score:
    """How likely the model finds a text.

    Attributes:
        logprob: natural log-probability of all tokens after the first, given those before; NaN on error.
        token_logprobs: the same token by token, one fewer than ``tokens``.
        tokens: tokens of the text, special ones that the tokenizer adds included.
        error: why the row failed, else None.
    """

    logprob: float
    token_logprobs: tuple[float, ...]
    tokens: int
    error: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """A text as a vector: its last hidden states, pooled.

    Attributes:
        vector: float32 ``[hidden]``; NaN on error.
        tokens: tokens of the text, special ones that the tokenizer adds included.
        error: why the row failed, else None.
    """

    vector: npt.NDArray[np.float32]
    tokens: int
    error: str | None = None

    @classmethod
    def of(cls, pooled: npt.NDArray[np.float64], tokens: int, normalize: bool) -> Embedding:
        """The embedding of a text whose hidden states are pooled already.

        Args:
            pooled: ``[hidden]``.
            normalize: divide by the Euclidean length; a vector of length 0 stays.

        >>> Embedding.of(np.array([3.0, 4.0]), 1, normalize=True).vector.tolist()
        [0.6000000238418579, 0.800000011920929]
        """
        length = float(np.linalg.norm(pooled)) if normalize else 1.0
        return cls((pooled / (length or 1.0)).astype(np.float32), tokens)

    @classmethod
    def failed(cls, error: str, hidden: int, tokens: int = 0) -> Embedding:
        """The embedding, ``[hidden]``, of a row that has none."""
        return cls(np.full(hidden, np.nan, np.float32), tokens, error)
