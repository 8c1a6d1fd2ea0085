from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from daskllm.bench import WorkRow, measure, read_work
from tests.tiny import make_model

WORK = [
    WorkRow((5, 6, 7, 8), 6),
    WorkRow(tuple(range(5, 60)), 3),
    WorkRow((9,), 12),
    *[WorkRow((1, 2), 4)] * 6,
    *[WorkRow((*range(100, 140), last), 2) for last in (1, 2, 3)],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama-gqa", tmp_path_factory.mktemp("bench") / "model")


def check(measured: dict[str, Any]) -> None:
    assert measured["rows"] == len(WORK)
    assert measured["out_tokens"] == sum(row.out for row in WORK)
    assert measured["prompt_tokens"] == sum(len(row.prompt) for row in WORK)
    assert measured["out_tokens_per_s"] == pytest.approx(
        measured["out_tokens"] / measured["seconds"], rel=0.05 + 0.0005 / measured["seconds"]
    )
    assert 0 < measured["base_rss_mb"] <= measured["peak_rss_mb"]
    assert measured["load_s"] > 0
    assert measured["cpu_s"] > 0
    assert ("client_cpu_s" in measured) == ("workers" in measured)
    assert measured["preemptions"] == 0
    assert measured["dtype"] == "float32"
    assert set(measured["versions"]) >= {"python", "torch", "dask"}
    json.dumps(measured)


def test_every_row_gets_its_own_number_of_tokens_in_this_process(model: Path) -> None:
    measured = measure(str(model), WORK)
    check(measured)
    assert measured["mean_batch"] > 1
    assert measured["reused_tokens"] == 2 * 32


def test_a_profile_says_where_the_time_of_the_run_went(model: Path) -> None:
    measured = measure(str(model), WORK, profile=True)
    check(measured)
    found = measured["profile"]
    parts = sum(found[f"{kind}_s"] for kind in ("idle", "prefill", "mixed", "decode"))
    assert parts == pytest.approx(found["seconds"], abs=1e-3)
    assert found["seconds"] == pytest.approx(measured["seconds"], abs=1e-3)
    phases = found["phases"].values()
    computed = sum(phase["prefill_tokens"] for phase in phases)
    assert computed == measured["prompt_tokens"] - measured["reused_tokens"]
    assert sum(phase["decode_tokens"] for phase in phases) == measured["out_tokens"] - len(WORK)
    assert all(found[f"measured_{rate}_per_s"] > 0 for rate in ("gb", "product_gflop", "float32_gflop"))
    assert "profile" not in measure(str(model), WORK)


def test_a_profile_counts_weights_in_eight_bits(model: Path) -> None:
    wide, narrow = (
        measure(str(model), WORK, profile=True, dtype="float32", quantize=quantize)["profile"]["phases"]
        for quantize in (None, "int8")
    )
    of = {kind: phase["parts"]["linear"] for kind, phase in wide.items()}
    for kind, phase in narrow.items():
        assert 0 < phase["parts"]["linear"]["gb"] < of[kind]["gb"]


def test_a_profile_is_of_this_process(model: Path) -> None:
    with pytest.raises(ValueError, match="leave workers= out"):
        measure(str(model), WORK, workers=2, profile=True)


@pytest.mark.slow
@pytest.mark.cluster
def test_the_same_work_through_a_local_cluster(model: Path) -> None:
    measured = measure(str(model), WORK, workers=2, threads=2, kv_memory=2**20)
    check(measured)
    assert (measured["workers"], measured["threads"]) == (2, 2)


def test_a_row_that_the_model_cannot_answer_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1: token id 999 is outside .* 288"):
        measure(str(model), [WorkRow((5,), 2), WorkRow((999,), 2)])
    with pytest.raises(ValueError, match=r"row 0: 200 tokens .* and 57 .* context of 256"):
        measure(str(model), [WorkRow((5,) * 200, 57)])
    assert measure(str(model), [WorkRow((5,) * 200, 56)])["out_tokens"] == 56


@pytest.mark.cluster
def test_the_same_work_through_two_stages(model: Path) -> None:
    measured = measure(str(model), WORK, workers=2, threads=1, stages=2, kv_memory=2**20)
    check(measured)
    assert (measured["workers"], measured["stages"]) == (2, 2)


def test_threads_and_stages_are_a_cluster_s(model: Path) -> None:
    for option in ("threads", "stages"):
        with pytest.raises(ValueError, match=f"{option}=.*give workers= as well"):
            measure(str(model), WORK, **{option: 2})
    with pytest.raises(ValueError, match="stages=3 need as many workers"):
        measure(str(model), WORK, workers=2, stages=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not JSON"),
        ("[]", "non-empty JSON list"),
        ('{"prompt": [1], "out": 1}', "non-empty JSON list"),
        ('[{"prompt": [1], "out": 1}, {"prompt": [], "out": 1}]', 'row 1: "prompt" must be'),
        ('[{"prompt": ["a"], "out": 1}]', 'row 0: "prompt" must be'),
        ('[{"prompt": [-1], "out": 1}]', 'row 0: "prompt" must be'),
        ('[{"prompt": [1], "out": 0}]', 'row 0: "out" must be a whole number of at least 1, not 0'),
        ('[{"prompt": [1]}]', 'row 0: "out" must be'),
        ("[7]", 'row 0: "prompt" must be'),
    ],
)
def test_a_bad_work_file_is_named_by_row(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "work.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_work(path)


def test_a_work_file_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "work.json"
    path.write_text('[{"prompt": [3, 4], "out": 2}, {"prompt": [5], "out": 1}]')
    assert read_work(path) == [WorkRow((3, 4), 2), WorkRow((5,), 1)]
