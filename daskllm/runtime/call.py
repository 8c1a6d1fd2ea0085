"""One question to a model, over many rows: what travels to the tasks instead of the model.

A `Call` is small plain data. It owns how a row's cells become a prompt; it refuses to know where the rows
run and what their answers look like in a table.
"""

from __future__ import annotations

import secrets
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Number
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pandas as pd

from daskllm.text.prompt import build
from daskllm.text.template import PromptTemplate
from daskllm.types import Message, Prompt, RowError, SamplingParams

if TYPE_CHECKING:
    from daskllm.text.tokenizer import Tokenizer
    from daskllm.types import ModelSpec

__all__ = ["Call", "Kind", "Place", "draw_seed"]

Kind: TypeAlias = Literal["generate", "chat", "score"]
Place: TypeAlias = tuple[int, ...]
"""Where a row stands in its job: (partition, row); unseeded draws start from it."""


def draw_seed(params: SamplingParams) -> int:
    """A job's seed where rows draw at random without one of their own; 0 where nothing needs it.

    >>> draw_seed(SamplingParams())
    0
    """
    return 0 if params.greedy or params.seed is not None else secrets.randbits(63)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What to ask of every row.

    Attributes:
        spec: which model; never the model itself.
        kind: how the cells are read.
        params: how tokens are chosen; unused by "score".
        job_seed: where unseeded draws start.
        labels: the table's columns that a row's prompt needs, in the order of ``template.fields``.
        template: makes text of those cells; None takes the one cell as it is (text, token ids, messages).
        system, examples: put before the prompt, for "generate" and "chat".
        output: the name of the answers' column.
    """

    spec: ModelSpec
    kind: Kind
    params: SamplingParams = field(default_factory=SamplingParams)
    job_seed: int = 0
    labels: tuple[Hashable, ...] = ()
    template: PromptTemplate | None = None
    system: str | None = None
    examples: tuple[tuple[str, str], ...] = ()
    output: str = "generated"

    @property
    def by_place(self) -> bool:
        """Whether a row's draws depend on its place, so that the place must survive filters."""
        return self.kind != "score" and not self.params.greedy and self.params.seed is None

    def prompts(self, rows: Iterable[Sequence[Any]], tokenizer: Tokenizer) -> list[Prompt]:
        """One prompt per row; what is wrong with a row becomes its `RowError`.

        Args:
            rows: for each row the cells of `labels`.
        """
        return [self._prompt(cells, tokenizer) for cells in rows]

    def _prompt(self, cells: Sequence[Any], tokenizer: Tokenizer) -> Prompt:
        try:
            if self.template is None:
                return self._from_cell(cells[0])
            filled = self.template.fill(dict(zip(self.template.fields, cells, strict=True)))
            if self.kind == "chat":
                return self._with_context([{"role": "user", "content": filled}])
            if self.kind == "score" or (self.system is None and not self.examples):
                return filled
            return build(filled, system=self.system, examples=self.examples or None, tokenizer=tokenizer)
        except RowError as error:
            return error

    def _from_cell(self, cell: Any) -> Prompt:
        if _is_null(cell):
            raise RowError("prompt is null")
        if isinstance(cell, Number):
            cell = str(cell)
        if isinstance(cell, str):
            return self._with_context(_user_turn(cell)) if self.kind == "chat" else cell
        if not isinstance(cell, (Sequence, np.ndarray)) or isinstance(cell, (bytes, bytearray)):
            lists = "messages" if self.kind == "chat" else "token ids"
            raise RowError(f"a prompt is text or a list of {lists}, not {type(cell).__name__}")
        return self._with_context(_messages(cell)) if self.kind == "chat" else _token_ids(cell)

    def _with_context(self, messages: list[Message]) -> list[Message]:
        """The messages behind the system text and the examples; a system turn of their own goes first."""
        own_system = messages[0].get("role") == "system"
        if own_system and self.system is not None:
            raise RowError("the messages begin with a system turn, and system= was given too")
        start = messages[:1] if own_system else []
        if self.system is not None:
            start = [{"role": "system", "content": self.system}]
        shown: list[Message] = []
        for question, answer in self.examples:
            shown += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*start, *shown, *messages[int(own_system) :]]


def _is_null(cell: Any) -> bool:
    return bool(pd.api.types.is_scalar(cell) and pd.isna(cell))


def _user_turn(cell: str) -> list[Message]:
    if not cell:
        raise RowError("prompt is empty")
    # Dask turns object columns to text by default, message lists included; their text is no question.
    if cell.startswith(("[{'role'", '[{"role"')) and cell.endswith("}]"):
        raise RowError(
            "the cell is the text of a message list, not the list: parse it, or, where Dask made it text, "
            "build the frame under dask.config.set({'dataframe.convert-string': False})"
        )
    return [{"role": "user", "content": cell}]


def _messages(cell: Sequence[Any] | np.ndarray) -> list[Message]:
    if len(cell) == 0:
        raise RowError("prompt is empty: a list of no messages")
    for message in cell:
        if not isinstance(message, Mapping) or "role" not in message:
            raise RowError(f"a message is a mapping with 'role' and 'content', not {message!r:.80}")
    # Parquet gives every struct of a column all fields that any of them has.
    return [{name: value for name, value in message.items() if value is not None} for message in cell]


def _token_ids(cell: Sequence[Any] | np.ndarray) -> list[int]:
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in cell):
        raise RowError("a list as a prompt holds token ids, all of them integers")
    return [int(i) for i in cell]
