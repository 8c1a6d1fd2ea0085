"""A run of layers in one process: how it is opened, and the thread that takes steps through it.

It owns the sizes that one engine works with and a stage's place in a chain: steps come in order, go through
its layers, and go on. It refuses to know where the next stage is and how bytes get there.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from daskllm import machine
from daskllm.engine import knee
from daskllm.engine.batch import Batch
from daskllm.engine.kvcache import KVCache, blocks_for, bytes_per_block
from daskllm.engine.layers import DecoderLayer, ResidentModel
from daskllm.engine.runner import Runner
from daskllm.types import ModelError

__all__ = ["MAX_STEP_TOKENS", "Flight", "Stage", "StageTimes", "kv_room", "open_runner"]

logger = logging.getLogger(__name__)

MAX_STEP_TOKENS = 512
_KV_SHARE = 0.4
"""Part of the free memory that the KV cache may grow to when nobody says."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A step on its way through the stages.

    Attributes:
        number: consecutive within an engine.
        batch: its rows.
        copies: KV blocks to copy before it, (from, to).
        hidden: the residual stream so far ``[rows, hidden]``; None before the first layer.
    """

    number: int
    batch: Batch
    copies: tuple[tuple[int, int], ...] = ()
    hidden: torch.Tensor | None = None


def kv_room(model: ResidentModel, layers: Sequence[str], kv_memory: int | None, flights: int = 1) -> int:
    """How many KV blocks these layers have room for; no more than could ever be used.

    Args:
        kv_memory: bytes; None takes a share of what is free.
        flights: steps that are under way at once.

    Raises:
        ValueError: ``kv_memory`` does not hold one block.
        ModelError: no memory is free for one.
    """
    config = model.config
    attending = sum(name.startswith("layers.") for name in layers)
    size = bytes_per_block(attending, config.num_kv_heads, config.head_dim, model.kv_torch_dtype.itemsize)
    enough = flights * knee.MOST * blocks_for(config.max_positions)
    if not size:
        return enough
    if kv_memory is not None:
        if kv_memory < size:
            raise ValueError(f"kv_memory={kv_memory} is less than one KV block of this model ({size} bytes)")
        return min(kv_memory // size, enough)
    free = machine.available_memory() if model.device == "cpu" else torch.cuda.mem_get_info()[0]
    blocks = min(int(free * _KV_SHARE) // size, enough)
    if blocks < 1:
        raise ModelError(f"no memory for a KV cache: {free} bytes are free, one block takes {size}")
    return blocks


def open_runner(model: ResidentModel, layers: Sequence[str], blocks: int) -> Runner:
    """Layers with a KV cache of so many blocks, ready to run.

    Raises:
        ModelError: a layer cannot be loaded.
    """
    machine.keep_freed_memory()
    ready = [model.layer(name) for name in layers]
    attending = sum(isinstance(layer, DecoderLayer) for layer in ready)
    config = model.config
    kv = model.kv_torch_dtype
    cache = KVCache(blocks, attending, config.num_kv_heads, config.head_dim, kv, model.device)
    return Runner(config, ready, cache, model.kernels, model.angles, model.device)


@dataclass(slots=True)
class StageTimes:
    """What a stage has done: seconds computing, seconds waiting between two steps, steps."""

    busy: float = 0.0
    waiting: float = 0.0
    passes: int = 0


@dataclass(eq=False)
class Stage:
    """A stage that is not the last: a thread that takes each step through its layers and hands it on.

    Args:
        runner: its layers.
        threads: OpenMP threads of a step.
        onward: called in the stage's thread with each step behind these layers; it must not wait.
        failed: called in the stage's thread with a step's number and what went wrong with it.
    """

    runner: Runner
    threads: int
    onward: Callable[[Flight], None]
    failed: Callable[[int, BaseException], None]
    times: StageTimes = field(default_factory=StageTimes)

    def __post_init__(self) -> None:
        self._flights: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="daskllm-stage", daemon=True)
        self._thread.start()

    def put(self, flight: Flight) -> None:
        """Take a step; those of one engine must come in order."""
        self._flights.put(flight)

    def close(self) -> None:
        """Stop the thread after the step it is in; steps behind it are left out."""
        self._flights.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _loop(self) -> None:
        torch.set_num_threads(self.threads)  # OpenMP counts threads per calling thread
        idle = time.monotonic()
        while (flight := self._flights.get()) is not None:
            began = time.monotonic()
            try:
                self.onward(self._pass(flight))
            except Exception as error:  # whatever broke, the engine must hear of it
                logger.exception("step %d of a stage failed", flight.number)
                self.failed(flight.number, error)
            now = time.monotonic()
            self.times.busy += now - began
            # The wait for the first step is no idleness of the pipeline.
            self.times.waiting += began - idle if self.times.passes else 0.0
            self.times.passes += 1
            idle = now

    def _pass(self, flight: Flight) -> Flight:
        self.runner.cache.copy(flight.copies)
        hidden = self.runner.run(flight.batch, flight.hidden)
        return Flight(flight.number, flight.batch, flight.copies, hidden)
