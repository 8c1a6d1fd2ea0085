"""What a call on a model is given, a text, a list, a Series or a Bag, and the like of it that comes back.

It owns that rule. It refuses to know how a model was loaded, and who answers rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol

import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd

from daskllm.frame import Handle, ask_series, check_chats
from daskllm.runtime.call import Call, Kind, draw_seed
from daskllm.runtime.cluster import client_for, over_rows
from daskllm.runtime.tasks import answer_bag, answer_rows, plain
from daskllm.types import SamplingParams

if TYPE_CHECKING:
    from distributed import Client

    from daskllm.models import DecoderConfig

__all__ = ["answers_of", "ask", "listed"]

_OUTPUTS = {"score": "score", "embed": "embedding"}


class Asked(Handle, Protocol):
    """A model that is asked."""

    client: Client | None
    answers: str | None

    @property
    def config(self) -> DecoderConfig: ...


def ask(llm: Asked, kind: Kind, given: Any, sampling: Mapping[str, Any], **options: Any) -> Any:
    """What the calls of `daskllm.LLM` return.

    Args:
        options: fields of `Call`.

    Raises: as they do.
    """
    params = SamplingParams.of(sampling)
    if kind == "chat":
        check_chats(llm)
    if isinstance(given, (pd.Series, dd.Series)):
        return ask_series(given, llm, kind, _OUTPUTS.get(kind, "generated"), sampling, **options)
    if isinstance(given, (pd.DataFrame, dd.DataFrame)):
        raise TypeError(f"a table is asked by its own accessor: df.llm.{kind}(llm, ...)")
    seed, kept = draw_seed(params), llm.answers
    call = Call(spec=llm.spec, kind=kind, params=params, job_seed=seed, answers=kept, **options)
    if isinstance(given, db.Bag):
        numbers = db.from_sequence(range(given.npartitions), npartitions=given.npartitions)
        return given.map_partitions(answer_bag, numbers, call=call)
    if isinstance(given, str) or (kind == "chat" and _is_conversation(given)):
        return plain(answers_of(llm, [given], call)[0], call)
    answers = [plain(answer, call) for answer in answers_of(llm, listed(given, kind), call)]
    if kind == "embed":
        return np.stack(answers) if answers else np.empty((0, llm.config.hidden_size), np.float32)
    return np.array(answers, dtype="float64") if kind == "score" else answers


def answers_of(llm: Asked, items: Sequence[Any], call: Call) -> list[Any]:
    """The answers to a call's prompts, in their order."""
    rows = [(item,) for item in items]
    return over_rows(client_for(llm.client), answer_rows, rows, call)


def _is_conversation(given: Any) -> bool:
    return isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], Mapping)


def listed(given: Any, kind: Kind) -> list[Any]:
    """The items of a list of prompts.

    Raises:
        TypeError: no list, or the token ids of a single prompt.
    """
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, (Sequence, np.ndarray, pd.Index)):
        raise TypeError(
            f"{kind} takes a str, a list, a pandas or dask Series, or a dask Bag, not {type(given).__name__}"
        )
    items = list(given)
    if items and all(isinstance(item, Integral) and not isinstance(item, bool) for item in items):
        raise TypeError("a list of integers is one prompt's token ids: put it into a list, [[1, 2, 3]]")
    return items
