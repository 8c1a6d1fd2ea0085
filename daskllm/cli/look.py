"""``daskllm info`` and ``daskllm plan``: what a model is and where it would go; no weight is read."""

from __future__ import annotations

import json
import math
from typing import Any

import click
from dask.utils import parse_bytes

from daskllm.checkpoint import open_checkpoint
from daskllm.cli.options import failures, json_option, model_option, revision_option
from daskllm.cli.running import show
from daskllm.graph import (
    SCHEDULERS,
    SPLITTERS,
    Cluster,
    LayerGraph,
    Objective,
    Plan,
    Workload,
    make_plan,
    read_graph,
)
from daskllm.models import describe, sources
from daskllm.text.tokenizer import Tokenizer

__all__ = ["info", "plan"]

# What a plan is made for when nobody measured: a core pair of a current server, and memory without limit.
_FLOPS, _BANDWIDTH = 2e11, 2e10


@click.command()
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


@click.command()
@click.option("--model", help="A model directory or a Hugging Face Hub id.")
@click.option("--graph", type=click.Path(dir_okay=False), help="A layer-graph file instead of a model.")
@revision_option
@click.option("--devices", required=True, type=click.IntRange(1), help="How many equal devices there are.")
@click.option("--memory", help="Of each device, such as 16GiB; without limit unless given.")
@click.option("--stages", default="auto", help="Stages of a replica: a number, auto or best.")
@click.option("--rows", default=32, show_default=True, type=click.IntRange(1), help="Sequences at a time.")
@click.option("--context", default=1024, show_default=True, type=click.IntRange(1), help="Positions of each.")
@click.option("--splitter", default="exact", show_default=True, type=click.Choice(sorted(SPLITTERS)))
@click.option("--scheduler", default="greedy", show_default=True, type=click.Choice(sorted(SCHEDULERS)))
@json_option
def plan(
    model: str | None,
    graph: str | None,
    revision: str | None,
    devices: int,
    memory: str | None,
    stages: str,
    rows: int,
    context: int,
    splitter: str,
    scheduler: str,
    as_json: bool,
) -> None:
    """Which layers go on which device, and what that is expected to take."""
    with failures():
        if (model is None) == (graph is None):
            raise ValueError("give --model or --graph, one of them")
        limit = None if memory is None else float(parse_bytes(memory))
        if graph is not None:
            file = read_graph(graph)
            made = make_plan(
                file.graph,
                file.cluster(devices, memory=limit),
                splitter=splitter,
                scheduler=scheduler,
                stages="best",
                objective=Objective("period"),
            )
        else:
            load = Workload(rows=rows, context=context)
            made = _model_plan(str(model), revision, devices, limit, stages, load, splitter, scheduler)
    if as_json:
        click.echo(json.dumps({**json.loads(made.to_json()), "bottleneck": made.bottleneck}))
    else:
        click.echo(made.explain())


def _model_plan(
    model: str,
    revision: str | None,
    devices: int,
    memory: float | None,
    stages: str,
    workload: Workload,
    splitter: str,
    scheduler: str,
) -> Plan:
    if not (stages in ("auto", "best") or stages.isdecimal()):
        raise ValueError(f'stages must be a number, "auto" or "best", not {stages!r}')
    checkpoint = open_checkpoint(model, revision)
    try:
        config = describe(checkpoint.config)
    finally:
        checkpoint.close()
    cluster = Cluster.of(devices, math.inf if memory is None else memory, flops=_FLOPS, bandwidth=_BANDWIDTH)
    wanted: Any = int(stages) if stages.isdecimal() else stages
    return make_plan(
        LayerGraph.of(config),
        cluster,
        workload,
        splitter=splitter,
        scheduler=scheduler,
        stages=wanted,
    )
