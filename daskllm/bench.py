"""Measures how fast a model answers one work file, in this process or on a local cluster.

Owns the work file's format, the clock and the memory figures. A work file is a JSON list of
``{"prompt": [token ids], "out": n}``: exactly ``n`` tokens are generated for each row, end tokens ignored.
It measures through the doors that everybody uses (`daskllm.llm.load`, a session's ``generate``) and knows
nothing of what lies behind them.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from distributed import Client

from daskllm import __version__
from daskllm.blocks.array import DTYPES
from daskllm.engine.kernels import select
from daskllm.engine.profile import Profile, Rates
from daskllm.llm import load
from daskllm.machine import cores
from daskllm.models import DecoderConfig
from daskllm.runtime.call import Call
from daskllm.runtime.cluster import batches
from daskllm.runtime.deploy import local_cluster
from daskllm.runtime.devices import quickest
from daskllm.runtime.process import session_for
from daskllm.runtime.stages import at_engine
from daskllm.runtime.tasks import watched
from daskllm.session import Session
from daskllm.types import ModelSpec, SamplingParams

__all__ = ["WorkRow", "machine_rates", "measure", "read_work", "without_drafts"]

WARM_UP_ROWS = 4
MEGABYTE = 1_000_000
_MEASURING_SECONDS = 0.3
_READ = 256 << 20
"""Bytes to read for the memory's bandwidth: many times what caches hold."""
_ROWS, _WIDTH = 256, 1024
"""Rows and width of a product that is bound by arithmetic."""


@dataclass(frozen=True, slots=True)
class WorkRow:
    """One row of a work file: the prompt's token ids, and how many tokens to generate."""

    prompt: tuple[int, ...]
    out: int

    @property
    def sampling(self) -> SamplingParams:
        """Greedy, to exactly this row's length."""
        return SamplingParams(max_tokens=self.out, ignore_eos=True)


def read_work(path: str | os.PathLike[str]) -> list[WorkRow]:
    """The rows of a work file.

    Raises:
        ValueError: the file is not such a list; the message names the row and what it must be.
    """
    try:
        rows = json.loads(Path(path).read_text())
    except json.JSONDecodeError as bad:
        raise ValueError(f"{os.fspath(path)} is not JSON: {bad}") from bad
    if not isinstance(rows, list) or not rows:
        raise ValueError(f'{os.fspath(path)} must be a non-empty JSON list of {{"prompt": [ids], "out": n}}')
    return [_row(path, i, row) for i, row in enumerate(rows)]


def _row(path: str | os.PathLike[str], i: int, row: Any) -> WorkRow:
    prompt, out = (row.get("prompt"), row.get("out")) if isinstance(row, dict) else (None, None)
    if not isinstance(prompt, list) or not prompt or not all(type(t) is int and t >= 0 for t in prompt):
        raise ValueError(f'{os.fspath(path)}, row {i}: "prompt" must be a non-empty list of token ids')
    if type(out) is not int or out < 1:
        raise ValueError(
            f'{os.fspath(path)}, row {i}: "out" must be a whole number of at least 1, not {out!r}'
        )
    return WorkRow(tuple(prompt), out)


def measure(
    model: str,
    work: Sequence[WorkRow],
    *,
    workers: int | None = None,
    threads: int | None = None,
    stages: int | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    kv_dtype: str = "auto",
    kv_memory: int | str = "auto",
    profile: bool = False,
) -> dict[str, Any]:
    """Load a model, warm up on four rows, answer all rows; what it took. Tokens are not guessed ahead.

    Args:
        workers: processes of a local Dask cluster; None answers in this process, without Dask.
        threads: Dask threads per worker, each of which has one task in flight (2).
        stages: into how many workers' parts the model is cut; None: each worker holds the whole.
        profile: say where the time went, see `daskllm.engine.profile`; the run is slower by some percent.

    Returns:
        ``load_s`` from the call of ``load`` until ready to generate; ``seconds`` for all rows after the
        warm-up; ``out_tokens``, ``out_tokens_per_s``, ``prompt_tokens``, ``rows``; ``base_rss_mb`` resident
        before ``load`` and ``peak_rss_mb`` the most ever resident, both in 10**6 bytes and summed over the
        processes that hold the model; ``cpu_s``, seconds of cores that those processes took for the rows, and
        on a cluster ``client_cpu_s``, those of client and scheduler; ``preemptions``; ``reused_tokens``,
        prompt tokens whose keys and values were found instead of computed; the machine and versions it ran
        on; and ``profile`` where it was asked for.

    Raises:
        ValueError: options that exclude each other.
        ValueError: a row asks for what the model cannot do: a token outside its vocabulary, or more tokens
            than its context holds.
        RuntimeError: a row did not yield exactly the tokens it asks for, so that the time means nothing.
    """
    options: dict[str, Any] = {
        "revision": revision,
        "dtype": dtype,
        "device": device,
        "quantize": quantize,
        "kv_dtype": kv_dtype,
        "kv_memory": kv_memory,
    }
    for name, given in (("threads", threads), ("stages", stages)):
        if workers is None and given is not None:
            raise ValueError(f"{name}= is about the workers of a cluster: give workers= as well")
    if profile and workers is not None:
        raise ValueError("profile= is about the engine in this process: leave workers= out")
    if workers is None:
        measured = _in_process(model, work, options, profile)
    else:
        if stages is not None:
            if stages > workers:
                raise ValueError(f"stages={stages} need as many workers: workers={workers} is too few")
            options["stages"] = stages
        measured = _on_cluster(model, work, options, workers, threads or 2)
    measured["out_tokens_per_s"] = round(measured["out_tokens"] / measured["seconds"], 1)
    for name in ("load_s", "seconds", "cpu_s", "client_cpu_s", "base_rss_mb", "peak_rss_mb"):
        if name in measured:
            measured[name] = round(measured[name], 3)
    prompt_tokens = sum(len(row.prompt) for row in work)
    return {**measured, "rows": len(work), "prompt_tokens": prompt_tokens, **_where()}


def _in_process(
    model: str, work: Sequence[WorkRow], options: dict[str, Any], profile: bool
) -> dict[str, Any]:
    base = _resident()
    begun = time.perf_counter()
    llm = load(model, **options)
    session = llm.session()
    load_s = time.perf_counter() - begun
    try:
        _check_fits(work, llm.config)
        without_drafts(session)
        _answer(session, _warm_up(work))
        watch = Profile(session.engine) if profile else None
        cpu, begun = _cpu_seconds(), time.perf_counter()
        tokens = _answer(session, work)
        seconds = time.perf_counter() - begun
        measured = {
            "load_s": load_s,
            "seconds": seconds,
            "cpu_s": _cpu_seconds() - cpu,
            "out_tokens": tokens,
            "base_rss_mb": base,
            "peak_rss_mb": _peak_resident(),
            **_engine(session),
        }
    finally:
        llm.close()
    if watch is not None:
        with ThreadPoolExecutor(1) as thread:  # OpenMP counts threads per calling thread
            rates = thread.submit(machine_rates, DTYPES[measured["dtype"]]).result()
        measured["profile"] = watch.report(seconds, rates)
    return measured


def machine_rates(dtype: torch.dtype) -> Rates:
    """What this machine does with all of its cores: reading memory, and the products of the engine's own
    kernels where they are at their best. The calling thread keeps threads for it.
    """
    torch.set_num_threads(cores())
    large = torch.ones(_READ // 4, dtype=torch.float32)
    bandwidth = large.nbytes / quickest(large.sum, "cpu", _MEASURING_SECONDS)

    def product(kind: torch.dtype) -> float:
        kernels = select("cpu", kind)
        x, weight = torch.ones(_ROWS, _WIDTH, dtype=kind), torch.ones(_WIDTH, _WIDTH, dtype=kind)
        packed = kernels.pack([weight], None)
        best = quickest(lambda: kernels.linear(x, packed), "cpu", _MEASURING_SECONDS)
        return 2 * _ROWS * _WIDTH * _WIDTH / best

    return Rates(bandwidth, product(dtype), product(torch.float32))


def _on_cluster(
    model: str, work: Sequence[WorkRow], options: dict[str, Any], workers: int, threads: int
) -> dict[str, Any]:
    with local_cluster(workers, threads) as cluster, Client(cluster) as client:
        base = sum(client.run(_resident).values())
        begun = time.perf_counter()
        llm = load(model, client=client, **options)
        spec = llm.spec
        load_s = time.perf_counter() - begun
        _check_fits(work, llm.config)
        engines_at = [chain.stages[-1].worker for chain in spec.chains] or list(client.nthreads())
        _at_each(client, engines_at, _answer_here, spec, _warm_up(work))
        costs = np.array([len(row.prompt) + row.out for row in work], dtype="float64")
        parts = [[work[row] for row in batch] for batch in batches(costs, len(engines_at))]
        workers_cpu, cpu = sum(client.run(_cpu_seconds).values()), _cpu_seconds()
        begun = time.perf_counter()
        tokens = sum(client.gather(client.map(_answer_here, [spec] * len(parts), parts, pure=False)))
        seconds = time.perf_counter() - begun
        cpu = _cpu_seconds() - cpu
        workers_cpu = sum(client.run(_cpu_seconds).values()) - workers_cpu
        if spec.chains:
            engines = list(client.run(at_engine, spec, _engine, workers=engines_at).values())
        else:
            engines = _at_each(client, engines_at, _engine_here, spec)
        return {
            "load_s": load_s,
            "seconds": seconds,
            "cpu_s": workers_cpu,
            "client_cpu_s": cpu,
            "out_tokens": tokens,
            "base_rss_mb": base,
            "peak_rss_mb": sum(client.run(_peak_resident).values()),
            **engines[0],
            **{name: sum(engine[name] for engine in engines) for name in ("preemptions", "reused_tokens")},
            "workers": workers,
            "threads": threads,
            "stages": len(spec.chains[0].stages) if spec.chains else 1,
        }


def _warm_up(work: Sequence[WorkRow]) -> list[WorkRow]:
    """The first rows back to front: of their length, and nothing of them is found by the rows themselves."""
    return [WorkRow(row.prompt[::-1], row.out) for row in work[:WARM_UP_ROWS]]


def _check_fits(work: Sequence[WorkRow], config: DecoderConfig) -> None:
    """Refuse a row that this model cannot answer as asked (ValueError)."""
    for i, row in enumerate(work):
        highest, known = max(row.prompt), config.vocab_size
        if highest >= known:
            raise ValueError(f"row {i}: token id {highest} is outside the model's vocabulary of {known}")
        if len(row.prompt) + row.out > config.max_positions:
            raise ValueError(
                f'row {i}: {len(row.prompt)} tokens of "prompt" and {row.out} of "out" are more than the '
                f"model's context of {config.max_positions}"
            )


def _at_each(client: Client, workers: Sequence[str], function: Callable[..., Any], *given: Any) -> list[Any]:
    """The results of a task on each of these workers."""
    tasks = [client.submit(function, *given, workers=[worker], pure=False) for worker in workers]
    results: list[Any] = client.gather(tasks)
    return results


def without_drafts(session: Session) -> None:
    """Keep an engine from guessing tokens: a model of random weights says the same again and again, and what
    its guesses gain holds for no text. One behind stages never guesses."""
    if isinstance(session, Session):
        session.engine.batcher.draft = None


def _answer(session: Session, work: Sequence[WorkRow], **watching: Any) -> int:
    """Generate every row of the work; the number of tokens, all of which were asked for."""
    answers = session.generate([row.prompt for row in work], [row.sampling for row in work], **watching)
    for i, (row, (answer,)) in enumerate(zip(work, answers, strict=True)):
        if answer.completion_tokens != row.out:
            why = answer.error or f"it ended with {answer.finish_reason!r}"
            raise RuntimeError(f"row {i} gave {answer.completion_tokens} of {row.out} tokens: {why}")
    return sum(row.out for row in work)


def _answer_here(spec: ModelSpec, work: Sequence[WorkRow]) -> int:
    with watched(Call(spec=spec, kind="generate"), len(work)) as run:
        without_drafts(run.session)
        return _answer(run.session, work, progress=run.report, cancelled=run.cancelled)


def _engine_here(spec: ModelSpec) -> dict[str, Any]:
    return _engine(session_for(spec))


def _engine(session: Session) -> dict[str, Any]:
    """How the engine was set up, and what it did."""
    cache = session.engine.runner.cache
    metrics = session.engine.metrics
    return {
        "dtype": session.model.dtype,
        "device": session.engine.runner.device,
        "quantize": session.spec.quantize,
        "kv_dtype": session.model.kv_dtype,
        "kv_mb": round(sum(tensor.nbytes for tensor in (*cache.keys, *cache.values)) / MEGABYTE, 3),
        "preemptions": metrics.preemptions,
        "reused_tokens": metrics.reused_tokens,
        "mean_batch": round(metrics.fill(), 1),
    }


def _cpu_seconds() -> float:
    """What this process has taken of the cores so far, all of its threads together."""
    return time.process_time()  # what psutil tells goes by ticks of 10 ms


def _resident() -> float:
    """This process's resident memory in 10**6 bytes."""
    return psutil.Process().memory_info().rss / MEGABYTE


def _peak_resident() -> float:
    """The most memory that was ever resident in this process, in 10**6 bytes.

    Read from ``/proc/self/status`` where there is one: ``getrusage`` would also count what the parent had
    resident when it forked.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / MEGABYTE
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE


def _where() -> dict[str, Any]:
    packages = ("torch", "numba", "dask")
    return {
        "cpu_count": cores(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {
            "daskllm": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }
