"""Where layers go: what is asked for is checked first, what is planned fits the workers that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import daskllm
from daskllm.graph import LayerGraph, Plan, PlanError, Workload
from daskllm.models import layer_names
from daskllm.runtime import placing
from daskllm.runtime.devices import kind
from daskllm.runtime.placing import chains_of, live_cluster, place, plan_on
from daskllm.types import ModelSpec
from tests import tiny

SPEC = ModelSpec(path="", dtype="float32")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model("llama-gqa", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def config(path: Path) -> Any:
    llm = daskllm.LLM(ModelSpec(path=str(path)))
    return llm.config


class Workers:
    """A client as far as placing looks at one."""

    def __init__(self, *memory: int, total: int = 10**9) -> None:
        self.total = total
        self.workers = {
            f"tcp://w{i}": {"memory_limit": limit, "nthreads": 1, "host": "h", "resources": {}}
            for i, limit in enumerate(memory)
        }

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        assert n_workers == -1  # Dask's own answer holds five workers
        return {"workers": self.workers}

    def run(self, function: Any, workers: list[str]) -> dict[str, int]:
        return dict.fromkeys(workers, self.total)

    def get_metadata(self, keys: list[str], default: Any) -> Any:
        """All kinds of workers have been measured."""
        rates = {kind(facts): [1e11, 2e10, 0] for facts in self.workers.values()}
        return {"rates": rates, "links": {"h h": [4e-4, 7e8]}}


@pytest.fixture
def spec(path: Path) -> ModelSpec:
    return ModelSpec(path=str(path))


def whole(config: Any, rows: int = 1) -> int:
    """Bytes that the model needs with so many rows."""
    cluster = live_cluster(Workers(10**12))  # type: ignore[arg-type]
    plan = Plan.of(
        [[("tcp://w0", layer_names(config))]],
        LayerGraph.of(config),
        cluster,
        Workload(rows=rows, context=256),
    )
    return int(plan.replicas[0].stages[0].memory.total)


def test_a_model_that_fits_every_worker_stays_whole(spec: ModelSpec, config: Any) -> None:
    roomy: Any = Workers(10**9, 10**9)
    assert place(roomy, spec, config, "auto", "auto", "auto") is spec
    assert place(roomy, spec, config, 1, "auto", "auto") is spec
    found = plan_on(live_cluster(roomy), SPEC, config, "auto", "auto")
    assert [len(r.stages) for r in found.replicas] == [1, 1]


def test_replicas_bound_how_many_copies_there_are(spec: ModelSpec, config: Any) -> None:
    roomy: Any = Workers(*[10**9] * 5)
    one = place(roomy, spec, config, 1, 1, "auto")
    assert [len(stage.layers) for stage in one.stages] == [len(layer_names(config))]
    assert one.replicas == ()
    three = place(roomy, spec, config, "auto", 3, "auto")
    assert three.stages == ()
    assert [[len(stage.layers) for stage in chain] for chain in three.replicas] == [[5], [5], [5]]
    twice = place(roomy, spec, config, 2, 2, "auto")
    workers = [stage.worker for chain in twice.replicas for stage in chain]
    assert len(set(workers)) == len(workers) == 4
    # Every chain's own specification is one of a single chain.
    assert [chain.stages for chain in twice.chains] == list(twice.replicas)
    assert all(chain.replicas == () for chain in twice.chains)


def test_as_many_chains_as_the_workers_have_room_for(spec: ModelSpec, config: Any) -> None:
    need = whole(config)
    tight: Any = Workers(*[int(need * 0.75)] * 5)
    assert [len(chain) for chain in place(tight, spec, config, "auto", "auto", "auto").replicas] == [2, 2]
    assert len(place(tight, spec, config, "auto", 1, "auto").stages) == 2
    assert [len(chain) for chain in place(tight, spec, config, 2, "auto", "auto").replicas] == [2, 2]
    # Some that hold the whole, and what the others can do together; each with room for a full batch.
    need = whole(config, rows=64)
    mixed: Any = Workers(int(need * 0.75), need * 3, int(need * 0.75))
    assert [len(chain) for chain in place(mixed, spec, config, "auto", "auto", "auto").replicas] == [1, 2]
    # Two stages each would be two chains, but two of the workers hold next to nothing.
    tight_one = int(whole(config) * 0.75)
    lame: Any = Workers(1000, 1000, tight_one, tight_one)
    assert len(place(lame, spec, config, 2, "auto", "auto").stages) == 2
    with pytest.raises(PlanError, match="only 1 of 2 replicas fit the 4 devices"):
        place(lame, spec, config, "auto", 2, "auto")


def test_more_replicas_than_there_are_workers_for_are_refused(spec: ModelSpec, config: Any) -> None:
    four: Any = Workers(*[10**9] * 4)
    with pytest.raises(ValueError, match="replicas=5 is more than the 4 workers"):
        place(four, spec, config, "auto", 5, "auto")
    with pytest.raises(ValueError, match="replicas=3 of 2 stages need 6 workers; there are 4"):
        place(four, spec, config, 2, 3, "auto")


def test_a_plan_of_several_replicas_is_executed(spec: ModelSpec, config: Any) -> None:
    four: Any = Workers(*[10**9] * 4)
    names = layer_names(config)
    assignment = [
        [("tcp://w3", names[:1]), ("tcp://w0", names[1:])],
        [("tcp://w2", names)],
    ]
    plan = Plan.of(assignment, LayerGraph.of(config), live_cluster(four))
    placed = place(four, spec, config, "auto", "auto", plan)
    assert [[stage.worker for stage in chain] for chain in placed.replicas] == [
        ["tcp://w3", "tcp://w0"],
        ["tcp://w2"],
    ]
    plan = json.loads(plan.to_json())  # type: ignore[assignment]
    plan["replicas"][1]["stages"][0]["device"] = "tcp://w0"  # type: ignore[index]
    with pytest.raises(PlanError, match="'tcp://w0' 2 stages"):
        chains_of(Plan.from_json(json.dumps(plan)), config, four.workers)


def test_a_model_that_does_not_is_cut_into_as_few_stages_as_fit(spec: ModelSpec, config: Any) -> None:
    need = whole(config)
    tight: Any = Workers(int(need * 0.75), int(need * 0.75), int(need * 0.75))
    placed = place(tight, spec, config, "auto", "auto", "auto")
    assert len(placed.stages) == 2
    assert [name for stage in placed.stages for name in stage.layers] == list(layer_names(config))
    # One worker that holds it all is one stage, and the others ask it.
    mixed: Any = Workers(int(need * 0.3), need * 3)
    assert [s.worker for s in place(mixed, spec, config, "auto", "auto", "auto").stages] == ["tcp://w1"]
    tiny_ones: Any = Workers(1000, 1000)
    with pytest.raises(PlanError, match="embed"):
        place(tiny_ones, spec, config, "auto", "auto", "auto")


def test_a_worker_without_a_limit_shares_its_machine(config: Any) -> None:
    unlimited: Any = Workers(0, 0, total=10**9)
    cluster = live_cluster(unlimited)
    assert [d.memory for d in cluster.devices] == [5 * 10**8] * 2
    with pytest.raises(ValueError, match="no workers"):
        live_cluster(Workers())  # type: ignore[arg-type]


def test_a_worker_that_reports_no_memory_is_named() -> None:
    with pytest.raises(ValueError, match="worker tcp://w1 reports no memory: start it with a limit"):
        live_cluster(Workers(10**9, 0, total=0))  # type: ignore[arg-type]


def test_more_stages_than_there_can_be_are_refused(spec: ModelSpec, config: Any) -> None:
    with pytest.raises(ValueError, match="stages=3 is more than the 2 workers"):
        place(Workers(10**9, 10**9), spec, config, 3, "auto", "auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stages=6 is more than the 5 layers"):
        place(Workers(*[10**9] * 8), spec, config, 6, "auto", "auto")  # type: ignore[arg-type]


BAD_PLANS = {
    "keep their order": ["embed layers.0", "layers.2 layers.1 head"],
    "'layers.1' 0 times": ["embed layers.0", "layers.2 head"],
    "'layers.0' 2 times": ["embed layers.0", "layers.0 layers.1 layers.2 head"],
    "'tcp://w2' is not there": ["embed", "layers.0", "layers.1 layers.2 head"],
    "names layer 'layers.3'": ["embed layers.0 layers.1 layers.2 layers.3", "head"],
    "has no layers": ["", "embed layers.0 layers.1 layers.2 head"],
}


@pytest.mark.parametrize("why", BAD_PLANS)
def test_a_plan_that_is_not_one_of_this_model_here_is_refused(config: Any, why: str) -> None:
    good = Plan.of(
        [[("tcp://w0", layer_names(config))]],
        LayerGraph.of(config),
        live_cluster(Workers(10**9)),  # type: ignore[arg-type]
    )
    text = json.loads(good.to_json())
    (stage,) = text["replicas"][0]["stages"]
    text["replicas"][0]["stages"] = [
        stage | {"device": f"tcp://w{i}", "layers": layers.split()} for i, layers in enumerate(BAD_PLANS[why])
    ]
    with pytest.raises(PlanError, match=why):
        chains_of(Plan.from_json(json.dumps(text)), config, ["tcp://w0", "tcp://w1"])


def test_stages_and_plans_need_a_client(path: Path, config: Any) -> None:
    for options in (
        {"stages": 2},
        {"replicas": 1},
        {"plan": plan_on(live_cluster(Workers(10**9, 10**9)), SPEC, config, 2)},
    ):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="needs the workers of a Dask client"):
            daskllm.load(path, **options)
    for stages in (0, -1, True, 2.0, "two", None):
        with pytest.raises(ValueError, match="stages must be"):
            daskllm.load(path, stages=stages)
    for replicas in (0, -1, True, 2.0, "two", None):
        with pytest.raises(ValueError, match="replicas must be"):
            daskllm.load(path, replicas=replicas)
    with pytest.raises(ValueError, match="plan must be"):
        daskllm.load(path, plan={"a": 1})


@pytest.mark.cluster
def test_load_checks_against_the_cluster_before_it_opens(
    path: Path, config: Any, two_processes: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="stages=3 is more than the 2 workers"):
        daskllm.load(path, client=two_processes, stages=3)
    plan = plan_on(live_cluster(Workers(10**9, 10**9)), SPEC, config, 2)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="is not there"):
        daskllm.load(path, client=two_processes, plan=plan)
    with pytest.raises(ValueError, match=r"stages=3 and plan, which has 2, disagree"):
        daskllm.load(path, client=two_processes, plan=plan, stages=3)
    with pytest.raises(ValueError, match=r"replicas=2 and plan, which has 1, disagree"):
        daskllm.load(path, client=two_processes, plan=plan, replicas=2)
    with pytest.raises(ValueError, match="replicas=2 of 2 stages need 4 workers; there are 2"):
        daskllm.load(path, client=two_processes, stages=2, replicas=2)
    monkeypatch.setattr(daskllm, "__version__", "0.0.0")
    with pytest.raises(RuntimeError, match=r"this process has 0\.0\.0"):
        daskllm.load(path, client=two_processes, stages=2)


def test_the_plan_of_a_model_in_this_process(path: Path) -> None:
    llm = daskllm.load(path)
    assert llm.plan.placement == {placing.HERE: layer_names(llm.config)}
    assert list(llm.residency()) == [""]
    assert tuple(llm.residency()[""]) == layer_names(llm.config)
    llm.close()
