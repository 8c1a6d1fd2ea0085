"""What becomes of a model in stages when a worker of theirs is gone: its layers on those that are left.

A specification's heir is the same model with other stages. Whoever first finds a stage lost plans it on the
live workers and writes it down with the scheduler, where all others find it; two who plan at once from the
same workers make the same plan. It owns that record. It refuses to open anything and to redo rows.
"""

from __future__ import annotations

import asyncio
import hashlib
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from daskllm.graph import PlanError
from daskllm.runtime.placing import cluster_of, plan_on, stages_of
from daskllm.runtime.wire import Node, ask

if TYPE_CHECKING:
    from distributed import Client

    from daskllm.models import DecoderConfig
    from daskllm.types import ModelSpec

__all__ = ["forget", "heirs_of", "succeed"]

PING_SECONDS = 2.0
"""A worker that does not answer for so long gets no stage."""
JOIN_SECONDS = 20.0
"""How long a model that fits nowhere waits for a worker to join, as a lost one's nanny starts another."""


async def succeed(node: Node, spec: ModelSpec, config: DecoderConfig) -> ModelSpec:
    """Where a model that lost a stage is now: itself where all its workers answer, else its heir.

    Raises:
        PlanError: the workers that are left have no room for it, and none joined.
    """
    if (known := _read(await node.scheduler.get_metadata(keys=_keys(spec), default=None))) is not None:
        return known
    loop = asyncio.get_running_loop()
    patience = loop.time() + JOIN_SECONDS
    while True:
        workers = await _answering(node)
        if all(stage.worker in workers for stage in spec.stages):
            return spec
        try:
            heir = _planned(spec, config, workers)
            break
        except (PlanError, ValueError):
            if loop.time() > patience:
                raise
            await asyncio.sleep(0.5)
    if (known := _read(await node.scheduler.get_metadata(keys=_keys(spec), default=None))) is not None:
        return known
    await node.scheduler.set_metadata(keys=_keys(spec), value=pickle.dumps(heir))
    return heir


def heirs_of(client: Client, spec: ModelSpec) -> Iterator[ModelSpec]:
    """A specification and its heirs, the present one last."""
    heir: ModelSpec | None = spec
    while heir is not None:
        yield heir
        heir = _read(client.get_metadata(_keys(heir), None)) if heir.stages else None


def forget(client: Client, spec: ModelSpec) -> None:
    """Let a specification have no heirs; the next call starts from its own stages."""
    for one in list(heirs_of(client, spec)):
        if one.stages:
            client.set_metadata(_keys(one), None)


def _planned(spec: ModelSpec, config: DecoderConfig, workers: Mapping[str, Any]) -> ModelSpec:
    """As many stages as before, or as many as there are workers."""
    dtype = config.dtype if spec.dtype == "auto" else spec.dtype
    plan = plan_on(cluster_of(workers), config, dtype, min(len(spec.stages), len(workers)))
    return replace(spec, stages=stages_of(plan, config, workers))


async def _answering(node: Node) -> dict[str, Any]:
    """The scheduler's workers that answer at once: it does not hear of a death before others do."""
    known: Mapping[str, Any] = (await node.scheduler.identity())["workers"]
    pings = [asyncio.wait_for(ask(node, address, "ping"), PING_SECONDS) for address in known]
    replies = await asyncio.gather(*pings, return_exceptions=True)
    return {
        address: facts
        for (address, facts), reply in zip(known.items(), replies, strict=True)
        if not isinstance(reply, BaseException)
    }


def _keys(spec: ModelSpec) -> list[str]:
    return ["daskllm-heirs", hashlib.sha256(repr(spec).encode()).hexdigest()]


def _read(written: bytes | None) -> ModelSpec | None:
    heir: ModelSpec | None = None if written is None else pickle.loads(written)
    return heir
