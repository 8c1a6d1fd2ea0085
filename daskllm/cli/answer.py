"""``daskllm generate`` and ``daskllm demo``: a table of prompts in, a table of answers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
import dask.dataframe as dd
import pandas as pd
from distributed import Client
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from daskllm import demo as bundled
from daskllm.cli.options import (
    answers_option,
    cluster_options,
    failures,
    given,
    json_option,
    known_columns,
    loading_options,
    resume_options,
    sampling_options,
)
from daskllm.cli.running import (
    THREADS_PER_WORKER,
    check_cluster,
    close,
    explained,
    finished,
    running_on,
    summary,
    write,
)
from daskllm.frame import call_over
from daskllm.jobs import Directory, Input, Limit, Manifest, OnError, look, prepare, stat_input
from daskllm.llm import LLM, load
from daskllm.machine import cores
from daskllm.runtime.call import Call, Kind
from daskllm.runtime.deploy import local_cluster
from daskllm.runtime.loading import specify
from daskllm.tables import Tables, input_files, read_tables

__all__ = ["demo", "generate"]

SHOWN_ANSWERS = 12


@click.command()
@click.option(
    "--input", "inputs", required=True, multiple=True, help="Parquet, CSV or JSONL files; globs too."
)
@click.option("--prompt", required=True, help='A column, or a template such as "Translate: {text}".')
@click.option("--output", help="A directory; gets a Parquet file per partition.")
@click.option("--dry-run", is_flag=True, help="Say what it would take, and answer a few rows at most.")
@click.option("--column", default="generated", show_default=True, help="Name of the column of answers.")
@click.option("--chat", is_flag=True, help="Ask through the model's chat template.")
@click.option("--system", help="What the system message says.")
@loading_options
@click.option("--scheduler", help="Address of a running Dask scheduler, such as tcp://10.0.0.1:8786.")
@cluster_options
@answers_option
@sampling_options
@resume_options
@json_option
def generate(
    inputs: tuple[str, ...],
    output: str | None,
    dry_run: bool,
    prompt: str,
    column: str,
    chat: bool,
    system: str | None,
    scheduler: str | None,
    workers: int | None,
    threads: int | None,
    forget: bool,
    as_json: bool,
    no_resume: bool,
    overwrite: bool,
    retry_errors: bool,
    on_error: OnError,
    max_errors: float | None,
    model: str,
    revision: str | None,
    dtype: str,
    device: str,
    quantize: str | None,
    kv_dtype: str,
    kv_memory: str,
    **sampling: Any,
) -> None:
    """Answer a table of prompts: every input column stays, the answers' columns are added.

    The same command goes on where an earlier one was cut off, part by part.
    """
    loading: dict[str, Any] = {
        "revision": revision,
        "dtype": dtype,
        "device": device,
        "quantize": quantize,
        "kv_dtype": kv_dtype,
        "kv_memory": kv_memory,
    }
    place: dict[str, Any] = {"resume": not no_resume, "overwrite": overwrite, "on_error": on_error}
    with failures():
        question = Question(prompt, column, chat, system, given(sampling))
        limit = Limit(max_errors)
        check_cluster(scheduler, workers, threads)
        there = None
        if not dry_run:
            there = job_there(inputs, output, question, LLM(specify(model, **loading)[0]), place)
        if there is not None and there.finished and not retry_errors:
            limit.check(list(there.done.values()), on_error, at_end=True)
            close(summary(finished(there, str(output)), 0, str(output)), as_json)
            return
        with running_on(scheduler, workers, threads) as client:
            frame, rows, types = read_again(inputs, client, there)
            llm = load(model, client=client, answers=None if forget else "auto", **loading)
            answered = question.asked_of(frame, llm)
            if output is None or dry_run:
                explained(answered.llm.explain(), as_json)
                return
            options = {"max_errors": max_errors, "retry_errors": retry_errors, **place}
            job = prepare(answered, output, client=client, types=types, rows=rows, **options)
            took = write(job, client, rows)
        close(summary(*took, output), as_json)


@dataclass(frozen=True, slots=True)
class Question:
    """What a command asks of each row."""

    prompt: str
    column: str
    chat: bool
    system: str | None
    sampling: Mapping[str, Any]

    def over(self, columns: pd.Index, llm: LLM) -> Call:
        """The question over a table of these columns."""
        kind: Kind = "chat" if self.chat else "generate"
        options: dict[str, Any] = {"system": self.system, "sampling": self.sampling}
        with known_columns():
            return call_over(columns, llm, kind, self.prompt, output=self.column, **options)

    def asked_of(self, frame: dd.DataFrame, llm: LLM) -> dd.DataFrame:
        """A table with the answers."""
        ask = frame.llm.chat if self.chat else frame.llm.generate
        with known_columns():
            return ask(llm, self.prompt, output=self.column, system=self.system, **self.sampling)


def job_there(
    inputs: Sequence[str], output: str | None, question: Question, llm: LLM, place: Mapping[str, Any]
) -> Manifest | None:
    """The job that the output directory holds, if it is this one; the directory is made.

    Args:
        llm: known by its files; nothing is loaded.
        place: what to do about a job that is there.
    """
    if not output:
        raise ValueError("--output names the directory of the answers; only --dry-run goes without it")
    files: list[Input] | None = None
    try:
        files = [stat_input(file) for file in input_files(inputs)[0]]
    except FileNotFoundError:
        if place["overwrite"] or Manifest.read(Directory(output)) is None:
            raise
    there = look(output, files, lambda columns: question.over(columns, llm), **place)
    if files is None and there is not None and not there.finished:
        input_files(inputs)  # only a job that is done goes without
    return there


def read_again(inputs: Sequence[str], client: Client | None, there: Manifest | None) -> Tables:
    """The input, cut as it was for the job that is there."""
    slots = sum(client.nthreads().values()) if client else THREADS_PER_WORKER
    if there is None:
        return read_tables(inputs, slots)
    what = there.description
    known = {name: kind for name, kind in what.types if kind is not None}
    return read_tables(inputs, slots, what.partitions, what.rows)._replace(kinds=known)


@click.command()
@click.option("--output", default="demo-answers", show_default=True, help="Directory of the Parquet answers.")
@json_option
def demo(output: str, as_json: bool) -> None:
    """The bundled model answers the bundled table on a local Dask cluster."""
    console = Console(stderr=as_json)
    with failures():
        table = bundled.table()
        workers = min(2, cores())
        with local_cluster(workers, THREADS_PER_WORKER) as cluster, Client(cluster) as client:
            console.print(f"{workers} workers; Dask dashboard: {client.dashboard_link}", highlight=False)
            llm = load(str(bundled.model_path()), client=client, answers=None)
            frame = dd.from_pandas(table, npartitions=4 * workers)
            answered = frame.llm.chat(llm, "prompt", max_tokens=64)
            took = write(prepare(answered, output, client=client, overwrite=True), client, len(table))
        answers = pd.read_parquet(output)
        console.print(answer_table(answers))
        close({**summary(*took, output), "right": bundled.share_right(answers)}, as_json)


def answer_table(answers: pd.DataFrame) -> Table:
    """A dozen answers as a table for the screen, spread over the tasks and languages."""
    shown = answers.groupby(["task", "language"], sort=False).head(1).head(SHOWN_ANSWERS)
    table = Table("task", show_lines=True)
    table.add_column("prompt", overflow="fold")  # Chinese has no spaces to wrap at
    table.add_column("answer", overflow="fold")
    table.add_column("right?")
    for row in shown.to_dict("records"):
        failed = row["generated_finish_reason"] == "error"
        text = row["generated_error" if failed else "generated"]
        right = bundled.share_right(pd.DataFrame([row])) == 1
        mark = "[green]yes[/]" if right else "[red]no[/]"
        table.add_row(
            f"{row['task']} ({row['language']})", escape(str(row["prompt"])), escape(str(text)), mark
        )
    return table
