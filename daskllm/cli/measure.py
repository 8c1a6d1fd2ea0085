"""``daskllm bench``: loading, speed and memory on a work file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from daskllm.cli.options import cluster_options, failures, json_option, loading_options
from daskllm.cli.running import show

__all__ = ["bench"]


@click.command()
@loading_options
@click.option("--work", required=True, type=click.Path(dir_okay=False), help="A JSON list of {prompt, out}.")
@cluster_options
@click.option("--stages", type=click.IntRange(1), help="Cut the model's layers over so many of the workers.")
@click.option("--profile", is_flag=True, help="Say where the time of a run and of its steps goes.")
@json_option
def bench(
    model: str,
    revision: str | None,
    dtype: str,
    device: str,
    quantize: str | None,
    kv_dtype: str,
    kv_memory: str,
    work: str,
    workers: int | None,
    threads: int | None,
    stages: int | None,
    profile: bool,
    as_json: bool,
) -> None:
    """Measure loading, speed and memory on a work file."""
    from daskllm import bench as benchmark  # with torch, which other commands do without

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
            quantize=quantize,
            kv_dtype=kv_dtype,
            kv_memory=kv_memory,
            profile=profile,
        )
    if as_json or not profile:
        show(measured, as_json)
        return
    found = measured.pop("profile")
    show(measured, False)
    show({name: value for name, value in found.items() if name != "phases"}, False)
    for name, phase in found["phases"].items():
        Console().print(_steps(name, phase))


def _steps(name: str, phase: Mapping[str, Any]) -> Table:
    """The parts of one kind of steps, each beside what the machine could do at most."""
    steps, tokens = phase["steps"], f"{phase['prefill_tokens']:,} + {phase['decode_tokens']:,} tokens"
    title = (
        f"{steps:,} {name} steps of {1e3 * phase['seconds'] / steps:.2f} ms, {tokens}, "
        f"no kernel {phase['not_kernels']:.1%}"
    )
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("part")
    for heading in ("ms a step", "share", "GFLOP/s", "GB/s", "roofline"):
        table.add_column(heading, justify="right")
    for part, line in phase["parts"].items():
        took = line["seconds"]
        cells = [f"{1e3 * took / steps:.3f}", f"{line['share']:.1%}"]
        if "roofline" in line and took:
            cells += [f"{line['gflop'] / took:.1f}", f"{line['gb'] / took:.1f}", f"{line['roofline']:.0%}"]
        table.add_row(part, *cells)
    return table
