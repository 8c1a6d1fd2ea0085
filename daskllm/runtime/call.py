"""One question to a model, over many rows: what travels to the tasks instead of the model.

A `Call` is small plain data. It owns how a row's cells become a prompt; it refuses to know where the rows
run and what their answers look like in a table.
"""

from __future__ import annotations

import secrets
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Number
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
from dask.tokenize import normalize_token

from daskllm.runtime.versions import learn, present
from daskllm.text.prompt import build
from daskllm.text.template import PromptTemplate
from daskllm.types import Message, Pooling, Prompt, RowError, SamplingParams

if TYPE_CHECKING:
    from daskllm.text.tokenizer import Tokenizer
    from daskllm.types import ModelSpec

__all__ = ["Call", "Kind", "Place", "draw_seed"]

Kind: TypeAlias = Literal["generate", "chat", "score", "embed"]
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
        params: how tokens are chosen, where any are generated.
        pooling, normalize: how "embed" makes a vector of a text.
        job_seed: where unseeded draws start.
        labels: the table's columns that a row's prompt needs, in the order of ``template.fields``.
        template: makes text of those cells; None takes the one cell as it is (text, token ids, messages).
        system, examples: put before the prompt, for "generate" and "chat".
        output: the name of the answers' column.
        priority: waits in an engine before the rows of those with a lower one.
        model_version: whether a table gets a column that says which weights answered a row.
        made_for: the model's version when the call was made. Rows go to the version that is there when they
            start; but a graph made after an update shall not share the keys of one made before.

        answers: where finished rows are kept and looked up, a directory or an fsspec URL; None: nowhere.

    Raises:
        ValueError: an unknown pooling.
        TypeError: ``normalize`` or ``model_version`` is no bool.
    """

    spec: ModelSpec
    kind: Kind
    params: SamplingParams = field(default_factory=SamplingParams)
    pooling: Pooling = "mean"
    normalize: bool = True
    job_seed: int = 0
    labels: tuple[Hashable, ...] = ()
    template: PromptTemplate | None = None
    system: str | None = None
    examples: tuple[tuple[str, str], ...] = ()
    output: str = "generated"
    priority: int = 0
    model_version: bool = False
    made_for: int = -1
    answers: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model_version, bool):
            raise TypeError(f"model_version must be True or False, not {self.model_version!r}")
        if self.made_for < 0:
            object.__setattr__(self, "made_for", getattr(present(self.spec), "version", 0))
        if self.pooling not in get_args(Pooling):
            raise ValueError(f'pooling must be "mean" or "last", not {self.pooling!r}')
        if not isinstance(self.normalize, bool):
            raise TypeError(f"normalize must be True or False, not {self.normalize!r}")

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        # Where answers are kept changes none of them, so it changes no key.
        return tuple(normalize_token(getattr(self, f.name)) for f in fields(self) if f.name != "answers")

    def __reduce__(self) -> tuple[Any, ...]:
        # The process that it goes to may not have heard of an update: a child of Dask's, another client. (No
        # __getstate__: early releases of Python 3.11 put another in its place where a class has slots.)
        return _arrived, (present(self.spec), {one.name: getattr(self, one.name) for one in fields(self)})

    @property
    def generates(self) -> bool:
        """Whether a row's answer is new text."""
        return self.kind in ("generate", "chat")

    @property
    def by_place(self) -> bool:
        """Whether a row's draws depend on its place, so that the place must survive filters."""
        return self.generates and not self.params.greedy and self.params.seed is None

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
            if self.kind != "chat" and _is_list(cells[0]) and self.template.parts[::2] == ("", ""):
                return self._from_ids(cells[0])
            filled = self.template.fill(dict(zip(self.template.fields, cells, strict=True)))
            if self.kind == "chat":
                return self._with_context([{"role": "user", "content": filled}])
            if not self.generates or (self.system is None and not self.examples):
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
        if not _is_list(cell):
            lists = "messages" if self.kind == "chat" else "token ids"
            raise RowError(f"a prompt is text or a list of {lists}, not {type(cell).__name__}")
        return self._with_context(_messages(cell)) if self.kind == "chat" else self._from_ids(cell)

    def _from_ids(self, cell: Sequence[Any] | np.ndarray) -> list[int]:
        if self.system is not None or self.examples:
            raise RowError("token ids take no system text and no examples: ask with text, or leave them out")
        return _token_ids(cell)

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


def _arrived(now: ModelSpec, given: dict[str, Any]) -> Call:
    call = Call(**given)
    learn(call.spec, now)
    return call


def _is_list(cell: Any) -> bool:
    return isinstance(cell, (Sequence, np.ndarray)) and not isinstance(cell, (str, bytes, bytearray))


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
