"""How long a job still takes, told from events of a made-up engine that is known to the last second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from daskllm.jobs.eta import Eta, State
from daskllm.jobs.lengths import Trend
from daskllm.jobs.partitions import Partitions
from daskllm.runtime.progress import Increment
from daskllm.types import SamplingParams

PARAMS = SamplingParams(max_tokens=512)
SLOTS, STEP, PREFILL, DECODE = 64, 0.01, 0.0005, 0.0004


def engine(prompts: list[int], outputs: list[int], slice_rows: int = 64) -> Iterator[tuple[float, Increment]]:
    """Rows in order through one engine with 64 slots: a prompt is read at once, each step makes a token."""
    now, last = 0.0, 0.0
    waiting = list(zip(prompts, outputs, strict=True))
    yield 0.0, Increment(cut_rows=len(waiting), cut_tokens=sum(prompts) // 2, job="j", task="cut")
    running: list[list[int]] = []
    rows = read = made = begun = begun_tokens = 0
    ended: Counter[int] = Counter()
    while waiting or running:
        seconds = STEP
        while waiting and len(running) < SLOTS:
            if begun % slice_rows == 0:
                part = waiting[:slice_rows]
                begun_tokens += sum(prompt for prompt, _ in part)
                tokens = sum(prompt for prompt, _ in part)
                yield (
                    now,
                    Increment(
                        begun_rows=len(part),
                        begun_tokens=tokens,
                        begun_estimate=tokens // 2,
                        job="j",
                        task="t",
                    ),
                )
            begun += 1
            prompt, output = waiting.pop(0)
            seconds += PREFILL * prompt
            running.append([prompt, 0, output])
        seconds += DECODE * len(running)
        now += seconds
        for row in running:
            row[1] += 1
        for row in [row for row in running if row[1] >= row[2]]:
            running.remove(row)
            rows, read, made = rows + 1, read + row[0], made + row[1]
            ended[row[1]] += 1
        if now - last > 0.25:
            last = now
            yield (
                now,
                Increment(
                    rows=rows,
                    prompt_tokens=read,
                    output_tokens=made,
                    ended=tuple(ended.items()),
                    under_way=tuple((row[0], row[1]) for row in running),
                    costs=(PREFILL, DECODE + STEP / SLOTS, STEP + DECODE),
                    job="j",
                    task="t",
                ),
            )
            rows = read = made = 0
            ended.clear()
    yield now, Increment(rows=rows, prompt_tokens=read, output_tokens=made, job="j", task="t")


def errors(prompts: list[int], outputs: list[int], eta: Eta) -> dict[float, float]:
    """At each share of the time, by how much of what is left the estimate is off."""
    events = list(engine(prompts, outputs))
    end = events[-1][0]
    off: dict[float, float] = {}
    for now, event in events:
        eta.take(event, now)
        if event.begun_rows or event.cut_rows:  # the made-up engine has told nothing of this moment yet
            continue
        for share in (0.1, 0.25, 0.5, 0.75):
            if share not in off and now >= share * end:
                left = eta.state(now).eta
                off[share] = float("inf") if left is None else left / (end - now) - 1
    assert eta.state(end).eta == 0
    assert eta.state(end).share == 1
    return off


Draw = Callable[[np.random.Generator, int], np.ndarray]
KINDS: dict[str, tuple[Draw, Draw]] = {
    "alike": (lambda d, n: np.full(n, 50), lambda d, n: d.integers(30, 50, n)),
    "skewed answers": (lambda d, n: np.full(n, 50), lambda d, n: 1 + d.exponential(60, n).astype(int)),
    "skewed prompts": (lambda d, n: 10 + d.exponential(200, n).astype(int), lambda d, n: np.full(n, 20)),
    "long prompts first": (
        lambda d, n: -np.sort(-(10 + d.exponential(200, n).astype(int))),
        lambda d, n: 1 + d.exponential(20, n).astype(int),
    ),
    "short prompts first": (
        lambda d, n: np.sort(10 + d.exponential(200, n).astype(int)),
        lambda d, n: 1 + d.exponential(20, n).astype(int),
    ),
    "longer and longer": (lambda d, n: 10 + 400 * np.arange(n) // n, lambda d, n: 5 + 60 * np.arange(n) // n),
    "shorter and shorter": (
        lambda d, n: 410 - 400 * np.arange(n) // n,
        lambda d, n: 65 - 60 * np.arange(n) // n,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_is_told_within_a_fifth_after_a_tenth(kind: str) -> None:
    draw = np.random.default_rng(3)
    prompts, outputs = (make(draw, 3000).tolist() for make in KINDS[kind])
    for share, off in errors(prompts, outputs, Eta(PARAMS, 3000)).items():
        assert abs(off) < 0.2, f"{off:+.0%} off after {share:.0%}"


def test_answers_that_grow_with_their_prompts_are_told_before_they_come() -> None:
    prompts, outputs = (make(np.random.default_rng(3), 3000).tolist() for make in KINDS["longer and longer"])
    assert all(abs(off) < 0.05 for off in errors(prompts, outputs, Eta(PARAMS, 3000)).values())


def test_a_trend_is_not_seen_where_there_is_none() -> None:
    draw, factors = np.random.default_rng(0), []
    for _ in range(200):
        trend = Trend()
        for prompt, made in zip(draw.integers(20, 100, 12), draw.integers(20, 100, 12), strict=True):
            trend.add(10, 10 * int(prompt), 10 * int(made))
        factors.append(trend.factor(100))
    assert 0.95 < np.mean(factors) < 1.05
    assert np.std(factors) < 0.1  # of a plain line 0.23


def test_a_trend_goes_on_for_so_far_and_no_farther() -> None:
    trend = Trend()
    for prompt in range(10, 50, 10):
        trend.add(1, prompt, prompt)
    assert trend.factor(50) == pytest.approx(2)
    assert trend.factor(10_000) == 3
    assert trend.factor(1) == pytest.approx(1 / 3)
    trend.add(0, 0, 0)
    assert trend.factor(25) == pytest.approx(1)


def test_prompts_have_a_part_that_all_have_and_one_that_grows_with_their_rows() -> None:
    trend = Trend()
    assert trend.found(7) == 7
    trend.add(1, 10, 30)
    assert trend.found(20) == pytest.approx(60)
    for size in (10, 20, 30, 40):
        trend.add(5, 5 * size, 5 * (20 + size))
    assert trend.found(400) == pytest.approx(420)
    assert trend.found(0) == pytest.approx(20)


@pytest.mark.parametrize("read", [range(5), range(15, 20), [0, 1, 8, 18, 19]])
def test_partitions_that_nobody_has_read_are_like_their_neighbours(read: Sequence[int]) -> None:
    partitions = Partitions(range(20))
    for part in read:
        partitions.take(Increment(job="j", part=part, cut_rows=10, cut_tokens=10 * (5 + 5 * part)))
    mean = 5 + 5 * np.mean(read)
    truth = 5 + 5 * np.mean([part for part in range(20) if part not in read])
    assert abs(partitions.size - truth) < 0.9 * abs(mean - truth)


def test_neighbours_that_are_not_alike_tell_nothing_of_each_other() -> None:
    draw, found = np.random.default_rng(0), []
    for _ in range(200):
        partitions = Partitions(range(100))
        for part in range(10):
            tokens = int(draw.integers(500, 1500))
            partitions.take(Increment(job="j", part=part, cut_rows=10, cut_tokens=tokens))
        found.append(partitions.size)
    assert 95 < np.mean(found) < 105
    assert np.std(found) < 14  # of the nearest alone 29, of the mean of all 9


def test_what_is_found_goes_by_neighbours_and_by_size() -> None:
    partitions = Partitions(range(40))
    for part in [*range(6), *range(30, 40)]:
        first = part < 20
        tokens = {
            "cut_tokens": 100 if first else 300,
            "prompt_tokens": 100,
            "reused_tokens": 0 if first else 80,
        }
        partitions.take(Increment(job="j", part=part, cut_rows=10, rows=10, **tokens))
    # From 6 to 29 prompts grow from 10 to 30 tokens, and what has to be computed falls from all to a fifth.
    assert partitions.size == pytest.approx(20, rel=0.1)
    assert partitions.computed == pytest.approx(0.53, abs=0.03)


def test_a_cut_that_runs_again_takes_the_place_of_the_first() -> None:
    partitions = Partitions(range(4))
    for part in (0, 0, 1, 1):
        partitions.take(Increment(job="j", part=part, cut_rows=10, cut_tokens=100))
    for part, found in ((0, 100), (1, 100)):
        tokens = {"prompt_tokens": 100, "reused_tokens": found if part else 0}
        partitions.take(Increment(job="j", part=part, rows=10, **tokens))
    partitions.take(Increment(job="j", part=2, cut_rows=10, cut_tokens=500))
    # The first two are done; of the others one has 50 tokens a prompt, one is like all, 700 in 30.
    assert partitions.size == pytest.approx(70 / 3)
    assert partitions.computed == pytest.approx(0.5)
    partitions.take(Increment(job="j", part=9, cut_rows=10, cut_tokens=100))  # one more than it knew of
    assert partitions.size == pytest.approx(20)


def test_work_that_is_done_is_never_undone() -> None:
    eta = Eta(SamplingParams(max_tokens=10, ignore_eos=True), rows=20)
    begun = {"begun_rows": 10, "begun_tokens": 1000, "begun_estimate": 1000}
    eta.take(Increment(cut_rows=20, cut_tokens=2000, task="cut"), 0.0)
    eta.take(Increment(**begun, task="a"), 0.0)
    for second in range(1, 11):
        eta.take(Increment(under_way=((100, 5),) * 10, task="a"), second)
    before = eta.state(10.0).share
    told = {"rows": 5, "prompt_tokens": 500, "reused_tokens": 450, "output_tokens": 50}
    eta.take(Increment(**told, under_way=((100, 5),) * 5, task="a"), 11.0)  # most of what it read was found
    assert eta.state(11.0).share > before > 0  # type: ignore[operator]
    assert eta.state(11.0).eta
    eta.take(Increment(**begun, task="b"), 40.0)  # and what the first task had under way is lost
    assert eta.state(40.0).eta


def test_rows_are_told_from_partitions() -> None:
    eta = Eta(PARAMS, parts=range(4))
    assert eta.state(0.0) == State()
    eta.take(Increment(cut_rows=100, cut_tokens=1000, task="cut"), 1.0)
    assert eta.state(2.0).total_rows == 400
    assert eta.state(2.0).eta is None
    for part in range(1, 4):
        eta.take(Increment(cut_rows=60, cut_tokens=600, task="cut", part=part), 2.0)
    assert eta.state(2.0).total_rows == 280


def test_a_partition_that_is_lost_counts_once() -> None:
    eta = Eta(PARAMS, parts=range(2))
    for part in (0, 1, 0):  # the first one's worker died
        eta.take(Increment(cut_rows=10, cut_tokens=100, task="cut", part=part), 0.0)
        told = {"rows": 10, "prompt_tokens": 100, "output_tokens": 50}
        eta.take(Increment(**told, task=f"slice-{part}", part=part), 1.0)
        assert eta.state(1.0).total_rows == 20
    assert eta.state(1.0).rows == 20


def test_a_speed_is_never_negative_and_not_told_before_it_is_known() -> None:
    eta = Eta(PARAMS, rows=100)
    eta.take(Increment(under_way=((10, 400),), task="lost", costs=(0.1, 0.1, 0.1), worker="a"), 0.0)
    assert "tokens/s" not in str(eta.state(0.0))
    eta.take(Increment(under_way=((10, 800),), task="lost"), 8.0)
    assert "50 tokens/s" in str(eta.state(8.0))
    eta.take(Increment(begun_rows=1, begun_tokens=10, begun_estimate=10, task="again"), 40.0)
    assert eta.state(40.0).output_tokens == 0
    assert eta.state(40.0).tokens_per_second >= 0


def test_tokens_that_were_found_take_no_time_and_as_many_will_be_found() -> None:
    eta = Eta(SamplingParams(max_tokens=10, ignore_eos=True), rows=400)
    eta.take(Increment(cut_rows=400, cut_tokens=40_000, task="cut"), 0.0)
    for second in range(1, 21):
        found = 900 if second % 2 else 0
        told = {"rows": 10, "prompt_tokens": 1000, "reused_tokens": found, "output_tokens": 100}
        begun = {"begun_rows": 10, "begun_tokens": 1000, "begun_estimate": 1000}
        eta.take(Increment(**told, **begun, costs=(0.001, 0.0, 0.0), worker="w", task=f"t{second}"), second)
    # 200 rows took 110 tokens where nothing was found after each one of 1,000.
    assert eta.state(20.0).eta == pytest.approx(20.0, rel=0.1)


def test_remembered_rows_take_no_time() -> None:
    """Half of what has begun was remembered, so that half of the rest will be."""
    eta = Eta(SamplingParams(max_tokens=10, ignore_eos=True), rows=400)
    eta.take(Increment(cut_rows=400, cut_tokens=4000, task="cut"), 0.0)
    eta.take(Increment(begun_rows=200, begun_tokens=2000, begun_estimate=2000, task="t"), 0.0)
    eta.take(Increment(rows=100, remembered=100, task="t"), 0.0)
    for second in range(1, 11):
        eta.take(Increment(rows=10, prompt_tokens=100, output_tokens=100, task="t"), float(second))
    state = eta.state(10.0)
    assert state.eta == pytest.approx(10.0)
    assert state.share == pytest.approx(0.5)
    assert (state.rows, state.remembered) == (200, 100)


def test_a_task_that_is_gone_counts_as_not_begun() -> None:
    eta = Eta(SamplingParams(max_tokens=10, ignore_eos=True), rows=100)
    eta.take(Increment(begun_rows=50, begun_tokens=500, begun_estimate=500, task="lost"), 0.0)
    eta.take(Increment(rows=10, prompt_tokens=100, output_tokens=100, under_way=((10, 5),), task="lost"), 1.0)
    assert eta.state(1.0).output_tokens == 105
    eta.take(Increment(begun_rows=40, begun_tokens=400, begun_estimate=400, task="other"), 30.0)
    assert eta.state(30.0).output_tokens == 100


def test_a_state_is_text_and_data() -> None:
    state = State(50, 100, 1, 0, 10, 20, 30.0, 2.0, 0.5, 75.0)
    assert str(state) == "50 of 100 rows (50%), 20 tokens, 30 tokens/s, 1 errors, 1 min 15 s left"
    assert 'value="0.5000"' in state._repr_html_()
    assert state.to_dict()["eta"] == 75.0


def test_a_worker_that_joins_counts_from_then_on() -> None:
    eta = Eta(SamplingParams(max_tokens=10, ignore_eos=True), rows=4000)

    def tell(worker: str, turn: int) -> None:
        ten = {"rows": 10, "prompt_tokens": 100, "output_tokens": 100}
        begun = {"begun_rows": 10, "begun_tokens": 100, "begun_estimate": 100}
        costs = (0.001, 0.001, 0.01)
        told = Increment(
            **ten, **begun, worker=worker, task=f"{worker}{turn}", ended=((10, 10),), costs=costs
        )
        eta.take(told, turn / 4)

    eta.take(Increment(cut_rows=4000, cut_tokens=40_000, task="cut"), 0.0)
    for turn in range(1, 61):
        tell("a", turn)
        if turn > 40:
            tell("b", turn)
    # 800 rows are done, 400 of them in the last five seconds, by two workers.
    assert eta.state(15.0).eta == pytest.approx(40, rel=0.1)


def test_a_fast_second_is_not_taken_for_the_speed() -> None:
    eta = Eta(SamplingParams(max_tokens=10), rows=4000)
    eta.take(Increment(cut_rows=4000, cut_tokens=40_000, task="cut"), 0.0)
    for turn in range(17):
        rows = 0 if not turn else 10 if turn <= 12 else 30
        tokens = {"prompt_tokens": 10 * rows, "output_tokens": 10 * rows, "ended": ((10, rows),)}
        begun = {"begun_rows": rows, "begun_tokens": 10 * rows, "begun_estimate": 10 * rows}
        eta.take(Increment(rows=rows, **tokens, **begun, task=f"{turn}"), turn / 4)
    assert eta.state(4.0).eta == pytest.approx((4000 - 240) / 60, rel=0.05)
