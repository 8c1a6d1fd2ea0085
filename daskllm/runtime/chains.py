"""The copies of one model in stages, as one process sees them: which gets the next rows, which are lost.

A copy is a chain of stages, of one or more. It owns the count of this process's rows under way in each, and
sees to it that a lost one is put on other workers while the rows go to those that live. It refuses to know
how rows are asked (`remote`) and where layers go (`heirs`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distributed.protocol import to_serialize

from daskllm.runtime.heirs import succeed
from daskllm.runtime.wire import Node, ask
from daskllm.types import StageLostError

if TYPE_CHECKING:
    from daskllm.models import DecoderConfig
    from daskllm.types import ModelSpec

__all__ = ["Chains"]

logger = logging.getLogger(__name__)

_ROUNDS = 6
"""How many times lost copies are placed anew before those that still do not open are left alone."""


class Chains:
    """The copies of ``spec``, which has stages or replicas."""

    def __init__(self, spec: ModelSpec, config: DecoderConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._present = spec
        self._rows: Counter[ModelSpec] = Counter()
        self._lost: set[ModelSpec] = set()
        self._mending: Future[None] | None = None

    @contextmanager
    def chosen(self, node: Node, rows: int) -> Iterator[ModelSpec]:
        """The copy that so many rows should go to: the one with the fewest under way.

        Among equals, one whose engine is on this very worker, else any. Where all are lost, it waits until
        one of them has a place again.

        Raises:
            PlanError: the workers that are left have no room for any.
        """
        chain = self._take(node, rows)
        try:
            yield chain
        finally:
            with self._lock:
                self._rows[chain] -= rows

    def lose(self, node: Node, chain: ModelSpec) -> None:
        """A copy does not answer: it gets no rows until it has been put on other workers."""
        with self._lock:
            self._lost.add(chain)
            self._mend(node)

    def close(self) -> None:
        """Stop looking for places."""
        with self._lock:
            if self._mending is not None:
                self._mending.cancel()

    def _take(self, node: Node, rows: int) -> ModelSpec:
        here = getattr(node, "address", None)  # a client has none
        while True:
            with self._lock:
                there = [chain for chain in self._present.chains if chain not in self._lost]
                if there:
                    chain = self._idlest(there, here)
                    self._rows[chain] += rows
                    return chain
                mending = self._mend(node)
            mending.result()

    def _idlest(self, chains: Iterable[ModelSpec], here: str | None) -> ModelSpec:
        def order(chain: ModelSpec) -> tuple[int, bool, float]:
            return self._rows[chain], chain.stages[-1].worker != here, random.random()

        return min(chains, key=order)

    def _mend(self, node: Node) -> Future[None]:
        if self._mending is None or self._mending.done():
            loop = node.loop.asyncio_loop
            self._mending = asyncio.run_coroutine_threadsafe(self._place(node), loop)
        return self._mending

    async def _place(self, node: Node) -> None:
        """Put what is lost on other workers, and open it there while other copies answer rows."""
        for _ in range(_ROUNDS):
            before, lost = self._present, frozenset(self._lost)
            heir = await succeed(node, before, self._config, lost)
            new = [chain for chain in heir.chains if chain in lost or chain not in before.chains]
            # With no other copy there, whoever waits opens one by asking, and hears what goes wrong.
            failed = await self._open(node, new) if len(new) < len(heir.chains) else {}
            with self._lock:
                self._present = heir
                since = self._lost - lost
                self._lost = {*failed, *since}.intersection(heir.chains)
            if not since and not any(isinstance(error, StageLostError) for error in failed.values()):
                return

    async def _open(self, node: Node, chains: Sequence[ModelSpec]) -> dict[ModelSpec, BaseException]:
        """Load copies that are to take rows; those that could not be, and why."""
        opening = [ask(node, c.stages[-1].worker, "prepare", spec=to_serialize(c)) for c in chains]
        errors = await asyncio.gather(*opening, return_exceptions=True)
        failed = {c: error for c, error in zip(chains, errors, strict=True) if error is not None}
        for chain, error in failed.items():
            logger.warning("a copy of %s on %s did not open: %s", chain.path, chain.stages, error)
        return failed
