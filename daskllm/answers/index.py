"""Which file holds a key: sorted arrays of 24 bytes a key, searched for many keys at once.

It knows keys and numbers; what the numbers stand for is `store`'s business.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from daskllm.answers.segment import Keys

__all__ = ["Index"]

_ROW_BITS = 32
Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class _Run:
    """Keys in the order of their first half, and where each is: file << 32 | row."""

    first: Keys
    second: Keys
    at: Numbers

    @classmethod
    def of(cls, keys: Keys, at: Numbers) -> _Run:
        order = np.argsort(keys[:, 0], kind="stable")
        return cls(keys[order, 0], keys[order, 1], at[order])

    def within(self, kept: np.ndarray[Any, np.dtype[np.bool_]]) -> _Run:
        return _Run(self.first[kept], self.second[kept], self.at[kept])


class Index:
    """The keys of many files.

    Runs are put together when a newer one is as long as the one before, so that there are only as many as the
    number of keys has binary digits, and a key moves no oftener than that.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    def __len__(self) -> int:
        return sum(len(run.at) for run in self._runs)

    def add(self, keys: Keys, file: int) -> None:
        """Add a file's keys, in the order of its rows."""
        if not len(keys):
            return
        at = (np.int64(file) << _ROW_BITS) + np.arange(len(keys), dtype=np.int64)
        run = _Run.of(keys, at)
        while self._runs and len(self._runs[-1].at) <= len(run.at):
            old = self._runs.pop()
            both = np.stack([np.r_[old.first, run.first], np.r_[old.second, run.second]], axis=1)
            run = _Run.of(both, np.r_[old.at, run.at])
        self._runs.append(run)

    def drop(self, files: Collection[int]) -> None:
        """Forget files."""
        gone = np.array(sorted(files), np.int64)
        runs = [run.within(~np.isin(run.at >> _ROW_BITS, gone)) for run in self._runs]
        self._runs = [run for run in runs if len(run.at)]

    def find(self, keys: Keys) -> tuple[Numbers, Numbers]:
        """For each key its file, -1 where it is in none, and its row there."""
        at = np.full(len(keys), -1, np.int64)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run.first, keys[:, 0]), len(run.at) - 1)
            hit = (run.first[place] == keys[:, 0]) & (run.second[place] == keys[:, 1])
            at[hit] = run.at[place[hit]]
        return at >> _ROW_BITS, at & ((1 << _ROW_BITS) - 1)
