"""``daskllm generate`` and ``daskllm demo``: a table of prompts in, a table of answers out."""

from __future__ import annotations

from pathlib import Path
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
    sampling_options,
)
from daskllm.cli.running import (
    THREADS_PER_WORKER,
    close,
    explained,
    new_directory,
    part_name,
    running_on,
    summary,
    write,
)
from daskllm.llm import load
from daskllm.machine import cores
from daskllm.runtime.deploy import local_cluster
from daskllm.tables import read_tables

__all__ = ["demo", "generate"]

SHOWN_ANSWERS = 12
MARKER = "_daskllm_demo"
"""Lists the files that a demo writes beside it. Readers of Parquet skip names that begin so."""


@click.command()
@click.option(
    "--input", "inputs", required=True, multiple=True, help="Parquet, CSV or JSONL files; globs too."
)
@click.option("--prompt", required=True, help='A column, or a template such as "Translate: {text}".')
@click.option("--output", help="A new directory; gets a Parquet file per partition.")
@click.option("--dry-run", is_flag=True, help="Say what it would take, and answer a few rows at most.")
@click.option("--column", default="generated", show_default=True, help="Name of the column of answers.")
@click.option("--chat", is_flag=True, help="Ask through the model's chat template.")
@click.option("--system", help="What the system message says.")
@loading_options
@click.option("--scheduler", help="Address of a running Dask scheduler, such as tcp://10.0.0.1:8786.")
@cluster_options
@answers_option
@sampling_options
@json_option
def generate(
    inputs: tuple[str, ...],
    prompt: str,
    output: str | None,
    dry_run: bool,
    column: str,
    chat: bool,
    system: str | None,
    model: str,
    revision: str | None,
    dtype: str,
    device: str,
    kv_memory: str,
    scheduler: str | None,
    workers: int | None,
    threads: int | None,
    forget: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer a table of prompts: every input column stays, the answers' columns are added."""
    with failures():
        chosen = given(sampling)
        target = None if dry_run else new_directory(output)
        with running_on(scheduler, workers, threads) as client:
            slots = sum(client.nthreads().values()) if client else THREADS_PER_WORKER
            frame, rows, kinds = read_tables(inputs, slots)
            llm = load(
                model,
                revision=revision,
                dtype=dtype,
                device=device,
                kv_memory=kv_memory,
                client=client,
                answers=None if forget else "auto",
            )
            ask = frame.llm.chat if chat else frame.llm.generate
            with known_columns():
                answered = ask(llm, prompt, output=column, system=system, **chosen)
            if target is None:
                explained(answered.llm.explain(), as_json)
                return
            took = write(answered, target, client, rows, kinds)
        close(summary(target, column, *took), as_json)


@click.command()
@click.option("--output", default="demo-answers", show_default=True, help="Directory of the Parquet answers.")
@json_option
def demo(output: str, as_json: bool) -> None:
    """The bundled model answers the bundled table on a local Dask cluster."""
    console = Console(stderr=as_json)
    with failures():
        table = bundled.table()
        workers = min(2, cores())
        target = own_directory(Path(output), 4 * workers)
        with local_cluster(workers, THREADS_PER_WORKER) as cluster, Client(cluster) as client:
            console.print(f"{workers} workers; Dask dashboard: {client.dashboard_link}", highlight=False)
            llm = load(str(bundled.model_path()), client=client, answers=None)
            frame = dd.from_pandas(table, npartitions=4 * workers)
            answered = frame.llm.chat(llm, "prompt", max_tokens=64)
            took = write(answered, target, client, len(table))
        answers = pd.read_parquet(target)
        console.print(answer_table(answers))
        close({**summary(target, "generated", *took), "right": bundled.share_right(answers)}, as_json)


def own_directory(output: Path, parts: int) -> Path:
    """The demo's own directory: what an earlier run says is its own is removed, anything else is refused."""
    marker = output / MARKER
    if marker.is_file():
        for name in marker.read_text().split():
            (output / Path(name).name).unlink(missing_ok=True)
        marker.unlink()
    target = new_directory(str(output))
    marker.write_text("\n".join(map(part_name, range(parts))))
    return target


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
