"""Which copy of a model gets the next rows, and what becomes of one that is lost; no worker is needed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from daskllm.graph import PlanError
from daskllm.runtime import chains
from daskllm.runtime.chains import Chains
from daskllm.types import ModelSpec, StageLostError, StageSpec


def on(*workers: str) -> ModelSpec:
    """A model with a whole copy on each of these."""
    return ModelSpec(path="m").with_chains([[StageSpec(worker, ("embed", "head"))] for worker in workers])


class Node:
    """A worker as far as copies are chosen there; its loop runs in a thread."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.asyncio_loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.asyncio_loop.run_forever)
        self.thread.start()

    @property
    def loop(self) -> Node:
        return self

    def stop(self) -> None:
        self.asyncio_loop.call_soon_threadsafe(self.asyncio_loop.stop)
        self.thread.join()
        self.asyncio_loop.close()


@pytest.fixture
def node() -> Iterator[Any]:
    made = Node("b")
    yield made
    made.stop()


def engine(chain: ModelSpec) -> str:
    return chain.stages[-1].worker


def test_rows_go_to_the_copy_with_the_fewest_under_way(node: Any) -> None:
    copies = Chains(on("a", "b", "c"), None)  # type: ignore[arg-type]
    with copies.chosen(node, 4) as first:
        assert engine(first) == "b"  # equal, and on this very worker
        with copies.chosen(node, 1) as second, copies.chosen(node, 1) as third:
            assert {engine(second), engine(third)} == {"a", "c"}
            with copies.chosen(node, 1) as fourth:
                assert engine(fourth) in ("a", "c")
    with copies.chosen(node, 1) as again:
        assert engine(again) == "b"


def test_equal_copies_elsewhere_are_both_taken(node: Any) -> None:
    copies = Chains(on("x", "y"), None)  # type: ignore[arg-type]
    taken = set()
    for _ in range(64):
        with copies.chosen(node, 1) as chain:
            taken.add(engine(chain))
    assert taken == {"x", "y"}


def test_a_lost_copy_gets_rows_again_when_it_is_open_elsewhere(
    node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, opened = threading.Event(), threading.Event()
    go_on = asyncio.Event()
    before, after = on("a", "b"), on("a", "d")

    async def succeed(_: Any, spec: ModelSpec, config: Any, lost: Any) -> ModelSpec:
        assert spec == before
        assert [engine(chain) for chain in lost] == ["b"]
        planned.set()
        return after

    async def ask(_: Any, address: str, handler: str, **message: Any) -> None:
        assert (address, handler) == ("d", "prepare")
        await go_on.wait()
        opened.set()

    monkeypatch.setattr(chains, "succeed", succeed)
    monkeypatch.setattr(chains, "ask", ask)
    copies = Chains(before, None)  # type: ignore[arg-type]
    copies.lose(node, before.chains[1])
    assert planned.wait(10)
    for _ in range(8):  # the one that lives takes all, however many it has
        with copies.chosen(node, 1) as chain:
            assert engine(chain) == "a"
    node.asyncio_loop.call_soon_threadsafe(go_on.set)
    assert opened.wait(10)
    assert copies._mending is not None
    copies._mending.result(10)
    with copies.chosen(node, 1), copies.chosen(node, 1) as chain, copies.chosen(node, 1):
        assert {engine(chain) for chain in copies._present.chains} == {"a", "d"}
        assert sorted(copies._rows[chain] for chain in after.chains) == [1, 2]


def test_one_that_does_not_open_stays_out_while_others_live(
    node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, tries = on("a", "c"), []

    async def succeed(*_: Any) -> ModelSpec:
        return spec

    async def ask(_: Any, address: str, *__: Any, **message: Any) -> None:
        tries.append(address)
        raise StageLostError("gone again")

    monkeypatch.setattr(chains, "succeed", succeed)
    monkeypatch.setattr(chains, "ask", ask)
    copies = Chains(spec, None)  # type: ignore[arg-type]
    copies.lose(node, spec.chains[1])
    assert copies._mending is not None
    copies._mending.result(10)
    assert tries == ["c"] * chains._ROUNDS
    with copies.chosen(node, 9), copies.chosen(node, 1) as chain:
        assert engine(chain) == "a"


def test_where_all_are_lost_it_waits_for_one_or_says_why_there_is_none(
    node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = on("a")
    outcomes: list[Any] = [PlanError("no room"), on("e")]

    async def succeed(*_: Any) -> ModelSpec:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome  # type: ignore[no-any-return]

    monkeypatch.setattr(chains, "succeed", succeed)
    copies = Chains(spec, None)  # type: ignore[arg-type]
    copies._lost.add(spec)
    with pytest.raises(PlanError, match="no room"), copies.chosen(node, 1):
        pass
    with copies.chosen(node, 1) as chain:
        assert engine(chain) == "e"
