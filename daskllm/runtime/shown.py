"""A model as notebooks show it: what it is, how it was opened, where its layers are.

It owns which facts those are, all of them at hand: nothing is opened, measured or asked of a cluster. It
refuses to know what the pieces look like (`markup`, `graph.show`).
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from daskllm import markup
from daskllm.graph import draw, show
from daskllm.runtime.resident import resident_bytes
from daskllm.runtime.sizes import dtype_of
from daskllm.types import ModelError

if TYPE_CHECKING:
    from distributed import Client

    from daskllm.models import DecoderConfig
    from daskllm.runtime.facts import Facts
    from daskllm.types import ModelSpec

__all__ = ["model_html"]


def model_html(facts: Facts, client: Client | None) -> markup.HTML:
    """A model by what is known of it in this process.

    Args:
        client: that it was loaded with.
    """
    spec = facts.spec
    title = f"LLM {PurePath(spec.path).name}"
    try:
        config, graph = facts.config, facts.graph
    except ModelError as error:
        return markup.card(title, markup.quote(error, colour=4))
    weights, kv = draw.size(show.weight_bytes(graph)), draw.size(graph.total("kv_bytes"))
    opened = [dtype_of(spec, config), *([] if spec.quantize is None else [f"quantised to {spec.quantize}"])]
    device = "a GPU where there is one" if spec.device == "auto" else spec.device
    lines = [
        ("model", spec.path if spec.revision is None else f"{spec.path} at {spec.revision}"),
        ("shape", _shape(config)),
        ("size", f"{weights} of weights, {kv} of KV for a token"),
        ("opened as", f"{', '.join(opened)}; on {device}; version {spec.version} of the weights"),
        ("where", _where(spec, client)),
    ]
    parts = [markup.facts(lines), show.weights_strip(graph)]
    if spec.chains:
        parts.append(_stages(spec))
    return markup.card(title, *parts, note=config.family)


def _shape(config: DecoderConfig) -> str:
    heads = f"{config.num_heads} heads of {config.head_dim}"
    if config.num_kv_heads != config.num_heads:
        heads += f" ({config.num_kv_heads} for keys and values)"
    return (
        f"{config.num_layers} layers of {config.hidden_size}, {heads}, vocabulary {config.vocab_size:,}, "
        f"context {config.max_positions:,}"
    )


def _where(spec: ModelSpec, client: Client | None) -> str:
    if client is None and not spec.chains:
        held = sum(resident_bytes(spec).values())
        return f"this process, {draw.size(held)} resident" if held else "this process, not open now"
    at = "its client's cluster" if client is None else client.scheduler_info()["address"]
    if not spec.chains:
        return f"a copy in every worker of {at} that answers rows"
    stages = sorted({len(chain.stages) for chain in spec.chains})
    return f"{len(spec.chains)} replica(s) of {' or '.join(map(str, stages))} stage(s) on {at}"


def _stages(spec: ModelSpec) -> markup.HTML:
    rows = [
        (i, j, stage.worker, draw.layer_range(stage.layers))
        for i, chain in enumerate(spec.chains)
        for j, stage in enumerate(chain.stages)
    ]
    return markup.table(("replica", "stage", "worker", "layers"), rows)
