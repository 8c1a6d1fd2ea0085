"""What the rows of a table would ask of a model, counted without it: tokens, failures, duplicates, prefixes.

A partition becomes one `Sample` of bounded size, where the partition is; samples add up. It refuses to know
how fast anything is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from daskllm.runtime.call import Call, Place
from daskllm.runtime.columns import cells, labels_of
from daskllm.runtime.process import using
from daskllm.runtime.recall import remembered
from daskllm.runtime.slices import PLACE, places_of

if TYPE_CHECKING:
    from daskllm.text.encode import Encoded

__all__ = ["TRIAL_ROWS", "Distinct", "Sample", "sample_of"]

TRIAL_ROWS = 192
"""Rows that are kept to be really run: what an engine has in hand, twice."""
_AT_ONCE = 4096
_REASONS = 5
_HASHES = 1 << 14

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Distinct:
    """How many different rows there are, from the least of their hashes (Bar-Yossef et al. 2002).

    Exact up to 16,384 different rows, above within about 1% (one standard deviation).

    Attributes:
        least: the least hashes, ascending, each once.

    Example:
        >>> rows = np.arange(3, dtype=np.uint64)
        >>> (Distinct.of(rows) + Distinct.of(rows[:1])).count
        3.0
    """

    least: Hashes

    @classmethod
    def of(cls, hashes: Hashes) -> Distinct:
        """That of some rows, by their 64-bit hashes."""
        return cls(np.unique(hashes)[:_HASHES])

    def __add__(self, other: Distinct) -> Distinct:
        return Distinct.of(np.concatenate([self.least, other.least]))

    @property
    def count(self) -> float:
        """About how many different rows."""
        if len(self.least) < _HASHES:
            return float(len(self.least))
        return (_HASHES - 1) / (float(self.least[-1]) / 2.0**64)


@dataclass(frozen=True)
class Sample:
    """Some partitions of a table.

    Attributes:
        rows: of the partitions.
        counted: rows whose prompts were made and counted.
        prompt_tokens: of all rows, as the counted ones tell.
        variance: of that number, as an estimate.
        longest: tokens of the longest prompt among those counted.
        failed, remembered: rows, as the counted ones tell, that cannot be answered, and whose answers are
            kept.
        reasons: why rows fail, a few.
        distinct: how many different rows.
        apart: how many rows are left when those of the same partition that are alike are one.
        prefix: ids that all counted prompts begin with; None where there is none.
        trial: (cells, place) of some rows that can be answered.
    """

    rows: int
    counted: int
    prompt_tokens: float
    variance: float
    longest: int
    failed: float
    remembered: float
    reasons: tuple[str, ...]
    distinct: Distinct
    apart: float
    prefix: tuple[int, ...] | None
    trial: tuple[tuple[tuple[Any, ...], Place], ...]

    def __add__(self, other: Sample) -> Sample:
        both = [prefix for prefix in (self.prefix, other.prefix) if prefix is not None]
        share = round(TRIAL_ROWS * self.rows / max(1, self.rows + other.rows))
        mine = self.trial[: max(share, TRIAL_ROWS - len(other.trial))]
        return Sample(
            rows=self.rows + other.rows,
            counted=self.counted + other.counted,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            variance=self.variance + other.variance,
            longest=max(self.longest, other.longest),
            failed=self.failed + other.failed,
            remembered=self.remembered + other.remembered,
            reasons=tuple(dict.fromkeys((*self.reasons, *other.reasons)))[:_REASONS],
            distinct=self.distinct + other.distinct,
            apart=self.apart + other.apart,
            prefix=common_prefix(both),
            trial=(*mine, *other.trial[: TRIAL_ROWS - len(mine)]),
        )


def sample_of(table: pd.DataFrame, call: Call, count: int | None, seed: int = 0) -> Sample:
    """One partition's.

    Args:
        table: with at least the columns of the call, and `PLACE` where its draws go by that.
        count: rows whose prompts are counted, drawn at random; None: all.
        seed: of that drawing.
    """
    places = [label for label in labels_of([PLACE], table.columns) if label in table.columns]
    table = table[[*call.labels, *places]].reset_index(drop=True)
    hashes = _hashes(table[[*call.labels]])
    draw = np.random.default_rng([seed, len(table)])
    if count is not None and count < len(table):
        table = table.take(np.sort(draw.choice(len(table), count, replace=False)))
    sums = _Sums()
    with using(call.spec) as session:
        for start in range(0, len(table), _AT_ONCE):
            some = table.iloc[start : start + _AT_ONCE]
            rows, at = cells(some, call.labels), places_of(some)
            encoded = session.encode(call.prompts(rows, session.tokenizer), call.params)
            known = remembered(session, encoded, call, at) if call.generates else 0
            sums.add(encoded, known, list(zip(rows, at, strict=True)))
    return sums.sample(len(hashes), Distinct.of(hashes), draw)


class _Sums:
    """What the counted rows of a partition come to."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.reasons: dict[str, None] = {}
        self.failed = self.known = 0
        self.prefix: tuple[int, ...] | None = None
        self.good: list[tuple[tuple[Any, ...], Place]] = []

    def add(
        self, encoded: Sequence[Encoded], known: int, rows: Sequence[tuple[tuple[Any, ...], Place]]
    ) -> None:
        good = [i for i, one in enumerate(encoded) if one.error is None]
        self.tokens += [len(one.ids) if one.error is None else 0 for one in encoded]
        self.failed += len(encoded) - len(good)
        self.known += known
        for one in encoded:
            if one.error is not None and len(self.reasons) < _REASONS:
                self.reasons[one.error] = None
        prefixes = [tuple(encoded[i].ids) for i in good]
        self.prefix = common_prefix([*prefixes, *([] if self.prefix is None else [self.prefix])])
        self.good += [rows[i] for i in good]
        # Every other one, rather than the first ones alone: a table may be in some order.
        while len(self.good) > 4 * TRIAL_ROWS:
            del self.good[::2]

    def sample(self, rows: int, distinct: Distinct, draw: np.random.Generator) -> Sample:
        counted = len(self.tokens)
        scale = rows / counted if counted else 0.0
        tokens = np.array(self.tokens, dtype=np.float64)
        spread = float(tokens.var()) / counted * rows * (rows - counted) if counted else 0.0
        chosen = draw.permutation(len(self.good))[:TRIAL_ROWS].tolist()
        return Sample(
            rows=rows,
            counted=counted,
            prompt_tokens=scale * float(tokens.sum()),
            variance=spread,
            longest=max(self.tokens, default=0),
            failed=scale * self.failed,
            remembered=scale * self.known,
            reasons=tuple(self.reasons),
            distinct=distinct,
            apart=distinct.count,
            prefix=self.prefix,
            trial=tuple(self.good[i] for i in chosen),
        )


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The ids that all begin with; None where there is none of them.

    >>> common_prefix([(1, 2, 3), (1, 2), (1, 2, 4)])
    (1, 2)
    """
    if not prompts:
        return None
    first, last = min(prompts), max(prompts)  # what these two share, all between them share
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    return first[:same]


def _hashes(table: pd.DataFrame) -> Hashes:
    """A hash of each row, uint64 ``[rows]``."""
    out: Any = np.zeros(len(table), np.uint64)
    for number in range(table.shape[1]):
        column = table.iloc[:, number]
        try:
            one = pd.util.hash_pandas_object(column, index=False).to_numpy(dtype=np.uint64)
        except TypeError:  # lists of messages or ids
            one = pd.util.hash_array(np.array(list(map(repr, column)), dtype=object)).astype(np.uint64)
        out = out * np.uint64(1_000_003) + one
    return out
