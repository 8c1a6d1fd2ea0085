"""What the commands share on the way out: clusters, progress, Parquet, tables and closing lines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
from distributed import Client
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from daskllm.jobs.explanation import Explanation
from daskllm.runtime.deploy import local_cluster
from daskllm.runtime.progress import Increment, follow

__all__ = [
    "THREADS_PER_WORKER",
    "close",
    "explained",
    "new_directory",
    "part_name",
    "running_on",
    "show",
    "summary",
    "write",
]

THREADS_PER_WORKER = 2


@contextmanager
def running_on(scheduler: str | None, workers: int | None, threads: int | None) -> Iterator[Client | None]:
    """A client of the scheduler named, of a local cluster, or None for threads in this process."""
    if scheduler is not None:
        if workers is not None or threads is not None:
            raise ValueError("--scheduler names a running cluster: leave out --workers and --threads")
        with Client(scheduler, timeout="10s") as client:
            yield client
    elif workers is not None:
        with local_cluster(workers, threads or THREADS_PER_WORKER) as cluster, Client(cluster) as client:
            yield client
    elif threads is not None:
        raise ValueError("--threads counts the tasks in flight per worker: give --workers as well")
    else:
        yield None


@contextmanager
def progress_bar(rows: int, client: Client | None) -> Iterator[list[int]]:
    """A bar of rows with tokens per second and errors, while the block runs.

    Yields how many rows were remembered, report by report.
    """
    begun, tokens, errors = time.perf_counter(), 0, 0
    remembered: list[int] = []
    with tqdm(total=rows, unit="row", dynamic_ncols=True) as bar:

        def advance(new: Increment) -> None:
            nonlocal tokens, errors
            tokens += new.output_tokens
            errors += new.errors
            remembered.append(new.remembered)
            speed = tokens / (time.perf_counter() - begun)
            bar.set_postfix_str(f"{speed:,.0f} tokens/s, {errors} errors", refresh=False)
            # A row that a lost worker had answered is reported again by the next.
            bar.update(min(new.rows, rows - bar.n))

        with follow(client, advance):
            yield remembered
        bar.update(rows - bar.n)  # the last reports may still be on their way


def part_name(number: int) -> str:
    """The file of a partition; readers put files in the order of their names, so 10 must come after 9.

    >>> part_name(10)
    'part.00010.parquet'
    """
    return f"part.{number:05}.parquet"


def write(
    answered: dd.DataFrame,
    output: Path,
    client: Client | None,
    rows: int,
    kinds: Mapping[str, pa.DataType] | None = None,
) -> tuple[float, int]:
    """Compute and write a frame as Parquet, a file per partition; the seconds it took, the rows remembered.

    Args:
        kinds: what columns of Python objects hold, where that is not text.
    """
    begun = time.perf_counter()
    task = answered.to_parquet(
        str(output),
        write_index=answered.index.name is not None,
        write_metadata_file=False,
        name_function=part_name,
        schema=_schema(answered, kinds) if kinds else "infer",
        compute=False,
    )
    with progress_bar(rows, client) as remembered:
        if client is None:
            task.compute(scheduler="threads")
        else:
            client.compute(task).result()
    return time.perf_counter() - begun, min(sum(remembered), rows)


def _schema(frame: dd.DataFrame, kinds: Mapping[str, pa.DataType]) -> pa.Schema:
    """What Dask infers, but for the columns of those kinds, on which its inference fails."""
    example, named = frame._meta_nonempty, frame.index.name is not None
    rest = pa.Schema.from_pandas(example.drop(columns=list(kinds)), preserve_index=named)
    types = {field.name: field.type for field in rest} | dict(kinds)
    names = [*example.columns, *([frame.index.name] if named else [])]
    return pa.schema([(name, types[name]) for name in names])


def summary(output: Path, column: str, seconds: float, remembered: int) -> dict[str, Any]:
    """What was written: rows, errors, tokens and speed, read back from the files.

    Rows that were remembered took no time, so that with any of them there is no speed.
    """
    counted = [f"{column}_finish_reason", f"{column}_prompt_tokens", f"{column}_completion_tokens"]
    written = pd.read_parquet(output, columns=counted)
    tokens = int(written[counted[2]].sum())
    return {
        "rows": len(written),
        "errors": int((written[counted[0]] == "error").sum()),
        "prompt_tokens": int(written[counted[1]].sum()),
        "out_tokens": tokens,
        "seconds": round(seconds, 3),
        "out_tokens_per_s": None if remembered else round(tokens / seconds, 1),
        "remembered": remembered,
        "output": str(output),
    }


def closing_line(done: Mapping[str, Any]) -> str:
    """``12 rows, 340 tokens in 1.2 s, 283 tokens/s, 0 errors``, and the share of right answers if known."""
    speed = done["out_tokens_per_s"]
    line = (
        f"{done['rows']:,} rows, {done['out_tokens']:,} tokens in {done['seconds']:.1f} s, "
        + (f"{done['remembered']:,} rows remembered" if speed is None else f"{speed:,.0f} tokens/s")
        + f", {done['errors']:,} errors"
    )
    return line + (f", {done['right']:.1%} right" if "right" in done else "")


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


def new_directory(output: str | None) -> Path:
    """The output directory, made if it is missing; refused when something lies in it."""
    if output is None:
        raise ValueError("--output names the directory of the answers; only --dry-run goes without it")
    path = Path(output)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise ValueError(f"output directory {path} is not empty: name a new one, or remove what it holds")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"output directory {path} cannot be written to")
    return path


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Facts as a table, or as one JSON line."""
    if as_json:
        click.echo(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if type(value) is int else escape(str(value)))
    Console().print(table)
