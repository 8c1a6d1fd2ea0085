"""What a profile counts, on tiny models whose operations and bytes can be counted by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from daskllm.engine import kernels, profile, sampler
from daskllm.engine.batcher import Batcher
from daskllm.engine.kernels import reference
from daskllm.engine.layers import DecoderLayer
from daskllm.engine.profile import PARTS, Phase, Profile, Rates, Work
from daskllm.session import Session
from daskllm.types import Completion, ModelSpec, SamplingParams
from tests.tiny import make_model

# 4 query heads on 2 of keys, 16 wide; hidden 64, 96 columns in the MLP, 288 tokens.
LINEARS = 64 * (64 + 32 + 32) + 64 * 64 + 64 * 2 * 96 + 96 * 64
RATES = Rates(bandwidth=1e9, products=1e9, float32=1e9)
ROWS = [([5, 6, 7], 4), (list(range(40, 90)), 3), ([9], 6)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in made:
            made[name] = make_model(name, tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return path


@pytest.fixture
def sessions(paths: Callable[[str], Path]) -> Iterator[Callable[[str], Session]]:
    opened: list[Session] = []

    def session(name: str) -> Session:
        opened.append(Session.open(ModelSpec(path=str(paths(name)), kv_memory=2**20)))
        return opened[-1]

    yield session
    for one in opened:
        one.close()


def answer(session: Session, logprobs: int | None = None) -> list[Completion]:
    params = [SamplingParams(max_tokens=out, ignore_eos=True, logprobs=logprobs) for _, out in ROWS]
    return [found for (found,) in session.generate([prompt for prompt, _ in ROWS], params)]


def profiled(session: Session, logprobs: int | None = None) -> tuple[Profile, list[Completion], float]:
    watch = Profile(session.engine)
    begun = time.perf_counter()
    answers = answer(session, logprobs)
    seconds = time.perf_counter() - begun
    session.close()
    return watch, answers, seconds


def total(watch: Profile, part: str) -> Work:
    added = Work()
    for phase in watch.phases.values():
        added.add(phase.parts[part])
    return added


def test_the_answers_do_not_change(sessions: Callable[[str], Session]) -> None:
    plain = [one.token_ids for one in answer(sessions("llama-gqa"))]
    assert [one.token_ids for one in profiled(sessions("llama-gqa"))[1]] == plain


def test_parts_and_idleness_sum_to_the_run(sessions: Callable[[str], Session]) -> None:
    session = sessions("llama-gqa")
    watch, _, seconds = profiled(session)
    found = watch.report(seconds, RATES)
    steps = sum(found[f"{kind}_s"] for kind in ("prefill", "mixed", "decode"))
    assert found["idle_s"] + steps == pytest.approx(found["seconds"], abs=1e-3)
    assert 0 <= found["idle_s"] < seconds
    for phase in found["phases"].values():
        assert sum(line["share"] for line in phase["parts"].values()) == pytest.approx(1, abs=2e-3)
        assert sum(line["seconds"] for line in phase["parts"].values()) == pytest.approx(
            phase["seconds"], abs=1e-3
        )
    metrics = session.metrics
    assert sum(phase.steps for phase in watch.phases.values()) == metrics.steps
    # The engine's own clock goes around a step, and the profile's around the turn that the step is in.
    busy = sum(phase.seconds for phase in watch.phases.values())
    assert metrics.busy_seconds <= busy + 1e-3


def test_every_token_is_in_a_phase(sessions: Callable[[str], Session]) -> None:
    watch, _, _ = profiled(sessions("llama-gqa"))
    phases = watch.phases
    assert sum(p.prefill_tokens for p in phases.values()) == sum(len(prompt) for prompt, _ in ROWS)
    assert sum(p.decode_tokens for p in phases.values()) == sum(out - 1 for _, out in ROWS)
    assert phases["prefill"].decode_tokens == phases["decode"].prefill_tokens == 0
    assert phases["decode"].steps == max(out for _, out in ROWS) - 1


@pytest.mark.parametrize("logprobs", [None, 0])
def test_operations_are_those_of_the_formula(
    logprobs: int | None, sessions: Callable[[str], Session]
) -> None:
    watch, _, _ = profiled(sessions("llama-gqa"), logprobs)
    lengths = [len(prompt) + out - 1 for prompt, out in ROWS]
    chosen = sum(out for _, out in ROWS)
    assert total(watch, "linear").operations == 3 * 2 * LINEARS * sum(lengths)
    assert total(watch, "attention").operations == 3 * 4 * 64 * sum(n * (n + 1) // 2 for n in lengths)
    assert total(watch, "embedding and head").operations == 2 * 64 * 288 * chosen
    # The largest of logits that nobody asked for is found in the head's product.
    assert total(watch, "sampling").operations == (0 if logprobs is None else 288 * chosen)


def test_bytes_are_the_fewest_that_can_move(sessions: Callable[[str], Session]) -> None:
    session = sessions("llama-gqa")
    packed = [session.model.layer(f"layers.{i}") for i in range(3)]
    watch, _, _ = profiled(session)
    steps = sum(phase.steps for phase in watch.phases.values())
    run = sum(len(prompt) + out - 1 for prompt, out in ROWS)
    weights = sum(
        profile._nbytes([layer.qkv, layer.o, layer.gate_up, layer.down])
        for layer in packed
        if isinstance(layer, DecoderLayer)
    )
    assert weights >= 3 * 4 * LINEARS
    passed = 4 * run * ((64 + 128) + (64 + 64) + (64 + 192) + (96 + 64))
    assert total(watch, "linear").bytes == weights * steps + 3 * passed
    # A prompt's keys and values are read once for all of its rows, then once for each token.
    read = sum(len(p) + sum(len(p) + i for i in range(1, out)) for p, out in ROWS)
    assert total(watch, "attention").bytes == 3 * (read * 2 * 2 * 16 * 4 + 2 * run * 64 * 4)


def test_a_window_bounds_what_attention_counts(sessions: Callable[[str], Session]) -> None:
    watch, _, _ = profiled(sessions("mistral-window"))
    lengths = [len(prompt) + out - 1 for prompt, out in ROWS]
    pairs = sum(min(position + 1, 16) for n in lengths for position in range(n))
    assert total(watch, "attention").operations == 2 * 4 * 64 * pairs
    read = sum(len(p) + sum(min(len(p) + i, 16) for i in range(1, out)) for p, out in ROWS)
    run = sum(lengths)
    assert total(watch, "attention").bytes == 2 * (read * 2 * 2 * 16 * 4 + 2 * run * 64 * 4)


def test_an_engine_that_nobody_profiles_holds_the_plain_objects(sessions: Callable[[str], Session]) -> None:
    engine = sessions("llama-gqa").engine
    assert engine.runner.kernels is kernels.select("cpu", torch.float32)
    assert type(engine.batcher) is Batcher
    assert engine.sampler is sampler
    assert not {"_turn", "_lay_out", "_take_changes"} & set(vars(engine))


def test_a_kernel_that_no_formula_knows_is_counted_by_its_time(sessions: Callable[[str], Session]) -> None:
    session = sessions("llama-gqa")
    runner: Any = session.engine.runner
    runner.kernels = SimpleNamespace(**vars(runner.kernels), fused=lambda x: x + 1)
    watch = Profile(session.engine)
    assert runner.kernels.fused(1) == 2
    answer(session)
    session.close()
    found = total(watch, "other kernels")
    assert found.seconds > 0
    assert found.bytes == found.operations == 0


def test_a_part_is_measured_against_its_own_bound() -> None:
    phase = Phase(steps=1)
    phase.parts["linear"].add(Work(seconds=1.0, operations=6e8, bytes=1e8))
    phase.parts["attention"].add(Work(seconds=1.0, operations=1e8, bytes=1e8))
    phase.parts["python"].add(Work(seconds=0.5))
    phase.parts["counting"].add(Work(seconds=0.5))
    found = phase.report(Rates(bandwidth=2e8, products=1e9, float32=4e8))
    assert list(found["parts"]) == [part for part in PARTS if part in found["parts"]]
    assert found["parts"]["linear"]["roofline"] == 0.6
    assert found["parts"]["attention"]["roofline"] == 0.5
    assert "roofline" not in found["parts"]["python"]
    assert found["not_kernels"] == 0.2


def test_packed_weights_are_measured_whatever_they_are_made_of() -> None:
    weight = torch.zeros(8, 16, dtype=torch.bfloat16)
    opaque = torch.ops.mkldnn._reorder_linear_weight(weight.float(), None)  # any CPU has float32
    assert profile._nbytes(reference.pack([weight], [weight])) == 2 * 8 * 16 * 2
    assert profile._nbytes(opaque) == 8 * 16 * 4
    assert profile._nbytes((weight, None, [weight])) == 2 * 8 * 16 * 2


def test_a_gpu_s_kernels_are_not_timed() -> None:
    engine: Any = SimpleNamespace(runner=SimpleNamespace(device="cuda"))
    with pytest.raises(ValueError, match="kernels of a CPU, not of 'cuda'"):
        Profile(engine)
