"""``df.llm.explain``: which table and which question are explained.

It refuses to know how (`daskllm.jobs.explain`).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, get_args

import dask.dataframe as dd
import pandas as pd
from dask.dataframe.dask_expr import new_collection

from daskllm.frame.ask import call_over
from daskllm.frame.expr import Answered, asked_of
from daskllm.jobs.explain import explain
from daskllm.jobs.explanation import Explanation
from daskllm.runtime.call import Call, Kind
from daskllm.runtime.cluster import client_for
from daskllm.types import SamplingParams

__all__ = ["explain_table"]


def explain_table(
    table: pd.DataFrame | dd.DataFrame,
    llm: Any,
    prompt: Hashable,
    kind: Kind,
    full: bool,
    seconds: float,
    asked: dict[str, Any],
) -> Explanation:
    """What it would take to answer a table that is to be asked, or one that is a question already.

    Args: as `daskllm.frame.accessor.DaskAccessor.explain` has them.
    """
    if llm is None:
        if prompt is not None or asked:
            raise TypeError("explain of a question to come needs the model first: explain(llm, prompt, ...)")
        if not isinstance(table, dd.DataFrame):
            raise TypeError(
                "a pandas table is answered at once: explain(llm, prompt, ...) says what that takes"
            )
        node = _only_question(table)
        # Whatever comes after the answers, a filter on the input comes before.
        return explain(new_collection(node.frame), node.call, client_for(None), full=full, seconds=seconds)
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, not {kind!r}")
    call = _question(table, llm, prompt, kind, asked)
    below = new_collection(asked_of(table.expr, call)) if isinstance(table, dd.DataFrame) else table
    return explain(below, call, client_for(getattr(llm, "client", None)), full=full, seconds=seconds)


def _question(
    table: pd.DataFrame | dd.DataFrame, llm: Any, prompt: Hashable, kind: Kind, asked: dict[str, Any]
) -> Call:
    if prompt is None:
        raise TypeError("explain needs what is asked: a column or a template")
    fields = set(SamplingParams.__dataclass_fields__)
    sampling = {name: value for name, value in asked.items() if name in fields}
    options = {name: value for name, value in asked.items() if name not in fields}
    known = {"output", "system", "examples", "model_version", "pooling", "normalize"}
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"explain has no argument {unknown[0]!r}")
    return call_over(
        table.columns, llm, kind, prompt, sampling=sampling, **({"output": "generated"} | options)
    )


def _only_question(table: dd.DataFrame) -> Answered:
    nodes = {node._name: node for node in table.expr.simplify().walk() if isinstance(node, Answered)}
    if not nodes:
        raise ValueError("the table has no answers to come: explain what df.llm.generate and its like return")
    if len(nodes) > 1:
        outputs = ", ".join(sorted(repr(node.call.output) for node in nodes.values()))
        raise ValueError(f"the table has several columns of answers to come ({outputs}): explain each alone")
    return next(iter(nodes.values()))
