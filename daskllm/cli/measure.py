"""``daskllm bench``: loading, speed and memory on a work file."""

from __future__ import annotations

import click

from daskllm import bench as benchmark
from daskllm.cli.options import cluster_options, failures, json_option, loading_options
from daskllm.cli.running import show

__all__ = ["bench"]


@click.command()
@loading_options
@click.option("--work", required=True, type=click.Path(dir_okay=False), help="A JSON list of {prompt, out}.")
@cluster_options
@click.option("--stages", type=click.IntRange(1), help="Cut the model's layers over so many of the workers.")
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
    stages: int | None,
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
            stages=stages,
            revision=revision,
            dtype=dtype,
            device=device,
            kv_memory=kv_memory,
        )
    show(measured, as_json)
