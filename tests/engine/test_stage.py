"""Stages in one process: an engine over a chain of them gives what one with all layers gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from daskllm.engine.engine import Engine, EngineClosedError
from daskllm.engine.kvcache import bytes_per_block
from daskllm.engine.layers import ResidentModel
from daskllm.engine.sequence import Request
from daskllm.engine.stage import Flight, Stage, kv_room, open_runner
from daskllm.models import layer_names
from daskllm.session import Session
from daskllm.types import ModelSpec, SamplingParams
from tests import tiny

PARAMS = SamplingParams(max_tokens=30, ignore_eos=True, n=2, temperature=1.0, seed=1)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec(path=str(tiny.make_model("llama-gqa", tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def model(spec: ModelSpec) -> Iterator[ResidentModel]:
    model = ResidentModel.open(spec)
    yield model
    model.close()


class Chain:
    """A session whose layers are in as many stages as cuts make, each with its own cache and thread."""

    def __init__(self, spec: ModelSpec, model: ResidentModel, cuts: list[int], blocks: int) -> None:
        names = layer_names(model.config)
        parts = [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]
        runners = [open_runner(model, part, blocks) for part in parts]
        self.stages: list[Stage] = []
        depart = self.depart if cuts else None
        self.session = Session.over(spec, model, runners[-1], blocks, depart, len(parts))
        self.engine: Engine = self.session.engine
        onward = self.land
        for runner in reversed(runners[:-1]):
            self.stages.insert(0, Stage(runner, 1, onward, self.engine.land))
            onward = self.stages[0].put

    def depart(self, flight: Flight) -> None:
        self.stages[0].put(flight)

    def land(self, flight: Flight) -> None:
        assert flight.hidden is not None
        self.engine.land(flight.number, flight.hidden)

    def answers(self, prompts: list[list[int]]) -> list[list[tuple[int, ...]]]:
        requests = [Request(p, PARAMS, stream_key=(1, (p,))) for p in prompts]
        tickets = self.engine.submit(requests)
        self.engine.wait(tickets, 60)
        return [[s.token_ids for s in t.samples if s is not None] for t in tickets]

    def close(self) -> None:
        self.engine.close()
        for stage in self.stages:
            stage.close()


PROMPTS = [list(range(5, 6 + i * 5 % 40)) for i in range(20)]
ALIKE = [[*range(7, 107), *range(i, i + 20)] for i in range(12)]


@pytest.mark.parametrize("cuts", [[2], [1, 3]])
def test_steps_under_way_share_blocks(spec: ModelSpec, model: ResidentModel, cuts: list[int]) -> None:
    whole, chain = Chain(spec, model, [], 200), Chain(spec, model, cuts, 200)
    for one in (whole, chain):
        one.engine.batcher.max_tokens = 64
    whole.engine.batcher.reuse = False
    try:
        assert chain.answers(ALIKE) == whole.answers(ALIKE)
        assert chain.engine.metrics.reused_tokens == 11 * 96
        assert chain.engine.batcher.pool.used == 0
    finally:
        chain.close()
        whole.close()


def test_a_step_waits_for_the_bad_news_of_the_one_before(spec: ModelSpec, model: ResidentModel) -> None:
    """It may stand on blocks that the failed one was to write."""
    departed: list[Flight] = []
    names = layer_names(model.config)
    session = Session.over(spec, model, open_runner(model, names[1:], 64), 64, departed.append, 2)
    engine, embedding = session.engine, open_runner(model, names[:1], 64)
    tickets = engine.submit([Request(p, SamplingParams(max_tokens=1)) for p in ALIKE[:2]])
    engine.wait_until(lambda: len(departed) == 2, 20)
    engine.land(departed[1].number, embedding.run(departed[1].batch))
    assert not engine.wait_until(lambda: any(t.done for t in tickets), 0.1)
    engine.land(departed[0].number, RuntimeError("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        engine.wait(tickets, 20)
    assert engine.batcher.pool.used == 0
    engine.close()


@pytest.mark.parametrize(("cuts", "blocks"), [([1], 200), ([2], 12), ([1, 3], 200), ([1, 2, 3, 4], 12)])
def test_a_chain_of_stages_gives_the_same_tokens(
    spec: ModelSpec, model: ResidentModel, cuts: list[int], blocks: int
) -> None:
    whole, chain = Chain(spec, model, [], 200), Chain(spec, model, cuts, blocks)
    try:
        assert chain.answers(PROMPTS) == whole.answers(PROMPTS)
        assert chain.engine.batcher.pool.used == 0
        assert (chain.engine.batcher.preemptions > 0) == (blocks == 12)
        passes = {stage.times.passes for stage in chain.stages}
        assert passes == {chain.engine.metrics.steps}
    finally:
        chain.close()
        whole.close()


def test_what_breaks_in_a_stage_reaches_the_callers_and_the_chain_goes_on(
    spec: ModelSpec, model: ResidentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(spec, model, [2], 64)
    expected = chain.answers(PROMPTS[:4])
    runner = chain.stages[0].runner

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", broken)
        with pytest.raises(RuntimeError, match="out of luck"):
            chain.answers(PROMPTS[:4])
    assert chain.engine.batcher.pool.used == 0
    assert chain.answers(PROMPTS[:4]) == expected
    chain.engine.stop(EngineClosedError("a stage is gone"))
    with pytest.raises(EngineClosedError, match="a stage is gone"):
        chain.answers(PROMPTS[:1])
    chain.close()


def test_what_is_dropped_while_it_travels_keeps_its_blocks_until_it_lands(
    spec: ModelSpec, model: ResidentModel
) -> None:
    chain = Chain(spec, model, [2], 64)
    tickets = chain.engine.submit([Request(p, PARAMS, stream_key=(1, (p,))) for p in PROMPTS])
    chain.engine.wait(tickets, 0.05)
    chain.engine.abort(tickets)
    assert chain.answers(PROMPTS[:3]) == chain.answers(PROMPTS[:3])
    assert chain.engine.batcher.pool.used == 0
    assert not chain.engine.batcher.running
    chain.close()


def test_room_counts_the_layers_that_attend(model: ResidentModel) -> None:
    names, config = layer_names(model.config), model.config
    two = 2 * bytes_per_block(config.num_layers, config.num_kv_heads, config.head_dim, 4)
    assert (kv_room(model, names, two), kv_room(model, names[:2], two)) == (2, 2 * config.num_layers)
    # A stage of the embedding alone keeps nothing, so that it sets no limit.
    assert kv_room(model, names[:1], 1, flights=2) == 2 * kv_room(model, names[:1], 1)
    with pytest.raises(ValueError, match="kv_memory=1 "):
        kv_room(model, names[1:2], 1)
