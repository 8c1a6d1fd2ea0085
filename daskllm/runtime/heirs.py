"""What becomes of a model in stages when a worker of theirs is gone: its layers on those that are left.

A specification's heir is the same model with other stages, or with fewer chains of them. Whoever first finds
a stage lost plans it on the live workers and writes it down with the scheduler, where all others find it; two
who plan at once from the same workers make the same plan. It owns that record. It refuses to open anything
and to redo rows.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from daskllm.graph import PlanError
from daskllm.runtime.devices import recorded_speeds
from daskllm.runtime.placing import chains_of, cluster_of, plan_on
from daskllm.runtime.record import heir_keys
from daskllm.runtime.sizes import dtype_of
from daskllm.runtime.wire import Node, ask

if TYPE_CHECKING:
    from distributed import Client

    from daskllm.models import DecoderConfig
    from daskllm.runtime.devices import Speeds
    from daskllm.types import ModelSpec, StageSpec

__all__ = ["forget", "heirs_of", "succeed"]

PING_SECONDS = 2.0
"""A worker that does not answer for so long gets no stage."""
JOIN_SECONDS = 20.0
"""How long a model that fits nowhere waits for a worker to join, as a lost one's nanny starts another."""


async def succeed(
    node: Node, spec: ModelSpec, config: DecoderConfig, lost: Collection[ModelSpec] = ()
) -> ModelSpec:
    """Where a model that lost stages is now: itself where all its workers answer, else its heir.

    A chain of stages that lost a worker goes to workers that no other chain uses. Where there is no room for
    it, it waits for a worker to join while other chains answer rows, and is then given up.

    Args:
        lost: those of its chains that were seen to fail; of the others the scheduler's word is taken.

    Raises:
        PlanError: the workers that are left have no room for any chain, and none joined.
    """
    if (known := await _latest(node, spec)) != spec:
        return known
    speeds = await recorded_speeds(node, dtype_of(spec, config), spec.device)
    loop = asyncio.get_running_loop()
    patience = loop.time() + JOIN_SECONDS
    while True:
        workers = (await node.scheduler.identity())["workers"]
        answering = await _answering(node, workers)
        gone = [
            chain
            for chain in spec.chains
            if not all(s.worker in (answering if chain in lost else workers) for s in chain.stages)
        ]
        if not gone:
            return spec
        try:
            heir = _planned(spec, config, gone, answering, speeds, give_up=loop.time() > patience)
            break
        except (PlanError, ValueError):
            if loop.time() > patience:
                raise
            await asyncio.sleep(0.5)
    if (known := await _latest(node, spec)) != spec:
        return known
    # An heir's own record is of another time, should the layers be back where they once were.
    await node.scheduler.set_metadata(keys=heir_keys(heir), value=None)
    await node.scheduler.set_metadata(keys=heir_keys(spec), value=pickle.dumps(heir))
    return heir


async def _latest(node: Node, spec: ModelSpec) -> ModelSpec:
    """The heir of the heir of a specification, as far as they are written down."""
    heir: ModelSpec | None = spec
    while heir is not None:
        spec = heir
        heir = _read(await node.scheduler.get_metadata(keys=heir_keys(spec), default=None))
    return spec


def heirs_of(client: Client, spec: ModelSpec) -> Iterator[ModelSpec]:
    """A specification and its heirs, the present one last."""
    heir: ModelSpec | None = spec
    while heir is not None:
        yield heir
        heir = _read(client.get_metadata(heir_keys(heir), None)) if heir.chains else None


def forget(client: Client, spec: ModelSpec) -> None:
    """Let a specification have no heirs; the next call starts from its own stages."""
    for one in list(heirs_of(client, spec)):
        if one.chains:
            client.set_metadata(heir_keys(one), None)


def _planned(
    spec: ModelSpec,
    config: DecoderConfig,
    gone: Collection[ModelSpec],
    answering: Mapping[str, Any],
    speeds: Speeds,
    give_up: bool,
) -> ModelSpec:
    """Each lost chain with as many stages as before, or as many as there are workers left for it.

    What does not fit is left out where no other chain answers rows meanwhile.

    Args:
        give_up: leave it out where others do, too.
    """
    used = {stage.worker for chain in spec.chains if chain not in gone for stage in chain.stages}
    free = {address: facts for address, facts in answering.items() if address not in used}
    chains: list[tuple[StageSpec, ...]] = []
    failure: Exception | None = None
    for chain in spec.chains:
        if chain not in gone:
            chains.append(chain.stages)
            continue
        try:
            count = min(len(chain.stages), len(free))
            plan = plan_on(cluster_of(free, speeds=speeds), spec, config, count)
            (stages,) = chains_of(plan, config, free)
        except (PlanError, ValueError) as error:
            failure = error
            continue
        chains.append(stages)
        for stage in stages:
            del free[stage.worker]
    patient = not give_up and len(gone) < len(spec.chains)
    if failure is not None and (patient or not chains):
        raise failure
    return spec.with_chains(chains)


async def _answering(node: Node, workers: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's workers that answer at once: it does not hear of a death before others do."""
    pings = [asyncio.wait_for(ask(node, address, "ping"), PING_SECONDS) for address in workers]
    replies = await asyncio.gather(*pings, return_exceptions=True)
    return {
        address: facts
        for (address, facts), reply in zip(workers.items(), replies, strict=True)
        if not isinstance(reply, BaseException)
    }


def _read(written: bytes | None) -> ModelSpec | None:
    heir: ModelSpec | None = None if written is None else pickle.loads(written)
    return heir
