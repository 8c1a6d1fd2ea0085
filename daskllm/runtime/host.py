"""One worker's part in models that are cut into stages: its layers, and the steps that pass through them.

The worker of a model's last stage has the engine and opens the stages before it; a run has a name, and
messages of another run are refused. Steps go straight from worker to worker. The event loop waits for no
computation: loading and each stage's steps have threads of their own. Every worker of a run watches those
that it depends on by a request that ends only with them, so that a death is known at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from distributed.protocol import to_serialize

from daskllm import machine
from daskllm.engine.engine import EngineClosedError
from daskllm.engine.stage import Flight, Stage, StageTimes, kv_room, open_runner
from daskllm.runtime.calls import Calls
from daskllm.runtime.flights import pack, unpack
from daskllm.runtime.resident import close_model, model_for
from daskllm.runtime.versions import known, supersede, superseded
from daskllm.runtime.wire import Courier, Message, ask
from daskllm.runtime.worker import set_share
from daskllm.session import Session
from daskllm.types import ModelError, StageLostError

if TYPE_CHECKING:
    from distributed import Worker

    from daskllm.engine.layers import ResidentModel
    from daskllm.types import ModelSpec, StageSpec

__all__ = ["StageHost"]

logger = logging.getLogger(__name__)

CLOSED = "the model was closed"


@dataclass(eq=False)
class _Part:
    """One stage of one model on this worker.

    Attributes:
        run: the name of the engine's run that it belongs to.
        stage: its thread, unless it is the last stage, which has a `session`.
        over: set when it is no more; ``why`` says for what reason.
    """

    spec: ModelSpec
    number: int
    run: str
    model: ResidentModel | None = None
    stage: Stage | None = None
    session: Session | None = None
    courier: Courier | None = None
    watches: list[asyncio.Task[None]] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = CLOSED

    @property
    def layers(self) -> tuple[str, ...]:
        return self.spec.stages[self.number].layers

    @property
    def last(self) -> bool:
        return self.number == len(self.spec.stages) - 1


class StageHost:
    """The stages of one worker; made on its event loop, where all its methods run."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._parts: dict[ModelSpec, _Part] = {}
        # One for each model: two workers may each have the engine of one and a stage of the other.
        self._locks: defaultdict[ModelSpec, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._users: Counter[ModelSpec] = Counter()
        self._used: dict[ModelSpec, float] = {}
        self._sweeps: set[asyncio.Task[None]] = set()
        calls = Calls(self.enter, self.leave)
        handlers = (self.ping, self.hold, self.start, self.step, self.fault, self.watch, self.end)
        for handler in (*handlers, self.echo, self.prepare, calls.ask, calls.poll, calls.drop):
            worker.handlers[f"daskllm_{handler.__name__}"] = handler

    # --- the engine's side ----------------------------------------------------------------------------

    async def open(self, spec: ModelSpec) -> Session:
        """The session of a model whose last stage is this worker's; opens all its stages where need be.

        Raises:
            ModelError: a stage cannot be loaded; nothing of any stays.
            StageLostError: a stage's worker is gone.
        """
        async with self._locks[spec]:
            part = self._parts.get(spec)
            if part is None or part.session is None:
                part = await self._open(spec)
            assert part.session is not None
            return part.session

    async def enter(self, spec: ModelSpec, first: ModelSpec) -> Session:
        """As `open`, for a call: no update closes the session before it has left.

        Args:
            first: the specification of its version before any of its stages were lost.
        """
        if superseded(first):
            supersede(spec)
        self._users[spec] += 1
        try:
            return await self.open(spec)
        except BaseException:
            self.leave(spec)
            raise

    def leave(self, spec: ModelSpec) -> None:
        """A call is over."""
        self._used[spec] = time.monotonic()
        self._users[spec] -= 1
        if superseded(spec):
            task = asyncio.get_running_loop().create_task(self.sweep())
            self._sweeps.add(task)
            task.add_done_callback(self._sweeps.discard)

    async def sweep(self) -> None:
        """Close models, all their stages, whose engine is here, that are superseded and that nobody uses."""
        for part in [p for p in self._parts.values() if p.session is not None and superseded(p.spec)]:
            await self._end(part, 0.0)

    async def close_idle(self, spec: ModelSpec, seconds: float) -> bool:
        """End a model's runs whose engine is here, all their stages, where nobody has used them for so long.

        Returns:
            Whether this worker still has a stage of it, ended or not by its engine's worker.
        """
        wanted = {replace(one, stages=(), replicas=()) for one in known(spec)}
        parts = [p for p in self._parts.values() if replace(p.spec, stages=(), replicas=()) in wanted]
        for part in parts:
            if part.session is not None:
                await self._end(part, seconds)
        return any(self._parts.get(part.spec) is part for part in parts)

    async def _end(self, part: _Part, seconds: float) -> None:
        """End a run whose engine is here, if it is idle, and has been for so long."""
        async with self._locks[part.spec]:
            idle = time.monotonic() - self._used.get(part.spec, float("-inf"))
            if self._parts.get(part.spec) is part and not self._users[part.spec] and idle >= seconds:
                self._used.pop(part.spec, None)
                await asyncio.gather(*self._tell(part, "end"), return_exceptions=True)
                await self._drop(part)

    async def _open(self, spec: ModelSpec) -> _Part:
        cluster = await self.worker.scheduler.identity()
        set_share(self.worker, cluster)
        for number, stage in enumerate(spec.stages):
            if stage.worker not in cluster["workers"]:
                raise _lost(number, stage)
        part = self._parts[spec] = _Part(spec, len(spec.stages) - 1, uuid.uuid4().hex)
        try:
            holding = [
                ask(self.worker, s.worker, "hold", spec=to_serialize(spec), number=i, run=part.run)
                for i, s in enumerate(spec.stages[:-1])
            ]
            found = await _all([self._load(part), *holding])
            if len({dtype for _, dtype in found}) > 1:
                raise ModelError(f"the workers of the stages compute in {sorted({d for _, d in found})}")
            blocks = min(room for room, _ in found)
            await _all([self._begin(part, blocks), *self._tell(part, "start", blocks=blocks)])
        except BaseException:
            await asyncio.gather(*self._tell(part, "end"), return_exceptions=True)
            await self._drop(part)
            raise
        part.watches = [asyncio.create_task(self._guard(part, i)) for i in range(part.number)]
        self._used[spec] = time.monotonic()
        return part

    def _tell(self, part: _Part, handler: str, **message: Any) -> list[Awaitable[Any]]:
        return [ask(self.worker, s.worker, handler, run=part.run, **message) for s in part.spec.stages[:-1]]

    async def _guard(self, part: _Part, number: int) -> None:
        """Wait for the end of another stage of the run, and then end the run."""
        stage = part.spec.stages[number]
        error: Exception
        try:
            why = await ask(self.worker, stage.worker, "watch", run=part.run)
            error = EngineClosedError(CLOSED) if why == CLOSED else _lost(number, stage)
        except Exception:  # whatever it was, nothing tells of that stage any more
            error = _lost(number, stage)
        if part.over.is_set():
            return
        logger.info("a run of %s ends: %s", part.spec.path, error)
        part.why = str(error)
        if part.session is not None:
            part.session.engine.stop(error)
            await asyncio.gather(*self._tell(part, "end"), return_exceptions=True)
        await self._drop(part)

    # --- every stage's side ---------------------------------------------------------------------------

    async def ping(self) -> None:
        """Answer."""

    async def echo(self, payload: Any) -> None:
        """Answer after something of a size has come."""

    async def prepare(self, spec: ModelSpec) -> None:
        """As `open`, for another worker or a client."""
        await self.open(spec)

    async def hold(self, spec: ModelSpec, number: int, run: str) -> tuple[int, str]:
        """Load a stage's layers; the KV blocks there is room for, and the type that it computes in."""
        async with self._locks[spec]:
            if (older := self._parts.get(spec)) is not None:
                await self._drop(older)
            set_share(self.worker, await self.worker.scheduler.identity())
            part = self._parts[spec] = _Part(spec, number, run)
            # From now on: an engine that dies while this loads would leave the layers here for good.
            part.watches = [asyncio.create_task(self._guard(part, len(spec.stages) - 1))]
            try:
                return await self._load(part)
            except BaseException:
                await self._drop(part)
                raise

    async def start(self, run: str, blocks: int) -> None:
        """Be ready for steps over a cache of so many KV blocks."""
        part = self._part(run)
        await self._begin(part, blocks)

    async def step(
        self, run: str, number: int, copies: Any, shapes: Any, ints: Any, hidden: Any = None
    ) -> None:
        """Take a step from the stage before."""
        part = self._part(run)
        assert part.model is not None
        flight = unpack(number, copies, shapes, ints, hidden, part.model.dtype, part.model.device)
        if part.session is not None:
            assert flight.hidden is not None
            part.session.engine.land(number, flight.hidden)
        elif part.stage is not None:
            part.stage.put(flight)

    async def fault(self, run: str, number: int, error: BaseException) -> None:
        """Hear that a step went wrong in a stage before."""
        session = self._part(run).session
        if session is not None:
            session.engine.land(number, error)

    async def watch(self, run: str) -> str:
        """Answer when this worker's stage of a run is over, with the reason."""
        with suppress(StageLostError):
            part = self._part(run)
            await part.over.wait()
            return part.why
        return "it has no stage of this run"

    async def end(self, run: str) -> None:
        """Let this worker's stage of a run go."""
        with suppress(StageLostError):
            part = self._part(run)
            async with self._locks[part.spec]:
                await self._drop(part)

    async def release(self, spec: ModelSpec) -> None:
        """Let this worker's stage of a model go, whatever its run."""
        async with self._locks[spec]:
            if spec in self._parts:
                await self._drop(self._parts[spec])

    async def close(self) -> None:
        """Let everything go because the worker goes, which calls this."""
        for part in list(self._parts.values()):
            part.why = "the worker left"
            await self._drop(part)

    def times(self, spec: ModelSpec) -> tuple[int, StageTimes] | None:
        """The number of this worker's stage of a model and what it has done; None where it has none."""
        part = self._parts.get(spec)
        if part is None or (part.stage is None and part.session is None):
            return None
        if part.stage is not None:
            return part.number, part.stage.times
        assert part.session is not None
        metrics = part.session.metrics
        waiting = max(0.0, metrics.waiting_seconds)
        return part.number, StageTimes(metrics.busy_seconds, waiting, metrics.steps)

    def parts(self) -> dict[ModelSpec, tuple[int, Session | None, StageTimes | None]]:
        """This worker's stage of each model: its number; its engine if it is the last, else what it did."""
        return {
            spec: (part.number, part.session, None if part.stage is None else part.stage.times)
            for spec, part in self._parts.items()
        }

    # --- inside ---------------------------------------------------------------------------------------

    def _part(self, run: str) -> _Part:
        for part in self._parts.values():
            if part.run == run:
                return part
        raise StageLostError(f"run {run} is over on {self.worker.address}")

    async def _load(self, part: _Part) -> tuple[int, str]:
        def load() -> tuple[int, str]:
            model = part.model = model_for(part.spec)
            model.load(part.layers)
            return kv_room(model, part.layers, part.spec.kv_memory, len(part.spec.stages)), model.dtype

        return await asyncio.to_thread(load)

    async def _begin(self, part: _Part, blocks: int) -> None:
        spec, model = part.spec, part.model
        assert model is not None
        runner = await asyncio.to_thread(open_runner, model, part.layers, blocks)
        following = spec.stages[0 if part.last else part.number + 1].worker

        def failed(number: int, error: BaseException) -> None:
            message = {"run": part.run, "number": number, "error": to_serialize(error)}
            loop.call_soon_threadsafe(loop.create_task, self._report(spec.stages[-1].worker, message))

        loop = asyncio.get_running_loop()
        courier = part.courier = Courier(self.worker, following, "step", failed)

        def onward(flight: Flight) -> None:
            courier.send(pack(flight, part.run))

        if part.last:
            depart, flights = (None, 1) if part.number == 0 else (onward, len(spec.stages))
            part.session = await asyncio.to_thread(Session.over, spec, model, runner, blocks, depart, flights)
        else:
            part.stage = Stage(runner, machine.cores(), onward, failed)

    async def _report(self, engine: str, message: Message) -> None:
        with suppress(Exception):  # an engine that is gone needs no report
            await ask(self.worker, engine, "fault", **message)

    async def _drop(self, part: _Part) -> None:
        if self._parts.get(part.spec) is part:
            del self._parts[part.spec]
        part.over.set()
        for task in part.watches:
            if task is not asyncio.current_task():
                task.cancel()
        if part.courier is not None:
            part.courier.close()
        if part.session is not None:
            await asyncio.to_thread(part.session.close)
        if part.stage is not None:
            await asyncio.to_thread(part.stage.close)
        await asyncio.to_thread(close_model, part.spec)


def _lost(number: int, stage: StageSpec) -> StageLostError:
    return StageLostError(
        f"stage {number} ({stage.layers[0]} to {stage.layers[-1]}) is lost with its worker {stage.worker}: "
        "its rows are to be done again on the workers that are left"
    )


async def _all(waiting: Sequence[Awaitable[Any]]) -> list[Any]:
    """The results of all; the first exception once every one of them has ended."""
    results = await asyncio.gather(*waiting, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
