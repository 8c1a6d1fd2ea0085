"""The text that the bundled model is trained and measured on: six tasks in two languages, from a seed.

Owns the list of tasks and the split. A row's side of the split is decided by a hash of its *source* (the
review, the message, the sentence, the two numbers), never by chance: no source of a held-out row, under
whatever instruction, occurs in training. It knows no model, no tokenizer and no table library.

``python -m daskllm.demo.tasks > daskllm/demo/table.csv`` writes the sample table again.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from random import Random
from typing import NamedTuple

from daskllm.demo import addition, messages, questions, sentiment, translation

__all__ = ["KINDS", "LANGUAGES", "TASKS", "Row", "held_out", "rows", "sample", "table_rows"]

TABLE_SEED = 2026
HELD_OUT_SHARE = 10  # one source in ten is held out


class Row(NamedTuple):
    """One thing that a user may ask.

    Attributes:
        task: one of `TASKS`.
        language: of the instruction, "en" or "zh".
        source: what the answer depends on, without the instruction around it; decides the split.
        prompt: what the user types.
        answer: the one right answer.
    """

    task: str
    language: str
    source: str
    prompt: str
    answer: str


KINDS: Mapping[tuple[str, str], Callable[[Random], tuple[str, str, str]]] = {
    ("sentiment", "en"): sentiment.english,
    ("sentiment", "zh"): sentiment.chinese,
    ("order_number", "en"): messages.english_order,
    ("order_number", "zh"): messages.chinese_order,
    ("date", "en"): messages.english_date,
    ("date", "zh"): messages.chinese_date,
    ("translation", "en"): translation.english,
    ("translation", "zh"): translation.chinese,
    ("question", "en"): questions.english,
    ("question", "zh"): questions.chinese,
    ("addition", "en"): addition.english,
    ("addition", "zh"): addition.chinese,
}
"""(task, language) -> what makes one (source, prompt, answer) from a random generator."""

TASKS = tuple(dict.fromkeys(task for task, _ in KINDS))
LANGUAGES = tuple(dict.fromkeys(language for _, language in KINDS))


def held_out(source: str) -> bool:
    """Whether rows over this source are kept from training (about one in ten).

    >>> held_out("12+30") == held_out("12+30")
    True
    """
    digest = hashlib.sha256(source.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


def rows(seed: int, *, of_held_out: bool, only: tuple[str, str] | None = None) -> Iterator[Row]:
    """An endless stream of rows from one side of the split, the pairs of `KINDS` in turn.

    `only` names one (task, language). The same seed gives the same rows on every machine. Rows may repeat.

    >>> first = next(rows(0, of_held_out=True))
    >>> first.task, first.language, held_out(first.source)
    ('sentiment', 'en', True)
    """
    kinds = [(kind, make) for kind, make in KINDS.items() if only in (None, kind)]
    if not kinds:
        known = ", ".join(map(repr, KINDS))
        raise ValueError(f"only must be one of {known}, not {only!r}")
    rng = Random(f"{seed}/{of_held_out}/{only}")
    for (task, language), make in cycle(kinds):
        source, prompt, answer = make(rng)
        while held_out(source) != of_held_out:
            source, prompt, answer = make(rng)
        yield Row(task, language, source, prompt, answer)


def sample(count: int, seed: int, *, of_held_out: bool) -> list[Row]:
    """The first `count` rows of `rows` whose prompts differ.

    >>> len({row.prompt for row in sample(50, 3, of_held_out=False)})
    50
    """
    chosen: dict[str, Row] = {}
    stream = rows(seed, of_held_out=of_held_out)
    while len(chosen) < count:
        row = next(stream)
        chosen.setdefault(row.prompt, row)
    return list(chosen.values())


def table_rows() -> list[Row]:
    """The 200 held-out rows of the sample table, on one line each so that any tool can read it.

    >>> len(table_rows()), all(held_out(row.source) for row in table_rows())
    (200, True)
    """
    return [row for row in sample(400, TABLE_SEED, of_held_out=True) if "\n" not in row.prompt][:200]


def _write_table() -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("id", "task", "language", "prompt", "answer"))
    for number, row in enumerate(table_rows()):
        writer.writerow((number, row.task, row.language, row.prompt, row.answer))


if __name__ == "__main__":
    _write_table()
