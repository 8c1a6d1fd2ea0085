from __future__ import annotations

import pytest

from daskllm.dashboard import tables
from daskllm.dashboard.board import Board
from daskllm.dashboard.engines import EngineFigures
from daskllm.dashboard.metrics import of_scheduler
from daskllm.dashboard.plots import Workers
from daskllm.runtime.progress import Increment


def engine(prompt: int, output: int, prefill: float, decode: float) -> EngineFigures:
    return EngineFigures(
        "m", prompt_tokens=prompt, output_tokens=output, prefill_seconds=prefill, decode_seconds=decode
    )


def told(board: Board, task: str, worker: str = "a", **fields: object) -> None:
    new = Increment(worker=worker, task=task, job="chat-cut-01", **fields)  # type: ignore[arg-type]
    board.take(new, lambda: range(2), 0.0)


def left(board: Board, now: float) -> float:
    """Of its only job, the seconds left that Prometheus is told."""
    return next(value for name, _, value in of_scheduler(board, now) if name == "daskllm_job_eta_seconds")


def test_rates_and_shares_are_of_the_latest_seconds() -> None:
    board = Board()
    for second in range(11):
        board.take_worker(
            "tcp://a", "a", [engine(100 * second, 10 * second, 0.25 * second, 0.5 * second)], second
        )
    (view,) = board.workers.values()
    assert (view.prompt_rate, view.output_rate) == (100, 10)
    assert view.shares == {"prefill": 0.25, "decode": 0.5, "stage": 0.0}
    assert view.sums["idle"] == pytest.approx(2.5)
    for second in range(11, 20):
        board.take_worker("tcp://a", "a", [engine(1000, 100, 2.5, 5.0)], second)
    assert (view.prompt_rate, view.output_rate, sum(view.shares.values())) == (0, 0, 0)
    board.sample(20.0)
    assert (board.history[-1].output_rate, board.history[-1].workers) == (0, 1)


def test_a_heartbeat_that_comes_twice_counts_once() -> None:
    board = Board()
    for second in (0.0, 3.0, 3.0, 3.0):
        board.take_worker("tcp://a", "a", [engine(int(second), 0, 0, 0)], second)
    assert board.total("prompt") == 3
    assert board.workers["tcp://a"].prompt_rate == 1


def test_what_a_lost_worker_did_stays_and_a_closed_engine_takes_nothing_back() -> None:
    board = Board()
    for name in ("a", "b"):
        board.take_worker(name, name, [engine(0, 0, 0, 0)], 0.0)
        board.take_worker(name, name, [engine(5, 7, 1, 1)], 4.0)
    board.take_worker("b", "b", [], 5.0)
    board.drop_worker("a", 6.0)
    board.drop_worker("nobody", 6.0)
    assert (board.total("prompt"), board.total("output")) == (10, 14)
    assert (board.losses, list(board.lost)) == (1, [(6.0, "a")])


def test_a_job_counts_rows_errors_and_what_is_left() -> None:
    board = Board()
    told(board, "cut-0", cut_rows=10, cut_tokens=100, asks=(4, 1, True))
    told(board, "s-0", begun_rows=10, begun_tokens=100, begun_estimate=100)
    told(board, "s-0", rows=4, errors=1, prompt_tokens=40, output_tokens=12, kinds=(("null", 1),), priority=3)
    (job,) = board.jobs.values()
    state = job.state(1.0)
    assert (job.label, state.rows, state.total_rows, job.priority) == ("chat 01", 4, 20, 3)
    assert (state.errors, board.errors()) == (1, {"null": 1})
    board.queue({"chat 01": (1, 2)}, 1.0)
    assert (job.status(1.0), job.running, job.waiting) == ("running", 1, 2)
    board.queue({}, 1.0)
    assert job.status(1.0) == "running"  # its tasks may just be on their way
    assert left(board, 2.0) > 0
    board.queue({}, 10.0)
    assert job.status(10.0) == "done"
    assert left(board, 10.0) == 0


def test_rows_of_a_task_that_runs_again_are_recomputed_but_for_those_remembered() -> None:
    board = Board()
    told(board, "s-0", begun_rows=8)
    told(board, "s-0", rows=5)
    told(board, "s-1", begun_rows=2)
    told(board, "s-1", rows=2)
    told(board, "s-0", worker="b", begun_rows=8)
    told(board, "s-0", worker="b", rows=5, remembered=5)
    told(board, "s-0", worker="b", rows=3)
    assert (board.counted("rows"), board.counted("recomputed"), board.counted("remembered")) == (15, 3, 5)


def test_a_table_that_is_computed_again_starts_anew_and_is_summed() -> None:
    board = Board()
    for _ in range(2):
        told(board, "cut-0", cut_rows=2, asks=(4, 1, True))
        told(board, "cut-1", cut_rows=2, asks=(4, 1, True), part=1)
        for part in (0, 1):
            told(board, f"s-{part}", begun_rows=2, part=part)
            told(board, f"s-{part}", rows=2, part=part)
        (job,) = board.jobs.values()
        assert (job.state(0.0).rows, job.state(0.0).total_rows, job.status(0.0)) == (4, 4, "done")
    assert (job.counts["rows"], job.sums["rows"], job.counts["recomputed"]) == (4, 8, 0)


def test_a_name_that_was_provisional_goes_and_no_more_jobs_are_kept_than_fit() -> None:
    board = Board()
    board.queue({"chat 99": (0, 4)}, 0.0)
    assert board.jobs["chat 99"].status(0.0) == "waiting"
    board.queue({}, 1.0)
    assert not board.jobs
    for number in range(100):
        board.take(Increment(span=f"job {number}", rows=1), tuple, 0.0)
    assert len(board.jobs) == 32
    assert "job 99" in board.jobs


def test_what_users_name_is_escaped() -> None:
    board = Board()
    board.take(Increment(span="<script>", rows=1, kinds=(("<b>", 1),)), tuple, 0.0)
    board.take_worker("a", "<i>", [EngineFigures("<u>", layers="<s>")], 0.0)
    board.drop_worker("b", 0.0)
    html = "".join(write(board, 0.0) for write in (tables.tiles, tables.jobs, tables.stages, tables.troubles))
    assert "&lt;script&gt;" in html
    assert not any(tag in html for tag in ("<script>", "<b>", "<i>", "<u>", "<s>"))


def test_more_workers_or_jobs_than_are_shown_are_said() -> None:
    board = Board()
    for number in range(40):
        board.take_worker(f"tcp://{number}", f"{number}", [engine(0, 0, 0, 0)], 0.0)
        if number == 23:
            few = Workers(board)
            few.update()
            assert ("Time by worker" in few.title.text, " of " in few.title.text) == (True, False)
    many = Workers(board)
    many.update()
    assert "Time by worker (24 of 40)" in many.title.text
    assert len(many.source.data["worker"]) == len(many.y_range.factors) == 24
    for number in range(20):
        board.take(Increment(span=f"job {number}", rows=1), tuple, 0.0)
    assert "Jobs (12 of 20)" in tables.jobs(board, 0.0)


def test_a_full_batch_and_an_inner_stage_are_told_apart() -> None:
    board = Board()
    board.take_worker("tcp://a", "a", [EngineFigures("m", running=16, room=64, kv_used=1, kv_blocks=4)], 0.0)
    board.take_worker("tcp://b", "b", [EngineFigures("m", stage="1/2")], 0.0)
    shown = Workers(board)
    shown.update()
    data = shown.source.data
    assert (data["batch"], data["batch_text"]) == ([0.25, 0.0], ["16 of 64", "inner stage"])
    assert (data["kv"], data["kv_text"]) == ([0.25, 0.0], ["1 of 4", "inner stage"])
    assert data["idle"] == [1.0, 1.0]


def test_an_empty_board_can_be_shown() -> None:
    html = "".join(
        write(Board(), 0.0) for write in (tables.tiles, tables.jobs, tables.stages, tables.troubles)
    )
    assert "no worker holds a model" in html
