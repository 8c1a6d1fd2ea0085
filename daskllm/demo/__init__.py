"""The bundled model, its sample table, and how to count what it gets right.

Owns the two shipped files and nothing else: how the text is made is `daskllm.demo.tasks`, how the model was
trained `daskllm.demo.train`. It never loads a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["model_path", "share_right", "table"]

_HERE = Path(__file__).parent


def model_path() -> Path:
    """The directory of the bundled model: a small Llama in Hugging Face's layout, with a chat template.

    >>> (model_path() / "config.json").is_file()
    True
    """
    return _HERE / "model"


def table() -> pd.DataFrame:
    """The sample table: questions that the bundled model has not seen, and their right answers.

    Columns: `id` (int64, from 0), `task`, `language` ("en" or "zh"), `prompt` and `answer` (text; an answer
    such as "00417" keeps its zeros).

    >>> list(table().columns)
    ['id', 'task', 'language', 'prompt', 'answer']
    """
    import pandas as pd  # late: a path to the model should not cost a table library

    kinds = {"id": "int64"} | dict.fromkeys(("task", "language", "prompt", "answer"), "str")
    return pd.read_csv(_HERE / "table.csv", dtype=kinds, keep_default_na=False, encoding="utf-8")


def share_right(frame: Any, output: str = "generated") -> float:
    """The share, from 0 to 1, of a pandas frame's rows whose `output` is their `answer`.

    Spaces around an output are not counted against it; a null (the row failed) is a wrong answer.

    Raises:
        KeyError: the frame has no column `output` or no column `answer`.
        ValueError: the frame has no rows.

    Example:
        >>> import pandas as pd
        >>> share_right(pd.DataFrame({"answer": ["4", "猫"], "generated": ["4", None]}))
        0.5
    """
    missing = [name for name in (output, "answer") if name not in frame.columns]
    if missing:
        raise KeyError(f"the table has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns))}")
    if not len(frame):
        raise ValueError("the table has no rows, so no share of them is right")
    given = frame[output].astype("str").str.strip()
    return float(((given == frame["answer"]) & frame[output].notna()).mean())
