from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from distributed import KilledWorker
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError

from daskllm.cli import answer, main
from daskllm.llm import load
from tests.tiny import make_model

CITIES = ["Oslo", None, "Lima [north]", "", "北京", "Rome " * 200]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model("llama-gqa", tmp_path_factory.mktemp("cli") / "model"))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "cities.parquet"
    pd.DataFrame({"id": range(len(CITIES)), "city": CITIES}).to_parquet(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def last_line(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_generate_gives_the_table_back_with_the_answers(model: str, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = last_line(
        run("generate", "--model", model, "--input", table, "--prompt", "About {city}:", "--output", out,
            "--max-tokens", 5, "--ignore-eos", "--json")
    )  # fmt: skip
    answers = pd.read_parquet(out)
    assert answers["id"].tolist() == list(range(len(CITIES)))
    assert answers["city"].astype(object).where(answers["city"].notna(), None).tolist() == CITIES
    assert answers["generated_finish_reason"].tolist() == [
        "length",
        "error",
        "length",
        "length",
        "length",
        "error",
    ]
    assert answers["generated"].isna().tolist() == [False, True, False, False, False, True]
    assert answers["generated_error"].notna().tolist() == [False, True, False, False, False, True]

    llm = load(model)
    [expected] = llm.generate(["About 北京:"], max_tokens=5, ignore_eos=True)
    llm.close()
    assert answers["generated"][4] == expected.text
    assert (done["rows"], done["errors"], done["out_tokens"]) == (len(CITIES), 2, 20)
    assert done["output"] == str(out)


def test_generate_keeps_answers_unless_told_not_to(model: str, table: Path, tmp_path: Path) -> None:
    kept = tmp_path / "answers"
    arguments = ["generate", "--model", model, "--input", table, "--prompt", "city", "--max-tokens", 2]
    with dask.config.set({"daskllm.answers": str(kept)}):
        assert run(*arguments, "--output", tmp_path / "one", "--no-answers").exit_code == 0
        assert not kept.exists()
        assert run(*arguments, "--output", tmp_path / "two").exit_code == 0
        assert list(kept.rglob("*.arrow"))
        assert run(*arguments, "--output", tmp_path / "three").exit_code == 0
    answers = [pd.read_parquet(tmp_path / name) for name in ("one", "two", "three")]
    pd.testing.assert_frame_equal(answers[0], answers[1])
    pd.testing.assert_frame_equal(answers[0], answers[2])


def test_many_partitions_come_back_in_order(model: str, tmp_path: Path) -> None:
    for number in range(12):
        rows = {"id": [2 * number, 2 * number + 1], "text": ["a", "b"]}
        pd.DataFrame(rows).to_parquet(tmp_path / f"in-{number:02}.parquet")
    out = tmp_path / "out"
    result = run(
        "generate", "--model", model, "--input", tmp_path / "in-*.parquet", "--prompt", "text",
        "--output", out, "--max-tokens", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(list(out.glob("*.parquet"))) == 12
    assert pd.read_parquet(out)["id"].tolist() == list(range(24))


def test_columns_of_lists_pass_through(model: str, tmp_path: Path) -> None:
    lists = [[1, 2], None, []] * 30
    table = pd.DataFrame({"q": ["a"] * 90, "tags": lists, "day": [date(2024, 1, 31)] * 90})
    table.to_parquet(tmp_path / "in.parquet")
    out = tmp_path / "out"
    result = run(
        "generate", "--model", model, "--input", tmp_path / "in.parquet", "--prompt", "q", "--output", out,
        "--max-tokens", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(list(out.glob("*.parquet"))) == 2
    answers = pd.read_parquet(out)
    assert [None if cell is None else list(cell) for cell in answers["tags"]] == lists
    assert answers["day"].tolist() == table["day"].tolist()


@pytest.mark.parametrize("index", [pd.Index([5, 7], name="key"), pd.RangeIndex(3, 5, name="key")])
def test_an_index_is_written_beside_columns_of_lists(model: str, tmp_path: Path, index: pd.Index) -> None:
    table = pd.DataFrame({"tags": [[1], None], "q": ["a", "b"]}, index=index)
    table.to_parquet(tmp_path / "in.parquet")
    result = run(
        "generate", "--model", model, "--input", tmp_path / "in.parquet", "--prompt", "q", "--output",
        tmp_path / "out", "--max-tokens", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    back = pd.read_parquet(tmp_path / "out")
    assert back.index.tolist() == index.tolist()
    assert back.index.name == "key"
    assert list(back.columns[:2]) == ["tags", "q"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_message_lists_are_asked_as_a_conversation(model: str, tmp_path: Path, kind: str) -> None:
    talks = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        [{"role": "user", "content": "北京"}],
        None,
    ]
    table = pd.DataFrame({"messages": talks})
    if kind == "jsonl":
        table.to_json(tmp_path / "in.jsonl", orient="records", lines=True)
    else:
        table.to_parquet(tmp_path / "in.parquet")
    out = tmp_path / "out"
    result = run(
        "generate", "--model", model, "--input", tmp_path / f"in.{kind}", "--prompt", "messages", "--chat",
        "--output", out, "--max-tokens", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    answers = pd.read_parquet(out)
    assert list(answers["messages"][0]) == talks[0]
    assert answers["generated_error"].tolist()[2] == "prompt is null"
    llm = load(model)
    expected = llm.chat(talks[:2], max_tokens=3)
    llm.close()
    assert answers["generated"].tolist()[:2] == [completion.text for completion in expected]


def test_csv_in_a_column_of_another_name_and_the_chat_template(model: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,q\n007,Hello\n008,Bye\n")
    out = tmp_path / "out"
    result = run(
        "generate", "--model", model, "--input", tmp_path / "*.csv", "--prompt", "q", "--output", out,
        "--column", "said", "--chat", "--system", "Be brief.", "--max-tokens", 3, "--stop", "\n\n",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "2 rows" in result.stdout
    answers = pd.read_parquet(out)
    assert answers["id"].tolist() == ["007", "008"]
    llm = load(model)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    [expected] = llm.chat([asked], max_tokens=3, stop="\n\n")
    llm.close()
    assert answers["said"][0] == expected.text
    assert answers["said_prompt_tokens"][0] == expected.prompt_tokens


@pytest.mark.slow
@pytest.mark.cluster
def test_a_seed_gives_the_same_answers_on_a_cluster(model: str, tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(200)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    answers = []
    for name, where in (("threads", []), ("cluster", ["--workers", 2, "--threads", 1])):
        result = run(
            "generate", "--model", model, "--input", tmp_path / "in.jsonl", "--prompt", "text", "--output",
            tmp_path / name, "--max-tokens", 4, "--temperature", 1.0, "--seed", 3, *where,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        answers.append(pd.read_parquet(tmp_path / name))
    assert answers[0]["text"].tolist() == rows
    pd.testing.assert_frame_equal(*answers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--prompt": "About {town}:"}, "town"),
        ({"--prompt": "nothing"}, "nothing"),
        ({"--max-tokens": "0"}, "max_tokens must be at least 1, not 0"),
        ({"--top-p": "2"}, "top_p must be above 0 and at most 1, not 2.0"),
        ({"--temperature": "hot"}, "'hot' is not a valid float"),
        ({"--kv-memory": "lots"}, 'kv_memory must be "auto", bytes'),
        ({"--input": "/nowhere/*.csv"}, "no input file matches '/nowhere/*.csv'"),
        ({"--model": "/nowhere"}, "/nowhere"),
        ({"--threads": "2"}, "give --workers as well"),
        ({"--scheduler": "tcp://127.0.0.1:1", "--workers": "2"}, "leave out --workers"),
        ({"--scheduler": "tls://127.0.0.1:1"}, "DASK_DISTRIBUTED__COMM__TLS__CA_FILE"),
    ],
)
def test_a_bad_call_is_one_clear_line_and_status_2(
    model: str, table: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    options = {"--model": model, "--input": str(table), "--prompt": "city", "--output": str(tmp_path / "out")}
    result = run("generate", *[part for option in (options | changes).items() for part in option])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list((tmp_path / "out").glob("*.parquet")) == []


def test_an_output_directory_that_holds_something_is_refused(model: str, table: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = run("generate", "--model", model, "--input", table, "--prompt", "city", "--output", tmp_path)
    assert result.exit_code == 2
    assert "is not empty" in result.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_output_directory_that_cannot_be_made_is_one_line(model: str, table: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    result = run("generate", "--model", model, "--input", table, "--prompt", "city", "--output", out)
    assert result.exit_code == 2
    assert str(out) in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KilledWorker("chat-1", SimpleNamespace(address="tcp://127.0.0.1:1"), 3), "chat-1"),  # type: ignore[arg-type]
        (FutureCancelledError("chat-1", "scheduler-connection-lost"), "scheduler-connection-lost"),
        (CommClosedError("the scheduler is gone"), "the scheduler is gone"),
        (OverflowError("int too big"), "int too big"),
    ],
)
def test_what_befalls_a_cluster_is_one_line(
    model: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    monkeypatch.setattr(answer, "write", _raising(error))
    result = run(
        "generate", "--model", model, "--input", table, "--prompt", "city", "--output", tmp_path / "out"
    )
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_key_error_that_is_no_column_is_a_bug_with_its_traceback(
    model: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "write", _raising(KeyError("inside")))
    result = run(
        "generate", "--model", model, "--input", table, "--prompt", "city", "--output", tmp_path / "out"
    )
    assert isinstance(result.exception, KeyError)


def _raising(error: Exception) -> Callable[..., Any]:
    def raising(*arguments: Any) -> Any:
        raise error

    return raising


def refuse(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("this was not to be called")


def test_the_same_command_makes_only_what_is_missing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"row {i}" for i in range(300)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    out = tmp_path / "out"
    command = [
        "generate", "--model", model, "--input", tmp_path / "in.jsonl", "--prompt", "text", "--output", out,
        "--max-tokens", 2, "--temperature", 1.0, "--json",
    ]  # fmt: skip
    first = last_line(run(*command))
    parts = sorted(out.glob("part.*"))
    assert (first["parts"], first["written"]) == (len(parts), len(parts))
    assert len(parts) > 4
    before = pd.read_parquet(out)
    parts[3].unlink()
    times = [part.stat().st_mtime_ns for part in parts if part.exists()]
    monkeypatch.setattr(answer, "THREADS_PER_WORKER", 1)  # would cut the rows in other ways
    again = last_line(run(*command))
    assert (again["written"], again["rows"], again["out_tokens"]) == (1, 300, first["out_tokens"])
    assert [part.stat().st_mtime_ns for part in parts if part != parts[3]] == times
    pd.testing.assert_frame_equal(pd.read_parquet(out), before)


def test_a_finished_job_neither_reads_its_input_nor_loads_the_model(
    model: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "generate", "--model", model, "--input", tmp_path / "cit*.parquet", "--prompt", "About {city}:",
        "--output", tmp_path / "out", "--max-tokens", 2, "--json",
    ]  # fmt: skip
    first = last_line(run(*command))
    stat = table.stat()
    table.write_bytes(b"\0" * stat.st_size)
    os.utime(table, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for name in ("load", "read_tables", "running_on"):
        monkeypatch.setattr(answer, name, refuse)
    again = run(*command)
    done = last_line(again)
    assert (done["rows"], done["errors"], done["out_tokens"], done["written"]) == (
        first["rows"], first["errors"], first["out_tokens"], 0,
    )  # fmt: skip
    assert f"{first['parts']} of {first['parts']} parts there before" in again.stderr
    changed = run(*command, "--max-tokens", 3)
    assert changed.exit_code == 2
    assert "sampling.max_tokens: 2 there, 3 now" in changed.stderr
    for options, words in ((["--no-resume"], "holds a job already"), (["--max-errors", "0%"], "max_errors")):
        refused = run(*command, *options)
        assert refused.exit_code == 2
        assert words in refused.stderr
    table.unlink()
    assert last_line(run(*command))["rows"] == first["rows"]
    told = json.loads((tmp_path / "out" / "_daskllm.json").read_text())
    (tmp_path / "out" / "_daskllm.json").write_text(json.dumps(told | {"state": "unfinished"}))
    gone = run(*command)
    assert gone.exit_code == 2
    assert "no input file matches" in gone.stderr


def test_failed_rows_are_limited_dropped_and_asked_again(model: str, table: Path, tmp_path: Path) -> None:
    command = [
        "generate", "--model", model, "--input", table, "--prompt", "About {city}:", "--max-tokens", 2,
        "--json", "--output",
    ]  # fmt: skip
    stopped = run(*command, tmp_path / "out", "--max-errors", 1)
    assert stopped.exit_code == 2
    assert "2 of 6 rows failed, and max_errors is 1" in stopped.stderr
    assert last_line(run(*command, tmp_path / "out", "--max-errors", "50%"))["errors"] == 2
    again = last_line(run(*command, tmp_path / "out", "--retry-errors"))
    assert (again["written"], again["errors"], again["rows"]) == (1, 2, 6)
    assert again["out_tokens_per_s"] is None
    dropped = last_line(run(*command, tmp_path / "dropped", "--on-error", "drop"))
    assert (dropped["rows"], dropped["errors"]) == (4, 2)
    raised = run(*command, tmp_path / "raised", "--on-error", "raise")
    assert raised.exit_code == 2
    assert "row 1 of part 0 failed: column 'city' is null" in raised.stderr
    begun = last_line(run(*command, tmp_path / "out", "--overwrite", "--max-tokens", 1))
    assert begun["out_tokens"] == 4


def test_a_place_that_cannot_be_written_to_is_one_line(model: str, table: Path) -> None:
    result = run("generate", "--model", model, "--input", table, "--prompt", "city", "--output", "/proc/out")
    assert result.exit_code == 2
    assert "/proc/out cannot be made" in result.stderr
    assert result.stderr.count("\n") == 1


def test_info_tells_a_model_s_shape(model: str) -> None:
    facts = last_line(run("info", "--model", model, "--json"))
    assert (facts["family"], facts["layers"], facts["heads"], facts["kv_heads"]) == ("llama", 3, 4, 2)
    assert (facts["vocab_size"], facts["context"], facts["chat_template"]) == (288, 256, True)
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert facts["parameters"] == 2 * 288 * 64 + 3 * layer + 64
    assert "parameters" in run("info", "--model", model).stdout


def test_info_on_a_directory_that_is_no_model(tmp_path: Path) -> None:
    result = run("info", "--model", tmp_path)
    assert result.exit_code == 2
    assert "config.json" in result.stderr


def test_bench_prints_its_line(model: str, tmp_path: Path) -> None:
    work = tmp_path / "work.json"
    work.write_text(json.dumps([{"prompt": [5, 6, 7], "out": 4}] * 5))
    measured = last_line(run("bench", "--model", model, "--work", work, "--json"))
    assert measured["out_tokens"] == 20
    shown = run("bench", "--model", model, "--work", work, "--profile").stdout
    assert "decode steps of" in shown
    # The likeliest token is found in the head's product, and nothing is left to sample.
    parts = ("linear", "attention", "embedding and head", "scheduling", "python")
    assert all(f" {part} " in shown for part in parts)
    for row, words in (
        ({"prompt": [5, 999], "out": 4}, "row 0: token id 999 is outside"),
        ({"prompt": [5] * 250, "out": 40}, "row 0: 250 tokens"),
    ):
        work.write_text(json.dumps([row]))
        refused = run("bench", "--model", model, "--work", work)
        assert refused.exit_code == 2
        assert words in refused.stderr
    missing = run("bench", "--model", model, "--work", tmp_path / "none.json")
    assert missing.exit_code == 2
    assert "none.json" in missing.stderr


@pytest.mark.slow
@pytest.mark.cluster
def test_the_demo_answers_its_table_and_may_run_again(tmp_path: Path) -> None:
    out = tmp_path / "answers"
    command = [sys.executable, "-m", "daskllm", "demo", "--output", out, "--json"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        counts = json.loads(done.stdout.strip().splitlines()[-1])
        answers = pd.read_parquet(out)
        assert counts["rows"] == len(answers) > 0
        assert counts["errors"] == 0
        assert counts["right"] >= 0.95
    assert "http://127.0.0.1:" in done.stderr
    assert "right?" in done.stderr


PUBLISHED = Path(__file__).parents[2] / "shared/data/planning/bert24_inference.json"


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published instance is not beside this checkout")
@pytest.mark.parametrize(("devices", "best"), [(2, 47.479), (3, 32.2429), (4, 24.9169), (6, 17.7899)])
def test_plan_finds_the_published_optima(devices: int, best: float) -> None:
    plan = run("plan", "--graph", PUBLISHED, "--devices", devices, "--splitter", "exact", "--json")
    assert last_line(plan)["bottleneck"] == pytest.approx(best, abs=5e-4)


def test_plan_of_a_model(model: str) -> None:
    [replica] = last_line(run("plan", "--model", model, "--devices", 2, "--stages", 2, "--json"))["replicas"]
    placed = [layer for stage in replica["stages"] for layer in stage["layers"]]
    assert placed == ["embed", "layers.0", "layers.1", "layers.2", "head"]
    assert "stage" in run("plan", "--model", model, "--devices", 2, "--stages", 2).stdout


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--memory", "20kB"], "What would help"),
        (["--stages", "9"], "stages"),
        (["--stages", "many"], "stages must be"),
        (["--graph", "x.json"], "one of them"),
    ],
)
def test_plan_that_cannot_be(model: str, extra: list[str], words: str) -> None:
    result = run("plan", "--model", model, "--devices", 2, *extra)
    assert result.exit_code == 2
    assert words in result.stderr
