"""From a user's arguments to a `Call`, and from a call to a table: every error of a call is raised here.

It refuses to know how a Dask expression is optimised and what runs in a task.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import dask.dataframe as dd
import pandas as pd
from dask.dataframe.dask_expr import new_collection

from daskllm.frame.expr import answered
from daskllm.runtime.call import Call, Kind, draw_seed
from daskllm.runtime.cluster import client_for, over_rows
from daskllm.runtime.columns import attach, cells, columns_of, labels_of, names
from daskllm.runtime.tasks import answer_rows
from daskllm.text.prompt import checked_examples
from daskllm.text.template import PromptTemplate
from daskllm.types import SamplingParams

if TYPE_CHECKING:
    from daskllm.session import Session
    from daskllm.types import ModelSpec, Pooling

__all__ = ["Handle", "ask_series", "ask_table", "call_over", "check_chats"]

Table = TypeVar("Table", pd.DataFrame, dd.DataFrame)


class Handle(Protocol):
    """What the tables need of a model.

    It may also have a ``client``, whose workers answer pandas tables, a ``tokenizer``, which tells before any
    work whether the model chats, and ``answers``, where finished rows are kept.
    """

    @property
    def spec(self) -> ModelSpec: ...

    def session(self) -> Session: ...


def ask_table(table: Table, llm: Handle, call: Call) -> Table:
    """``table`` with the call's columns; a Dask table is not computed."""
    _check_output(call, table.columns)
    if isinstance(table, dd.DataFrame):
        return new_collection(answered(table.expr, call))
    client = client_for(getattr(llm, "client", None))
    answers = over_rows(client, answer_rows, cells(table, call.labels), call)
    return attach(table, columns_of(answers, call))


def ask_series(
    series: Any, llm: Handle, kind: Kind, output: str, sampling: Mapping[str, Any], **options: Any
) -> Any:
    """A Series' answers alone, as a frame with the same index; a Dask Series is not computed.

    Args:
        options: as `call_over` takes them.
    """
    # Within the call the one column has a name of its own, which no output can clash with.
    table = series.to_frame(name="prompt text")
    call = call_over(table.columns, llm, kind, "prompt text", output=output, sampling=sampling, **options)
    call = replace(call, template=None)  # its cells are prompts, as a list's items are: token ids too
    return ask_table(table, llm, call)[list(names(call))]


def call_over(
    columns: pd.Index,
    llm: Handle,
    kind: Kind,
    prompt: Hashable,
    *,
    output: str,
    system: str | None = None,
    examples: Any = None,
    sampling: Mapping[str, Any],
    pooling: Pooling = "mean",
    normalize: bool = True,
    model_version: bool = False,
) -> Call:
    """The call that a user's arguments make over a table with these columns.

    Raises:
        TypeError: ``llm`` is no model, ``output`` or ``system`` no str, an unknown or mistyped argument.
        KeyError: ``prompt`` names a column that is not there.
        ValueError: a template that is none, a used column that is there twice, a value out of its range, a
            chat with a model that has no chat template.
    """
    params = SamplingParams.of(sampling)
    template, labels = _template(prompt, columns, "messages" if kind == "chat" else "prompt")
    if system is not None and not isinstance(system, str):
        raise TypeError(f"system must be text or None, not {system!r}")
    if not isinstance(output, str):
        raise TypeError(f"output must be the name of a column, not {output!r}")
    spec = _spec(llm)
    if kind == "chat":
        check_chats(llm)
    whole_column = kind == "chat" and template.parts[::2] == ("", "") and len(labels) == 1
    return Call(
        spec=spec,
        kind=kind,
        params=params,
        pooling=pooling,
        normalize=normalize,
        job_seed=draw_seed(params),
        labels=labels,
        template=None if whole_column else template,
        system=system,
        examples=checked_examples(examples, template),
        output=output,
        model_version=model_version,
        answers=getattr(llm, "answers", None),
    )


def check_chats(llm: Any) -> None:
    """Refuse a model that is known to have no chat template.

    Raises:
        ValueError: its tokenizer has none.
    """
    tokenizer = getattr(llm, "tokenizer", None)
    if tokenizer is not None and not tokenizer.has_chat_template:
        raise ValueError(f"the model {llm.spec.path} has no chat template: use generate, with a prompt")


def _spec(llm: Any) -> Any:
    spec = getattr(llm, "spec", None)
    if spec is None or not callable(getattr(llm, "session", None)):
        raise TypeError(f"llm must be a model from daskllm.load, not {llm!r:.80}")
    return spec


def _template(
    prompt: Hashable, columns: pd.Index, argument: str
) -> tuple[PromptTemplate, tuple[Hashable, ...]]:
    """The prompt's template, and the columns' labels that its fields stand for."""
    known = list(columns)
    by_name: dict[str, Hashable] = {str(label): label for label in reversed(known)}
    by_name |= {label: label for label in known if isinstance(label, str)}
    if not isinstance(prompt, str):
        if prompt not in known:
            raise TypeError(f"{argument} must be a column or a template, not {prompt!r:.80}")
        by_name[str(prompt)] = prompt
        prompt = str(prompt)
    template = PromptTemplate.parse(prompt, by_name)
    labels = tuple(by_name[field] for field in template.fields)
    for label in labels:
        if known.count(label) > 1:
            raise ValueError(f"{argument} uses the column {label!r}, which the table has more than once")
    return template, labels


def _check_output(call: Call, columns: pd.Index) -> None:
    known = set(columns)
    for name, label in zip(names(call), labels_of(names(call), columns), strict=True):
        if label in known:
            raise ValueError(
                f"the table has a column {name!r} already: drop it, or choose another name with output="
            )
