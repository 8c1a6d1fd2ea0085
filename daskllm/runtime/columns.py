"""Answers as the columns of a table: their names and dtypes, the same for every partition and for none.

==========================  ===========================  ====================================================
column                      dtype                        value
==========================  ===========================  ====================================================
{output}                    str                          the text; null where the row failed
{output}_finish_reason      str                          "stop", "length" or "error"
{output}_prompt_tokens      int64                        tokens of the prompt
{output}_completion_tokens  int64                        generated tokens
{output}_error              str                          why the row failed, else null
{output}_logprobs           object                       with ``logprobs=`` only: the chosen tokens' natural
                                                         log-probabilities, a list of float; null on failure
{output}_model_version      int64                        with ``model_version=True`` only: how many updates of
                                                         the model came before the weights that answered
==========================  ===========================  ====================================================

With ``n > 1`` a row has n samples: the text, the finish reason and the log-probabilities are lists with one
entry per sample (dtype object); the completion tokens are summed over them, the prompt's tokens counted once
(the samples share one prefill).

Where nothing is generated, the columns are:

===================  =========================  ==========================================================
column               dtype                      value
===================  =========================  ==========================================================
{output}             float64 of a score         natural log-probability of the text; NaN on failure
{output}             object of an embedding     a float32 array [hidden] in every row; null on failure
{output}_tokens      int64                      tokens of the text
{output}_error       str                        why the row failed, else null
===================  =========================  ==========================================================

Dask's ``to_parquet`` cannot tell what is in a column of dtype object: for embeddings, with ``n > 1`` and with
``logprobs=`` give it ``schema=None``, or a whole `pyarrow.Schema` (an embedding is a
``pyarrow.list_(pyarrow.float32())``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from daskllm.runtime.call import Call
from daskllm.types import Completion

if TYPE_CHECKING:
    from daskllm.results import Embedding, Score

__all__ = ["attach", "cells", "columns_of", "labels_of", "names"]

# The dtype that pandas 3 infers for text.
TEXT = pd.StringDtype(na_value=np.nan)

Columns = dict[str, Any]


def names(call: Call) -> tuple[str, ...]:
    """The columns that a call adds, in order."""
    ends = ["_tokens", "_error"]
    if call.generates:
        ends = ["_finish_reason", "_prompt_tokens", "_completion_tokens", "_error"]
        if call.params.logprobs is not None:
            ends.append("_logprobs")
        if call.model_version:
            ends.append("_model_version")
    return (call.output, *(call.output + end for end in ends))


def labels_of(added: Sequence[str], columns: pd.Index) -> list[Hashable]:
    """The labels of added columns: the names; where ``columns`` has levels, tuples filled up with ""."""
    if columns.nlevels == 1:
        return list(added)
    return [(name, *[""] * (columns.nlevels - 1)) for name in added]


def columns_of(answers: Sequence[Any], call: Call) -> Columns:
    """The columns that a call adds; one answer per row, as `daskllm.runtime.tasks.answer_rows` gives them."""
    return _completion_columns(answers, call) if call.generates else _reading_columns(answers, call)


def _completion_columns(rows: Sequence[Sequence[Completion]], call: Call) -> Columns:
    params = call.params
    one = params.n == 1
    errors = [next((c.error for c in samples if c.error is not None), None) for samples in rows]

    def each(value: Callable[[Completion], Any], *, null: bool) -> list[Any]:
        return [
            None
            if null and error is not None
            else value(samples[0])
            if one
            else [value(sample) for sample in samples]
            for samples, error in zip(rows, errors, strict=True)
        ]

    text = _text if one else _objects
    columns: tuple[Any, ...] = (
        text(each(lambda c: c.text, null=True)),
        text(each(lambda c: c.finish_reason, null=False)),
        np.array([samples[0].prompt_tokens for samples in rows], dtype="int64"),
        np.array([sum(c.completion_tokens for c in samples) for samples in rows], dtype="int64"),
        _text(errors),
    )
    if params.logprobs is not None:
        columns = (*columns, _objects(each(_chosen_logprobs, null=True)))
    if call.model_version:
        columns = (*columns, np.array([samples[0].model_version for samples in rows], dtype="int64"))
    return dict(zip(names(call), columns, strict=True))


def _reading_columns(answers: Sequence[Any], call: Call) -> Columns:
    columns = (
        _vectors(answers) if call.kind == "embed" else _logprobs(answers),
        np.array([answer.tokens for answer in answers], dtype="int64"),
        _text([answer.error for answer in answers]),
    )
    return dict(zip(names(call), columns, strict=True))


def _logprobs(scores: Sequence[Score]) -> np.ndarray:
    return np.array([np.nan if s.error is not None else s.logprob for s in scores], dtype="float64")


def _vectors(embeddings: Sequence[Embedding]) -> np.ndarray:
    return _objects([None if e.error is not None else e.vector for e in embeddings])


def cells(table: pd.DataFrame, labels: Sequence[Hashable]) -> list[tuple[Any, ...]]:
    """For every row its cells under ``labels``, as Python's own types where pandas has them."""
    if not labels:
        return [()] * len(table)
    return list(zip(*(table[label].tolist() for label in labels), strict=True))


def attach(table: pd.DataFrame, columns: Columns) -> pd.DataFrame:
    """A shallow copy of ``table`` with columns added on the right; index and other columns are untouched."""
    out = table.copy(deep=False)
    for label, values in zip(labels_of(tuple(columns), table.columns), columns.values(), strict=True):
        out[label] = pd.Series(values, index=table.index)
    return out


def _chosen_logprobs(completion: Completion) -> list[float]:
    return [token.logprob for token in completion.logprobs or ()]


def _text(values: list[str | None]) -> Any:
    # A message may quote a cell's lone surrogate, which no column of text can hold.
    whole = [v if v is None else v.encode("utf-8", "backslashreplace").decode() for v in values]
    return pd.array(whole, dtype=TEXT)  # type: ignore[call-overload]


def _objects(values: list[Any]) -> np.ndarray:
    # Filled one by one: numpy would make a matrix of lists of equal lengths.
    out = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        out[i] = value
    return out
