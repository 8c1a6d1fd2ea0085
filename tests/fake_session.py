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

import numpy as np

from daskllm.metrics import EngineMetrics
from daskllm.metrics import Progress as Counts
from daskllm.results import Embedding
from daskllm.runtime.process import open_session, session_for
from daskllm.types import Completion, ModelError, Prompt, RowError, SamplingParams, TokenLogprob


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
        free: so many rows of a call are finished before the gate.
        held: the gate is for the process alone whose id is in this file.
        yields: the gate is not for urgent rows.
        seconds: how long a call takes.
    """

    log: str
    gate: str | None = None
    broken: bool = False
    path: str = "fake"
    dtype: str = "none"
    device: str = "none"
    quantize: None = None
    kv_dtype: str = "auto"
    stages: tuple[()] = ()
    chains: tuple[()] = ()
    identity: str = "fake"
    revision: None = None
    content: str = "fake weights"
    free: int = 0
    held: str | None = None
    yields: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class FakeEncoded:
    """A prompt whose ids are the bytes of its text."""

    prompt: Prompt

    @property
    def ids(self) -> list[int]:
        return list(str(self.prompt).encode("utf-8", "surrogatepass"))

    @property
    def error(self) -> str | None:
        return str(self.prompt) if isinstance(self.prompt, RowError) else None


class FakeTokenizer:
    has_chat_template = True


class FakeSession:
    """Answers the text "x" with "<x>", token ids and messages with their repr in brackets."""

    tokenizer = FakeTokenizer()
    context = 100
    rows_together = 64

    def __init__(self, spec: FakeSpec) -> None:
        self.spec = spec
        self.closed = False
        self.running = 0
        self.most_running = 0
        self.interrupted = threading.Event()
        self.metrics = EngineMetrics()
        self._lock = threading.Lock()

    def close(self) -> None:
        self.closed = True

    def encode(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[FakeEncoded]:
        return [FakeEncoded(prompt) for prompt in prompts]

    def generate(
        self,
        prompts: Sequence[Prompt | FakeEncoded],
        params: SamplingParams,
        *,
        job_seed: int = 0,
        places: Sequence[tuple[int, ...]] | None = None,
        priority: int = 0,
        progress: Callable[[Any], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        finished: Callable[[Sequence[tuple[int, list[Completion]]]], None] | None = None,
    ) -> list[list[Completion]]:
        self._enter(prompts)
        try:
            out = []
            time.sleep(self.spec.seconds)
            for i, prompt in enumerate(prompts):
                if i == self.spec.free and not (self.spec.yields and priority > 0):
                    self._wait(cancelled)
                prompt = prompt.prompt if isinstance(prompt, FakeEncoded) else prompt
                place = (i,) if places is None else places[i]
                out.append([self._answer(prompt, params, job_seed, place, k) for k in range(params.n)])
                if finished is not None:
                    finished([(i, out[-1])])
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
        priority: int = 0,
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

    def embed(
        self,
        prompts: Sequence[Prompt],
        *,
        pooling: str = "mean",
        normalize: bool = True,
        priority: int = 0,
        progress: Callable[[Any], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Embedding]:
        self._enter(prompts)
        self._leave()
        return [
            Embedding.failed(str(p), 2)
            if isinstance(p, RowError)
            else Embedding.of(np.array([len(p), 1.0]), len(p), normalize)
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
        if self.spec.held is not None and Path(self.spec.held).read_text() != str(os.getpid()):
            return
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
    answers: str | None = None

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
