"""Where the layers of a lost worker go: on workers that nobody uses, or nowhere while other copies live."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import daskllm
from daskllm.graph import PlanError
from daskllm.models import layer_names
from daskllm.runtime import heirs
from daskllm.runtime.heirs import succeed
from daskllm.types import ModelSpec, StageLostError, StageSpec
from tests import tiny


class Node:
    """A worker as far as heirs are planned there, and its scheduler."""

    def __init__(self, *workers: str, silent: tuple[str, ...] = ()) -> None:
        self.silent = silent
        self.metadata: dict[tuple[str, ...], Any] = {}
        self.workers: dict[str, dict[str, Any]] = {
            worker: {"memory_limit": 10**9, "nthreads": 1, "host": "h", "resources": {}} for worker in workers
        }

    @property
    def scheduler(self) -> Node:
        return self

    async def identity(self) -> dict[str, Any]:
        return {"workers": self.workers}

    async def get_metadata(self, keys: list[str], default: Any) -> Any:
        return self.metadata.get(tuple(keys), default)

    async def set_metadata(self, keys: list[str], value: Any) -> None:
        self.metadata[tuple(keys)] = value


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(node: Node, address: str, handler: str) -> None:
        assert handler == "ping"
        if address in node.silent:
            raise StageLostError(address)

    monkeypatch.setattr(heirs, "ask", ask)
    monkeypatch.setattr(heirs, "JOIN_SECONDS", 0.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model("llama-gqa", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def config(path: Path) -> Any:
    return daskllm.LLM(ModelSpec(path=str(path))).config


def on(config: Any, *chains: str) -> ModelSpec:
    """A model with a chain of stages for each text, over the workers that its letters name."""
    names = layer_names(config)
    made = []
    for chain in chains:
        parts = [names] if len(chain) == 1 else [names[:2], names[2:]]
        made.append([StageSpec(worker, part) for worker, part in zip(chain, parts, strict=True)])
    return ModelSpec(path="m").with_chains(made)


def places(spec: ModelSpec) -> list[str]:
    return ["".join(stage.worker for stage in chain.stages) for chain in spec.chains]


def heir_of(node: Any, spec: ModelSpec, config: Any, lost: Any = ()) -> ModelSpec:
    return asyncio.run(succeed(node, spec, config, lost))


def test_a_lost_chain_goes_where_no_other_is(config: Any) -> None:
    spec = on(config, "ab", "cd")
    heir = heir_of(Node("b", "c", "d", "e"), spec, config)
    assert places(heir)[1] == "cd"
    assert sorted(places(heir)[0]) == ["b", "e"]
    assert [len(chain.stages) for chain in heir.chains] == [2, 2]
    # With a single worker left for it, the whole chain is there.
    assert places(heir_of(Node("b", "c", "d"), spec, config)) == ["b", "cd"]


def test_what_has_no_place_is_given_up_while_others_live(config: Any) -> None:
    spec = on(config, "a", "b")
    heir = heir_of(Node("b"), spec, config)
    assert heir == on(config, "b")
    assert heir.replicas == ()
    with pytest.raises(ValueError, match="no workers"):
        heir_of(Node(), spec, config)


def test_it_waits_for_a_worker_to_join_while_others_live(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heirs, "JOIN_SECONDS", 60.0)
    node: Any = Node("b")

    async def joined() -> ModelSpec:
        waiting = asyncio.create_task(succeed(node, on(config, "a", "b"), config))
        await asyncio.sleep(0)
        node.workers = Node("b", "new").workers
        return await waiting

    assert places(asyncio.run(joined())) == ["new", "b"]
    # Where nothing answers rows meanwhile, what has a place is not kept waiting for the rest.
    assert places(heir_of(Node("c"), on(config, "a", "b"), config)) == ["c"]


def test_a_silent_worker_is_lost_only_where_rows_were(config: Any) -> None:
    spec = on(config, "a", "b")
    node = Node("a", "b", "c", silent=("a", "b"))
    assert heir_of(node, spec, config) == spec
    assert places(heir_of(node, spec, config, lost=spec.chains[:1])) == ["c", "b"]


def test_everyone_finds_the_same_heir_and_its_heirs(config: Any) -> None:
    spec = on(config, "a", "b")
    node = Node("b", "c")
    first = heir_of(node, spec, config)
    assert places(first) == ["c", "b"]
    node.workers = Node("b", "d", "e").workers
    second = heir_of(node, first, config)
    assert places(second) == ["d", "b"]
    assert heir_of(node, spec, config) == second
    # Back where it was at first: the record of that time is void, or it would go round for ever.
    node.workers = Node("a", "b").workers
    assert heir_of(node, second, config) == spec
    assert heir_of(node, second, config) == spec
    assert heir_of(node, spec, config) == spec


def test_no_room_for_any_is_an_error_that_says_so(config: Any) -> None:
    node = Node("z")
    node.workers["z"]["memory_limit"] = 1000
    with pytest.raises(PlanError, match="embed"):
        heir_of(node, on(config, "a", "b"), config)
