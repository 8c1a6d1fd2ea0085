"""Rows that need no model: equal ones of a call, and of calls at the same time, are generated once; what was
answered before is looked up.

It owns what makes two rows equal: the tokens that the model reads, the weights, how tokens are chosen, and
where the draws come from. How answers are kept is `daskllm.answers`' business.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import dask.config

from daskllm.answers import FLUSH_SECONDS, Answers, Place, key_of, space_of
from daskllm.metrics import error_kind
from daskllm.runtime.call import Call
from daskllm.runtime.call import Place as RowPlace
from daskllm.runtime.together import Claim, under_way

if TYPE_CHECKING:
    from daskllm.engine.layers import ResidentModel
    from daskllm.runtime.progress import Reporter
    from daskllm.session import Session
    from daskllm.text.encode import Encoded
    from daskllm.types import Completion, Prompt

__all__ = ["generated", "place_for", "remembered"]

logger = logging.getLogger(__name__)

# What a specification says of where a model is and not of what it answers. What it may say one day counts as
# the model's until it is named here: that costs a second generation, the other way would cost right answers.
_WHERE = frozenset({"path", "revision", "kv_memory", "content", "copy", "stages", "replicas"})
# These are the row's: its seed is in its key, and its prompt is cut already.
_OF_THE_ROW = frozenset({"seed", "truncate"})
_OPEN_SPACES = 32


def place_for(given: str | os.PathLike[str] | bool | None) -> str | None:
    """Where answers are kept, from what a user says; None where they are not.

    Args:
        given: "auto": as Dask's configuration ``daskllm.answers`` says, else the user's cache directory. A
            directory, an fsspec URL, or None or False.

    Raises:
        TypeError: neither of these.
        ValueError: a URL that fsspec cannot open here.
    """
    if given == "auto":
        given = dask.config.get("daskllm.answers", True)
        if given is True:
            # Not this user's home, but that of whoever opens it: workers may be elsewhere.
            given = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "daskllm", "answers")
    if given is None or given is False:
        return None
    if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
        raise TypeError(f'answers must be "auto", a directory, a URL, or None, not {given!r}')
    place = os.fspath(given)
    if "://" not in place and not place.startswith("~"):
        place = os.path.abspath(place)
    Place(place)
    return place


def generated(
    session: Session,
    prompts: Sequence[Prompt],
    call: Call,
    places: Sequence[RowPlace],
    report: Reporter,
    cancelled: Callable[[], bool],
) -> list[list[Completion]]:
    """For each prompt its samples, as `Session.generate` would give them for all of them.

    What finishes is kept at once, so that it outlives this process and an interrupt.

    Raises:
        InterruptedError: the rows were cancelled.
    """
    rows = _Rows(session, prompts, call, places, report)
    try:
        rows.recall()
        rows.generate(places, cancelled)
    finally:
        rows.keep()
    return rows.answers


def remembered(session: Session, encoded: Sequence[Encoded], call: Call, places: Sequence[RowPlace]) -> int:
    """Of how many of these prompts the answers are kept."""
    kept = _kept_answers(call, session)
    if kept is None:
        return 0
    keys = [
        key_of(one.ids, _draw(call, place if call.by_place else ()))
        for one, place in zip(encoded, places, strict=True)
        if one.error is None
    ]
    known = kept.get(list(dict.fromkeys(keys)))
    return sum(key in known for key in keys)


class _Rows:
    """The rows of a call on their way."""

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Prompt],
        call: Call,
        places: Sequence[RowPlace],
        report: Reporter,
    ) -> None:
        self._session, self._call, self._report = session, call, report
        self._encoded = session.encode(prompts, call.params)
        report.add(begun_tokens=sum(len(one.ids) for one in self._encoded))
        self._kept = _kept_answers(call, session)
        self.answers: list[list[Completion]] = [[] for _ in prompts]
        self._keys: dict[int, bytes] = {}
        self._equal: dict[bytes, list[int]] = {}
        self._under, self._mine = under_way(session), dict[bytes, Claim]()
        self._sampling = repr([getattr(call.params, name) for name in _sampling_fields(call.params)])
        for row, one in enumerate(self._encoded):
            if one.error is None:
                key = key_of(one.ids, _draw(call, places[row] if call.by_place else ()))
                self._keys[row] = key
                self._equal.setdefault(key, []).append(row)

    def recall(self) -> None:
        """Answer what is known."""
        known = {} if self._kept is None else self._kept.get(list(self._equal))
        for key, samples in known.items():
            rows = self._equal.pop(key)
            self._answer(rows, samples)
            self._remembered(len(rows))

    def generate(self, places: Sequence[RowPlace], cancelled: Callable[[], bool]) -> None:
        """Answer the rest, one of equal rows for all of them, wherever it is generated."""
        asked = [row for row, one in enumerate(self._encoded) if one.error is not None]
        left = list(self._equal)
        while asked or left:
            theirs = self._claim(left)
            try:
                self._ask(sorted([*asked, *(self._equal[key][0] for key in self._mine)]), places, cancelled)
            finally:  # what was not finished is given up
                for claim in self._mine.values():
                    self._under.settle(claim, None)
                self._mine.clear()
            asked, left = [], [key for key, claim in theirs.items() if not self._wait(key, claim, cancelled)]

    def _claim(self, keys: Iterable[bytes]) -> dict[bytes, Claim]:
        """Claim rows; the claims of those that others generate already."""
        theirs: dict[bytes, Claim] = {}
        for key in keys:
            mine, claim = self._under.claim((self._sampling, key), self._call.priority)
            (self._mine if mine else theirs)[key] = claim
        return theirs

    def _wait(self, key: bytes, claim: Claim, cancelled: Callable[[], bool]) -> bool:
        """Take a row from the call that generates it; whether that call finished it."""
        samples = claim.wait(cancelled)
        if samples is None:
            return False
        if self._kept is not None:
            self._kept.put({key: samples})
        self._answer(self._equal[key], samples)
        self._remembered(len(self._equal[key]))
        return True

    def _ask(self, asked: Sequence[int], places: Sequence[RowPlace], cancelled: Callable[[], bool]) -> None:
        if not asked:
            return

        def unwanted() -> bool:
            # Called while nothing finishes too: what has finished shall not wait for the next row.
            self.keep(FLUSH_SECONDS)
            return cancelled()

        generated = self._session.generate(
            [self._encoded[row] for row in asked],
            self._call.params,
            job_seed=self._call.job_seed,
            places=[places[row] for row in asked],
            priority=self._call.priority,
            progress=self._report,
            cancelled=unwanted,
            finished=lambda done: self._finished([(asked[i], s) for i, s in done]),
        )
        for row, samples in zip(asked, generated, strict=True):
            self._answer(self._equal.get(self._keys.get(row, b""), [row]), samples)

    def keep(self, waiting: float = 0.0) -> None:
        """Have what has finished written, if it has waited for so many seconds."""
        if self._kept is not None:
            self._kept.flush(waiting)

    def _finished(self, done: Iterable[tuple[int, list[Completion]]]) -> None:
        whole = {}
        for row, samples in done:
            if row not in self._keys:
                continue
            key = self._keys[row]
            failed = any(sample.error is not None for sample in samples)
            if not failed:
                whole[key] = samples
                self._under.settle(self._mine[key], samples)
            if (others := len(self._equal[key]) - 1) and not failed:
                self._remembered(others)
            elif others:
                why = next(sample.error for sample in samples if sample.error is not None)
                self._report.add(rows=others, errors=others, kinds={error_kind(why): others})
        if self._kept is not None and whole:
            self._kept.put(whole)

    def _answer(self, rows: Iterable[int], samples: list[Completion]) -> None:
        for row in rows:
            self.answers[row] = samples

    def _remembered(self, rows: int) -> None:
        self._session.metrics.remembered += rows
        self._report.add(rows=rows, remembered=rows)


def _draw(call: Call, place: RowPlace) -> tuple[int, ...]:
    """What a row's random numbers come from, besides its prompt."""
    if call.params.greedy:
        return ()
    return (0, call.params.seed) if call.params.seed is not None else (1, call.job_seed, *place)


def _kept_answers(call: Call, session: Session) -> Answers | None:
    """Where the answers of this call's model and sampling are; None where none are to be kept."""
    spec = session.spec
    if call.answers is None or not spec.identity:
        return None
    model: ResidentModel | None = getattr(session, "model", None)
    if model is not None:  # what "auto" came to: another device or type computes other bits
        spec = replace(spec, device=model.device, dtype=model.dtype)
    return _opened(call.answers, space_of(_facts(call.params, spec)))


def _facts(params: Any, spec: Any) -> dict[str, Any]:
    """All that a row's tokens come from but the row itself."""
    model = {one.name: getattr(spec, one.name) for one in fields(spec) if one.name not in _WHERE}
    sampling = {name: getattr(params, name) for name in _sampling_fields(params)}
    # Another release may compute other bits. (An import of it would be one of the rooms above.)
    release = sys.modules["daskllm"].__version__
    return {"release": release, "model": model, "sampling": sampling}


def _sampling_fields(params: Any) -> list[str]:
    return [one.name for one in fields(params) if one.name not in _OF_THE_ROW]


@functools.lru_cache(_OPEN_SPACES)
def _opened(place: str, space: str) -> Answers | None:
    try:
        return Answers(place, space)
    except ValueError as error:  # a worker that lacks what the client has
        logger.warning("%s; rows go on without", error)
        return None


# A lock that another thread held when the process was forked stays locked in the child.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_opened.cache_clear)
