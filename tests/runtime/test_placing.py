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
from daskllm.runtime.placing import live_cluster, place, plan_on, stages_of
from daskllm.types import ModelSpec
from tests import tiny


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


@pytest.fixture
def spec(path: Path) -> ModelSpec:
    return ModelSpec(path=str(path))


def whole(config: Any) -> int:
    """Bytes that the model needs with one row."""
    cluster = live_cluster(Workers(10**12))  # type: ignore[arg-type]
    plan = Plan.of(
        [[("tcp://w0", layer_names(config))]], LayerGraph.of(config), cluster, Workload(rows=1, context=256)
    )
    return int(plan.replicas[0].stages[0].memory.total)


def test_a_model_that_fits_every_worker_stays_whole(spec: ModelSpec, config: Any) -> None:
    roomy: Any = Workers(10**9, 10**9)
    assert place(roomy, spec, config, "auto", "auto") is spec
    assert place(roomy, spec, config, 1, "auto") is spec
    assert [len(r.stages) for r in plan_on(live_cluster(roomy), config, "float32", "auto").replicas] == [1, 1]


def test_a_model_that_does_not_is_cut_into_as_few_stages_as_fit(spec: ModelSpec, config: Any) -> None:
    need = whole(config)
    tight: Any = Workers(int(need * 0.75), int(need * 0.75), int(need * 0.75))
    placed = place(tight, spec, config, "auto", "auto")
    assert len(placed.stages) == 2
    assert [name for stage in placed.stages for name in stage.layers] == list(layer_names(config))
    # One worker that holds it all is one stage, and the others ask it.
    mixed: Any = Workers(int(need * 0.3), need * 3)
    assert [s.worker for s in place(mixed, spec, config, "auto", "auto").stages] == ["tcp://w1"]
    tiny_ones: Any = Workers(1000, 1000)
    with pytest.raises(PlanError, match="embed"):
        place(tiny_ones, spec, config, "auto", "auto")


def test_a_worker_without_a_limit_shares_its_machine(config: Any) -> None:
    unlimited: Any = Workers(0, 0, total=10**9)
    cluster = live_cluster(unlimited)
    assert [d.memory for d in cluster.devices] == [5 * 10**8] * 2
    with pytest.raises(ValueError, match="no workers"):
        live_cluster(Workers())  # type: ignore[arg-type]


def test_more_stages_than_there_can_be_are_refused(spec: ModelSpec, config: Any) -> None:
    with pytest.raises(ValueError, match="stages=3 is more than the 2 workers"):
        place(Workers(10**9, 10**9), spec, config, 3, "auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stages=6 is more than the 5 layers"):
        place(Workers(*[10**9] * 8), spec, config, 6, "auto")  # type: ignore[arg-type]


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
        stages_of(Plan.from_json(json.dumps(text)), config, ["tcp://w0", "tcp://w1"])


def test_stages_and_plans_need_a_client(path: Path, config: Any) -> None:
    for options in (
        {"stages": 2},
        {"plan": plan_on(live_cluster(Workers(10**9, 10**9)), config, "float32", 2)},
    ):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="needs the workers of a Dask client"):
            daskllm.load(path, **options)
    for stages in (0, -1, True, 2.0, "two", None):
        with pytest.raises(ValueError, match="stages must be"):
            daskllm.load(path, stages=stages)
    with pytest.raises(ValueError, match="plan must be"):
        daskllm.load(path, plan={"a": 1})


@pytest.mark.cluster
def test_load_checks_against_the_cluster_before_it_opens(
    path: Path, config: Any, two_processes: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="stages=3 is more than the 2 workers"):
        daskllm.load(path, client=two_processes, stages=3)
    plan = plan_on(live_cluster(Workers(10**9, 10**9)), config, "float32", 2)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="is not there"):
        daskllm.load(path, client=two_processes, plan=plan)
    with pytest.raises(ValueError, match=r"stages=3 and plan, which has 2, disagree"):
        daskllm.load(path, client=two_processes, plan=plan, stages=3)
    replicas = plan_on(live_cluster(Workers(10**9, 10**9)), config, "float32", "auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="plan has 2 replicas"):
        daskllm.load(path, client=two_processes, plan=replicas)
    monkeypatch.setattr(daskllm, "__version__", "0.0.0")
    with pytest.raises(RuntimeError, match=r"this process 0\.0\.0"):
        daskllm.load(path, client=two_processes, stages=2)


def test_the_plan_of_a_model_in_this_process(path: Path) -> None:
    llm = daskllm.load(path)
    assert llm.plan.placement == {placing.HERE: layer_names(llm.config)}
    assert list(llm.residency()) == [""]
    assert tuple(llm.residency()[""]) == layer_names(llm.config)
    llm.close()
