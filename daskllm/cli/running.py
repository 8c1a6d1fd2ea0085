"""What the commands share on the way out: clusters, progress, jobs, tables and closing lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import click
from distributed import Client
from distributed.security import Security
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from daskllm.jobs import Explanation, Job, Manifest, Summary, run
from daskllm.jobs.watch import progress_bar, watching
from daskllm.runtime.deploy import local_cluster

__all__ = [
    "THREADS_PER_WORKER",
    "check_cluster",
    "close",
    "explained",
    "finished",
    "running_on",
    "show",
    "summary",
    "write",
]

THREADS_PER_WORKER = 2
WORKER_SECONDS = 30
"""How long a scheduler without workers is given to get one."""


@contextmanager
def running_on(scheduler: str | None, workers: int | None, threads: int | None) -> Iterator[Client | None]:
    """A client of the scheduler named, of a local cluster, or None for threads in this process."""
    check_cluster(scheduler, workers, threads)
    if scheduler is not None:
        with Client(scheduler, timeout="10s") as client:
            # After a scheduler was started again, its workers come one after the other.
            with suppress(TimeoutError):
                client.wait_for_workers(1, timeout=WORKER_SECONDS)
            yield client
    elif workers is not None:
        with local_cluster(workers, threads or THREADS_PER_WORKER) as cluster, Client(cluster) as client:
            yield client
    else:
        yield None


def check_cluster(scheduler: str | None, workers: int | None, threads: int | None) -> None:
    """Refuse options that do not go together, or lack what they need (ValueError)."""
    if scheduler is not None and (workers is not None or threads is not None):
        raise ValueError("--scheduler names a running cluster: leave out --workers and --threads")
    if scheduler is None and workers is None and threads is not None:
        raise ValueError("--threads counts the tasks in flight per worker: give --workers as well")
    if (scheduler or "").startswith("tls://") and not Security().get_connection_args("client")["ssl_context"]:
        raise ValueError(
            f"--scheduler {scheduler} wants certificates, and Dask's settings name none: give their files as "
            "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT and "
            "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY (cluster/README.md)"
        )


def write(job: Job, client: Client | None, rows: int | None = None) -> tuple[Summary, int]:
    """Run a job to its end, with a bar; how it went, and how many rows were remembered.

    Args:
        rows: of the table, where that is known.
    """
    before = job.manifest.totals()["rows"]
    left = None if rows is None else rows - before
    with watching(job.expr, client, left, job.left) as eta, progress_bar(eta, before):
        done = run(job, client)
    return done, min(eta.state().remembered, done.rows + done.errors)


def finished(job: Manifest, output: str) -> Summary:
    """How a job went that is done already."""
    parts = job.description.parts
    return Summary(output, parts, written=0, **job.totals(), seconds=0.0, new_tokens=0)


def summary(done: Summary, remembered: int, output: str) -> dict[str, Any]:
    """What a command says of a job: rows, errors, tokens and speed.

    Rows that were remembered or there before took no time, so that without others there is no speed.
    """
    speed = None if remembered or not done.new_tokens else round(done.new_tokens / done.seconds, 1)
    return {
        "rows": done.rows,
        "errors": done.errors,
        "prompt_tokens": done.prompt_tokens,
        "out_tokens": done.out_tokens,
        "seconds": round(done.seconds, 3),
        "out_tokens_per_s": speed,
        "remembered": remembered,
        "parts": done.parts,
        "written": done.written,
        "output": output,
    }


def closing_line(done: Mapping[str, Any]) -> str:
    """``12 rows, 340 tokens in 1.2 s, 283 tokens/s, 0 errors``, and the share of right answers if known."""
    notes = [f"{done['errors']:,} errors"]
    if done["out_tokens_per_s"] is not None:
        notes.insert(0, f"{done['out_tokens_per_s']:,.0f} tokens/s")
    if done["remembered"]:
        notes.insert(0, f"{done['remembered']:,} rows remembered")
    if done["written"] < done["parts"]:
        notes.insert(0, f"{done['parts'] - done['written']:,} of {done['parts']:,} parts there before")
    if "right" in done:
        notes.append(f"{done['right']:.1%} right")
    start = f"{done['rows']:,} rows, {done['out_tokens']:,} tokens in {done['seconds']:.1f} s"
    return ", ".join([start, *notes])


def close(done: Mapping[str, Any], as_json: bool) -> None:
    """Print how it went."""
    click.echo(f"{closing_line(done)} -> {done['output']}", err=as_json)
    if as_json:
        click.echo(json.dumps(done))


def explained(explanation: Explanation, as_json: bool) -> None:
    """Print what a job would take."""
    click.echo(str(explanation), err=as_json)
    if as_json:
        click.echo(json.dumps(explanation.to_dict()))


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Facts as a table, or as one JSON line."""
    if as_json:
        click.echo(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if type(value) is int else escape(str(value)))
    Console().print(table)
