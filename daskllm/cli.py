"""The command line: ``daskllm demo | generate | bench | info`` and ``python -m daskllm``.

Owns what a terminal needs: options, progress, tables on the screen, one clear line and exit status 2 for a
bad call, and with ``--json`` one JSON line last. What it runs are the public calls that a notebook makes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import dask.dataframe as dd
import pandas as pd
from distributed import Client, LocalCluster
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from daskllm import __version__
from daskllm import bench as benchmark
from daskllm import demo as bundled
from daskllm.checkpoint import open_checkpoint
from daskllm.llm import load
from daskllm.machine import cores
from daskllm.models import describe, sources
from daskllm.runtime.progress import Increment, follow
from daskllm.tables import read_tables
from daskllm.text.tokenizer import Tokenizer
from daskllm.types import DaskLLMError, SamplingParams

__all__ = ["main"]

THREADS_PER_WORKER = 2
SHOWN_ANSWERS = 12
Decorator = Callable[[Callable[..., None]], Callable[..., None]]


class Failure(click.ClickException):
    """A call that cannot be done: one line on stderr, exit status 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"daskllm: {self.format_message()}", file=file, err=True)


@contextmanager
def failures() -> Iterator[None]:
    """Turn the errors that are the caller's to mend into one line; a bug keeps its traceback."""
    try:
        yield
    except KeyError as error:
        raise Failure(str(error.args[0]) if error.args else "missing key") from error
    except (DaskLLMError, ValueError, OSError) as error:
        raise Failure(" ".join(str(error).split())) from error


def all_of(*options: Decorator) -> Decorator:
    """Several click options as one decorator, shown in the order given."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON line last.")
model_option = click.option("--model", required=True, help="A model directory or a Hugging Face Hub id.")
revision_option = click.option("--revision", help="Branch, tag or commit of a Hub model.")
loading_options = all_of(
    model_option,
    revision_option,
    click.option(
        "--dtype",
        default="auto",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        help="Of the arithmetic; auto is the checkpoint's own.",
    ),
    click.option("--device", default="auto", help="cpu, cuda or auto."),
    click.option("--kv-memory", default="auto", help="Of the KV cache in each process, such as 2GiB."),
)
cluster_options = all_of(
    click.option("--workers", type=click.IntRange(1), help="Run on a local cluster of so many processes."),
    click.option("--threads", type=click.IntRange(1), help="Tasks in flight per worker (2)."),
)
sampling_options = all_of(
    click.option("--max-tokens", type=int, help="At most this many new tokens (128)."),
    click.option("--min-tokens", type=int, help="At least this many new tokens."),
    click.option("--temperature", type=float, help="0 takes the most likely token."),
    click.option("--top-p", type=float, help="Keep the smallest set that reaches this probability."),
    click.option("--top-k", type=int, help="Keep the k most likely tokens; 0 keeps all."),
    click.option("--min-p", type=float, help="Drop tokens below this share of the most likely one."),
    click.option("--repetition-penalty", type=float),
    click.option("--presence-penalty", type=float),
    click.option("--frequency-penalty", type=float),
    click.option("--stop", multiple=True, help="A string that ends a row; may be given again."),
    click.option(
        "--stop-token-id", "stop_token_ids", type=int, multiple=True, help="A token id that ends a row."
    ),
    click.option("--seed", type=int, help="The same answers whatever the partitions and workers."),
    click.option("--ignore-eos", is_flag=True, help="Go on past the model's own end tokens."),
    click.option(
        "--truncate", type=click.Choice(["left"]), help="Cut prompts that do not fit, from the left."
    ),
)


def given(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling options that were set, checked before any work."""
    chosen = {
        name: value
        for name, value in sampling.items()
        if value is not None and value != () and value is not False
    }
    SamplingParams.of(chosen)
    return chosen


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """A table of prompts in, a table of answers out."""


# --- running on Dask ------------------------------------------------------------------------------------


@contextmanager
def local_cluster(workers: int, threads: int) -> Iterator[Client]:
    """Worker processes on this machine, their dashboard on the loopback address only."""
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            memory_limit=0,  # weights and KV cache are sized by daskllm itself
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def running_on(scheduler: str | None, workers: int | None, threads: int | None) -> Iterator[Client | None]:
    """A client of the scheduler named, of a local cluster, or None for threads in this process."""
    if scheduler is not None:
        if workers is not None or threads is not None:
            raise ValueError("--scheduler names a running cluster: leave out --workers and --threads")
        with Client(scheduler, timeout="10s") as client:
            yield client
    elif workers is not None:
        with local_cluster(workers, threads or THREADS_PER_WORKER) as client:
            yield client
    elif threads is not None:
        raise ValueError("--threads counts the tasks in flight per worker: give --workers as well")
    else:
        yield None


@contextmanager
def progress_bar(rows: int, client: Client | None) -> Iterator[None]:
    """A bar of rows with tokens per second and errors, while the block runs."""
    begun, tokens, errors = time.perf_counter(), 0, 0
    with tqdm(total=rows, unit="row", dynamic_ncols=True) as bar:

        def advance(new: Increment) -> None:
            nonlocal tokens, errors
            tokens += new.output_tokens
            errors += new.errors
            speed = tokens / (time.perf_counter() - begun)
            bar.set_postfix_str(f"{speed:,.0f} tokens/s, {errors} errors", refresh=False)
            # A row that a lost worker had answered is reported again by the next.
            bar.update(min(new.rows, rows - bar.n))

        with follow(client, advance):
            yield
        bar.update(rows - bar.n)  # the last reports may still be on their way


def write(answered: dd.DataFrame, output: Path, client: Client | None, rows: int) -> float:
    """Compute and write a frame as Parquet, a file per partition; the seconds it took."""
    begun = time.perf_counter()
    task = answered.to_parquet(
        str(output), write_index=answered.index.name is not None, write_metadata_file=False, compute=False
    )
    with progress_bar(rows, client):
        if client is None:
            task.compute(scheduler="threads")
        else:
            client.compute(task).result()
    return time.perf_counter() - begun


def summary(output: Path, column: str, seconds: float) -> dict[str, Any]:
    """What was written: rows, errors, tokens and speed, read back from the files."""
    counted = [f"{column}_finish_reason", f"{column}_prompt_tokens", f"{column}_completion_tokens"]
    written = pd.read_parquet(output, columns=counted)
    tokens = int(written[counted[2]].sum())
    return {
        "rows": len(written),
        "errors": int((written[counted[0]] == "error").sum()),
        "prompt_tokens": int(written[counted[1]].sum()),
        "out_tokens": tokens,
        "seconds": round(seconds, 3),
        "out_tokens_per_s": round(tokens / seconds, 1),
        "output": str(output),
    }


def closing_line(done: Mapping[str, Any]) -> str:
    """``12 rows, 340 tokens in 1.2 s, 283 tokens/s, 0 errors``, and the share of right answers if known."""
    line = (
        f"{done['rows']:,} rows, {done['out_tokens']:,} tokens in {done['seconds']:.1f} s, "
        f"{done['out_tokens_per_s']:,.0f} tokens/s, {done['errors']:,} errors"
    )
    return line + (f", {done['right']:.1%} right" if "right" in done else "")


def close(done: Mapping[str, Any], as_json: bool) -> None:
    """Print how it went."""
    click.echo(f"{closing_line(done)} -> {done['output']}", err=as_json)
    if as_json:
        click.echo(json.dumps(done))


def new_directory(output: str) -> Path:
    """The output directory, made if it is missing; refused when something lies in it."""
    path = Path(output)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise ValueError(f"output directory {path} is not empty: name a new one, or remove what it holds")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"output directory {path} cannot be written to")
    return path


# --- commands -------------------------------------------------------------------------------------------


@main.command()
@click.option(
    "--input", "inputs", required=True, multiple=True, help="Parquet, CSV or JSONL files; globs too."
)
@click.option("--prompt", required=True, help='A column, or a template such as "Translate: {text}".')
@click.option("--output", required=True, help="A new directory; gets a Parquet file per partition.")
@click.option("--column", default="generated", show_default=True, help="Name of the column of answers.")
@click.option("--chat", is_flag=True, help="Ask through the model's chat template.")
@click.option("--system", help="What the system message says.")
@loading_options
@click.option("--scheduler", help="Address of a running Dask scheduler, such as tcp://10.0.0.1:8786.")
@cluster_options
@sampling_options
@json_option
def generate(
    inputs: tuple[str, ...],
    prompt: str,
    output: str,
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
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer a table of prompts: every input column stays, the answers' columns are added."""
    with failures():
        chosen = given(sampling)
        target = new_directory(output)
        with running_on(scheduler, workers, threads) as client:
            slots = sum(client.nthreads().values()) if client else THREADS_PER_WORKER
            frame, rows = read_tables(inputs, slots)
            llm = load(
                model, revision=revision, dtype=dtype, device=device, kv_memory=kv_memory, client=client
            )
            ask = frame.llm.chat if chat else frame.llm.generate
            answered = ask(llm, prompt, output=column, system=system, **chosen)
            seconds = write(answered, target, client, rows)
        close(summary(target, column, seconds), as_json)


@main.command()
@click.option("--output", default="demo-answers", show_default=True, help="Directory of the Parquet answers.")
@json_option
def demo(output: str, as_json: bool) -> None:
    """The bundled model answers the bundled table on a local Dask cluster."""
    console = Console(stderr=as_json)
    with failures():
        target = emptied(Path(output))
        table = bundled.table()
        workers = min(2, cores())
        with local_cluster(workers, THREADS_PER_WORKER) as client:
            console.print(f"{workers} workers; Dask dashboard: {client.dashboard_link}", highlight=False)
            llm = load(str(bundled.model_path()), client=client)
            frame = dd.from_pandas(table, npartitions=4 * workers)
            answered = frame.llm.chat(llm, "prompt", max_tokens=64)
            seconds = write(answered, target, client, len(table))
        answers = pd.read_parquet(target)
        console.print(answer_table(answers))
        close({**summary(target, "generated", seconds), "right": bundled.share_right(answers)}, as_json)


def emptied(output: Path) -> Path:
    """The demo's own directory: what an earlier run left there is removed, anything else is refused."""
    if output.is_dir():
        for file in output.glob("part.*.parquet"):
            file.unlink()
    return new_directory(str(output))


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


@main.command()
@loading_options
@click.option("--work", required=True, type=click.Path(dir_okay=False), help="A JSON list of {prompt, out}.")
@cluster_options
@json_option
def bench(
    model: str,
    revision: str | None,
    dtype: str,
    device: str,
    kv_memory: str,
    work: str,
    workers: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure loading, speed and memory on a work file."""
    with failures():
        rows = benchmark.read_work(work)
        measured = benchmark.measure(
            model,
            rows,
            workers=workers,
            threads=threads,
            revision=revision,
            dtype=dtype,
            device=device,
            kv_memory=kv_memory,
        )
    show(measured, as_json)


@main.command()
@model_option
@revision_option
@json_option
def info(model: str, revision: str | None, as_json: bool) -> None:
    """What a model is, from its config and the headers of its files; no weight is read."""
    with failures():
        facts = model_facts(model, revision)
    show(facts, as_json)


def model_facts(model: str, revision: str | None) -> dict[str, Any]:
    """A model's shape, size and tokenizer."""
    checkpoint = open_checkpoint(model, revision)
    try:
        config = describe(checkpoint.config)
        used = {
            source.name: source.shape
            for blocks in sources(config, checkpoint.names).values()
            for source in blocks.values()
        }
        parameters = sum(math.prod(shape) for shape in used.values())
        tokenizer = Tokenizer.from_directory(checkpoint.path)
        return {
            "model": str(model),
            "path": str(checkpoint.path),
            "family": config.family,
            "parameters": parameters,
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "context": config.max_positions,
            "dtype": config.dtype,
            "chat_template": tokenizer.has_chat_template,
            "eos_token_ids": list(config.eos_token_ids),
        }
    finally:
        checkpoint.close()


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Facts as a table, or as one JSON line."""
    if as_json:
        click.echo(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if type(value) is int else escape(str(value)))
    Console().print(table)
