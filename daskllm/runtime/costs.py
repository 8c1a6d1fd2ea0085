"""What a row is expected to cost, before anything knows its tokens: from the size of its cells alone.

It refuses to know how rows are cut and dealt by that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from daskllm.runtime.call import Call

__all__ = ["Costs", "costs_of", "prompt_estimates"]

_LIKELY_TOKENS = 128
"""Of an answer that may end by itself, as most do long before a high ``max_tokens``."""
_BYTES_PER_TOKEN = 4
"""Of text in UTF-8. Close for most languages and tokenizers, and needs none of them."""

Costs = npt.NDArray[np.float64]


def costs_of(rows: Sequence[Sequence[Any]], call: Call) -> Costs:
    """About how many tokens each row will take, in and out, float64 ``[rows]``.

    What all rows share (a template's text, ``system``, examples) is left out: it changes no balance.

    Args:
        rows: for each row the cells of ``call.labels``.
    """
    params = call.params
    out = 0
    if call.generates:
        likely = params.max_tokens if params.ignore_eos else min(params.max_tokens, _LIKELY_TOKENS)
        out = params.n * max(likely, params.min_tokens)
    return np.array([1 + out + sum(map(_tokens, row)) for row in rows], dtype="float64")


def prompt_estimates(rows: Sequence[Sequence[Any]], call: Call) -> Costs:
    """About how many tokens each row's prompt has, what all rows share included, float64 ``[rows]``."""
    shared = [*(call.template.parts[::2] if call.template is not None else ()), call.system or ""]
    shared += [text for example in call.examples for text in example]
    common = 1 + sum(map(_tokens, shared))
    return np.array([common + sum(map(_tokens, row)) for row in rows], dtype="float64")


def _tokens(cell: Any) -> int:
    """About how many tokens a cell is: text, token ids, messages; whatever else it is, some number."""
    if isinstance(cell, str):
        size = len(cell) if cell.isascii() else len(cell.encode("utf-8", "surrogatepass"))
        return size // _BYTES_PER_TOKEN
    if isinstance(cell, np.ndarray):
        return sum(map(_tokens, cell.ravel())) if cell.dtype == object else cell.size
    if isinstance(cell, Mapping):
        return sum(map(_tokens, cell.values()))
    return sum(map(_tokens, cell)) if isinstance(cell, Sequence) else 1
