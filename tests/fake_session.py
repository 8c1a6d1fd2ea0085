"""A session without a model: answers that can be foretold, for the tests of what lies above a session.

Its specification says how it behaves, in whichever process it is opened. What it did is written to a file,
one line for each row, so that rows can be counted across processes too.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from daskllm.runtime.process import open_session, session_for
from daskllm.types import Completion, ModelError, Prompt, RowError, SamplingParams, TokenLogprob


@dataclass(frozen=True)
class Counts:
    rows: int
    prompt_tokens: int
    output_tokens: int
    errors: int


@dataclass(frozen=True)
class FakeScore:
    logprob: float
    token_logprobs: tuple[float, ...]
    tokens: int
    error: str | None = None


@dataclass(frozen=True)
class FakeSpec:
    """
    Attributes:
        log: the file that the rows are written to.
        gate: rows wait until this file exists.
        broken: opening fails.
    """

    log: str
    gate: str | None = None
    broken: bool = False
    path: str = "fake"
    dtype: str = "none"
    device: str = "none"
    stages: tuple[()] = ()


class FakeTokenizer:
    has_chat_template = True


class FakeSession:
    """Answers the text "x" with "<x>", token ids and messages with their repr in brackets."""

    tokenizer = FakeTokenizer()
    context = 100

    def __init__(self, spec: FakeSpec) -> None:
        self.spec = spec
        self.closed = False
        self.running = 0
        self.most_running = 0
        self.interrupted = threading.Event()
        self._lock = threading.Lock()

    def close(self) -> None:
        self.closed = True

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        job_seed: int = 0,
        places: Sequence[tuple[int, ...]] | None = None,
        progress: Callable[[Any], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[list[Completion]]:
        self._enter(prompts)
        try:
            self._wait(cancelled)
            out = []
            for i, prompt in enumerate(prompts):
                place = (i,) if places is None else places[i]
                out.append([self._answer(prompt, params, job_seed, place, k) for k in range(params.n)])
            if progress is not None:
                done = [c for samples in out for c in samples]
                failed = sum(c.error is not None for c in done)
                progress(Counts(len(prompts), 1, sum(c.completion_tokens for c in done), failed))
            return out
        finally:
            self._leave()

    def score(
        self,
        prompts: Sequence[Prompt],
        *,
        progress: Callable[[Any], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[FakeScore]:
        self._enter(prompts)
        self._leave()
        return [
            FakeScore(float("nan"), (), 0, str(p))
            if isinstance(p, RowError)
            else FakeScore(-float(len(p)), (-1.0,) * len(p), len(p))
            for p in prompts
        ]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Any:
        if isinstance(prompt, RowError):
            raise prompt
        yield from self._answer(prompt, params, 0, (0,), 0).text or ""

    def _answer(
        self, prompt: Prompt, params: SamplingParams, job_seed: int, place: tuple[int, ...], sample: int
    ) -> Completion:
        if isinstance(prompt, RowError):
            return Completion.failed(str(prompt))
        text = f"<{prompt}>"
        if not params.greedy:
            start = (params.seed, str(prompt)) if params.seed is not None else (job_seed, place)
            text += f" {Random(repr((*start, sample))).randrange(10**9)}"
        ids = tuple(range(len(text)))
        logprobs = None if params.logprobs is None else tuple(TokenLogprob(i, -0.5) for i in ids)
        return Completion(text, ids, "length", len(prompt), len(ids), logprobs)

    def _enter(self, prompts: Sequence[Prompt]) -> None:
        with self._lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        with open(self.spec.log, "a") as log:
            log.write("".join(f"{os.getpid()}\n" for _ in prompts))

    def _leave(self) -> None:
        with self._lock:
            self.running -= 1

    def _wait(self, cancelled: Callable[[], bool] | None) -> None:
        while self.spec.gate is not None and not Path(self.spec.gate).exists():
            if cancelled is not None and cancelled():
                self.interrupted.set()
                raise InterruptedError("the rows were cancelled")
            time.sleep(0.01)


@open_session.register
def _open(spec: FakeSpec) -> FakeSession:
    if spec.broken:
        raise ModelError(f"{spec.path} is broken")
    return FakeSession(spec)


@dataclass
class FakeLLM:
    """A handle on a fake session."""

    spec: FakeSpec

    def session(self) -> Any:
        return session_for(self.spec)  # type: ignore[arg-type]

    @property
    def rows(self) -> int:
        """Rows that were answered so far, in whatever process."""
        return len(self.processes)

    @property
    def processes(self) -> list[str]:
        """For each answered row the process that answered it."""
        log = Path(self.spec.log)
        return log.read_text().splitlines() if log.exists() else []
