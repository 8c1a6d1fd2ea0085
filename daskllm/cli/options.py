"""What the commands share on the way in: options, and errors as one line with exit status 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click
from distributed import KilledWorker
from distributed.client import FutureCancelledError

from daskllm.types import DaskLLMError, SamplingParams

__all__ = [
    "all_of",
    "answers_option",
    "cluster_options",
    "failures",
    "given",
    "json_option",
    "known_columns",
    "loading_options",
    "model_option",
    "resume_options",
    "revision_option",
    "sampling_options",
]

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


CLUSTER_ERRORS = (KilledWorker, FutureCancelledError)  # a lost connection is an OSError


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
    except (DaskLLMError, ValueError, OverflowError, OSError, *CLUSTER_ERRORS) as error:
        raise Failure(" ".join(str(error).split()) or type(error).__name__) from error


@contextmanager
def known_columns() -> Iterator[None]:
    """Around the building of a call, where a KeyError is the name of a column or field that is not there."""
    try:
        yield
    except KeyError as error:
        raise Failure(str(error.args[0])) from error


def all_of(*options: Decorator) -> Decorator:
    """Several click options as one decorator, shown in the order given."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class RowsOrShare(click.ParamType):
    """A whole number as it is, a number with a point or a % as a share."""

    name = "N|SHARE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        text = str(value)
        try:
            if text.endswith("%"):
                return float(text.removesuffix("%")) / 100
            return float(text) if "." in text else int(text)
        except ValueError:
            self.fail(f"{text!r} is neither a number of rows nor a share such as 0.05 or 5%", param, ctx)


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
    click.option("--quantize", type=click.Choice(["int8"]), help="Weights in eight bits; CPUs only."),
    click.option(
        "--kv-dtype", type=click.Choice(["auto", "int8"]), default="auto", help="Of keys and values."
    ),
    click.option("--kv-memory", default="auto", help="Of the KV cache in each process, such as 2GiB."),
)
answers_option = click.option(
    "--no-answers",
    "forget",
    is_flag=True,
    help="Neither look up what was answered before nor keep what is answered now.",
)
resume_options = all_of(
    click.option("--no-resume", is_flag=True, help="Refuse an output directory that holds a job already."),
    click.option("--overwrite", is_flag=True, help="Begin again, over whatever job the output holds."),
    click.option("--retry-errors", is_flag=True, help="Ask the failed rows of finished parts again."),
    click.option(
        "--on-error",
        type=click.Choice(["keep", "drop", "raise"]),
        default="keep",
        show_default=True,
        help="A row that failed stays with its reason, is left out, or ends the job.",
    ),
    click.option(
        "--max-errors",
        type=RowsOrShare(),
        help="Stop when more rows failed: a number of them, or a share such as 0.05 or 5%.",
    ),
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
