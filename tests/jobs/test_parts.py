"""Parts and their manifest, with a model that is none: what is written, kept, made again, refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from daskllm.jobs import Directory, prepare, run
from daskllm.types import Completion, JobError, RowError
from tests.fake_session import FakeLLM, FakeSession

ROWS, PARTS = 20, 4


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A directory of four Parquet files of five rows; row 7 is null."""
    path = tmp_path / "rows"
    path.mkdir()
    for part in range(PARTS):
        numbers = range(part * 5, part * 5 + 5)
        text = [None if n == 7 else f"row {n}" for n in numbers]
        pd.DataFrame({"id": numbers, "text": text}).to_parquet(path / f"{part}.parquet")
    return path


@pytest.fixture
def ask(rows: Path, fake: FakeLLM) -> Callable[..., dd.DataFrame]:
    def asked(prompt: str = "{text}!", llm: FakeLLM = fake, **sampling: Any) -> dd.DataFrame:
        return dd.read_parquet(str(rows / "*.parquet")).llm.generate(llm, prompt, **sampling)

    return asked


def files(path: Path) -> dict[str, tuple[int, int]]:
    """The parts with inode and time, which tell whether one was written again."""
    parts = sorted(path.glob("part.*"))
    return {part.name: (part.stat().st_ino, part.stat().st_mtime_ns) for part in parts}


def manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "_daskllm.json").read_text())


Ask = Callable[..., dd.DataFrame]


def test_the_table_is_written_part_by_part_with_what_made_it(
    ask: Ask, rows: Path, tmp_path: Path, fake: FakeLLM
) -> None:
    out = ask()
    done = out.llm.to_parquet(tmp_path / "out")
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "out"), out.compute().reset_index(drop=True), check_dtype=False
    )
    told = manifest(tmp_path / "out")
    names = list(files(tmp_path / "out"))
    assert names == [f"part.0000{n}-{told['job']}.parquet" for n in range(PARTS)]
    assert (done.parts, done.written, done.rows, done.errors) == (PARTS, PARTS, ROWS, 1)
    assert (told["rows"], told["errors"], told["state"]) == (ROWS, 1, "finished")
    assert done.out_tokens == told["out_tokens"] == out["generated_completion_tokens"].compute().sum()
    assert told["facts"]["calls"][0]["prompt"] == "{text}!"
    assert told["facts"]["calls"][0]["model"]["content"] == "fake weights"
    assert [Path(path).name for path, _, _ in told["inputs"]] == [f"{n}.parquet" for n in range(PARTS)]
    assert told["inputs"][0][1] == (rows / "0.parquet").stat().st_size
    second = json.loads(pq.read_schema(tmp_path / "out" / names[1]).metadata[b"daskllm"])
    assert (second["part"], second["rows"], second["errors"]) == (1, 5, 1)
    assert second["facts"] == told["facts"]


def test_a_second_call_answers_nothing_and_touches_nothing(ask: Ask, tmp_path: Path, fake: FakeLLM) -> None:
    first = ask().llm.to_parquet(tmp_path / "out")
    before, answered = files(tmp_path / "out"), fake.rows
    again = ask().llm.to_parquet(tmp_path / "out")
    assert (again.written, again.rows, again.out_tokens) == (0, first.rows, first.out_tokens)
    assert fake.rows == answered
    assert files(tmp_path / "out") == before


def cut_short(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-20])


def flip_a_bit(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[40] ^= 1
    part.write_bytes(data)


@pytest.mark.parametrize("harm", [Path.unlink, cut_short, flip_a_bit])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("kind", ["parquet", "json", "csv"])
def test_only_a_part_that_is_lost_or_broken_is_made_again(
    ask: Ask, tmp_path: Path, fake: FakeLLM, harm: Callable[[Path], None], recorded: bool, kind: str
) -> None:
    path = tmp_path / "out"
    getattr(ask().llm, f"to_{kind}")(path)
    before, answered = files(path), fake.rows
    whole = {name: (path / name).read_bytes() for name in before}
    if not recorded:  # the client was lost before it could write what it knew
        told = manifest(path)
        (path / "_daskllm.json").write_text(json.dumps(told | {"done": [], "state": "unfinished"}))
    name = sorted(before)[2]
    harm(path / name)
    done = getattr(ask().llm, f"to_{kind}")(path)
    assert (done.written, done.rows) == (1, ROWS)
    assert fake.rows == answered + 5
    after = files(path)
    assert {n for n in after if after[n] != before[n]} == {name}
    assert {name: (path / name).read_bytes() for name in after} == whole
    assert manifest(path)["state"] == "finished"


def test_a_part_that_was_only_touched_is_kept(ask: Ask, tmp_path: Path, fake: FakeLLM) -> None:
    ask().llm.to_parquet(tmp_path / "out")
    answered = fake.rows
    name = min(files(tmp_path / "out"))
    os.utime(tmp_path / "out" / name)
    assert ask().llm.to_parquet(tmp_path / "out").written == 0
    assert fake.rows == answered


def test_parts_can_be_read_while_the_rest_is_made_and_a_stopped_job_goes_on(
    ask: Ask, tmp_path: Path, fake: FakeLLM
) -> None:
    seen: list[int] = []

    def look(part: Any) -> None:
        there = pd.read_parquet(tmp_path / "out")
        assert set(range(part.number * 5, part.number * 5 + 5)) <= set(there["id"])
        seen.append(part.number)
        if len(seen) == 2:
            raise InterruptedError("stop")

    # Threads of Dask's that are under way end their parts after the run is given up.
    with dask.config.set(scheduler="synchronous"), pytest.raises(InterruptedError, match="stop"):
        run(prepare(ask(), tmp_path / "out", client=None), told=look)
    before = files(tmp_path / "out")
    assert len(before) == 2
    answered = fake.rows
    done = ask().llm.to_parquet(tmp_path / "out")
    assert done.written == PARTS - len(before)
    assert fake.rows == answered + 5 * done.written
    assert before.items() <= files(tmp_path / "out").items()
    assert pd.read_parquet(tmp_path / "out")["id"].tolist() == list(range(ROWS))


def test_a_cancelled_job_stops(ask: Ask, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError, match="cancelled"):
        run(prepare(ask(), tmp_path / "out", client=None), cancelled=lambda: True)
    assert files(tmp_path / "out") == {}


def test_unseeded_draws_go_on_from_the_job_s_seed(ask: Ask, tmp_path: Path) -> None:
    whole = ask(temperature=1.0)
    whole.llm.to_parquet(tmp_path / "out")
    before = pd.read_parquet(tmp_path / "out")
    sorted((tmp_path / "out").glob("part.*"))[1].unlink()
    other = ask(temperature=1.0)
    assert other.expr._name != whole.expr._name
    assert other.llm.to_parquet(tmp_path / "out").written == 1
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out"), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "{text}?"}, 'prompt: "{text}!" there, "{text}?" now'),
        ({"max_tokens": 7}, "sampling.max_tokens: 128 there, 7 now"),
        ({"seed": 3, "temperature": 1.0}, "sampling.seed: null there, 3 now"),
        ({"system": "Be brief."}, 'system: null there, "Be brief." now'),
        ({"llm": "other"}, 'model.content: "fake weights" there, "other weights" now'),
    ],
)
def test_another_job_in_the_same_directory_is_refused(
    ask: Ask, tmp_path: Path, fake: FakeLLM, change: dict[str, Any], words: str
) -> None:
    ask().llm.to_parquet(tmp_path / "out")
    before = files(tmp_path / "out")
    if "llm" in change:
        change = {"llm": FakeLLM(replace(fake.spec, content="other weights"))}
    with pytest.raises(ValueError, match="holds another job") as refused:
        ask(**change).llm.to_parquet(tmp_path / "out")
    assert words in str(refused.value)
    assert files(tmp_path / "out") == before
    done = ask(**change).llm.to_parquet(tmp_path / "out", overwrite=True)
    assert done.written == PARTS
    assert not set(before) & set(files(tmp_path / "out"))
    assert len(pd.read_parquet(tmp_path / "out")) == ROWS


def test_other_inputs_are_another_job(ask: Ask, rows: Path, tmp_path: Path) -> None:
    ask().llm.to_parquet(tmp_path / "out")
    pd.DataFrame({"id": [5], "text": ["new"]}).to_parquet(rows / "1.parquet")
    with pytest.raises(ValueError, match=r"input .*1\.parquet: has another size"):
        ask().llm.to_parquet(tmp_path / "out")
    pd.DataFrame({"id": [20], "text": ["new"]}).to_parquet(rows / "4.parquet")
    with pytest.raises(ValueError, match=r"input .*4\.parquet: was not there"):
        ask().llm.to_parquet(tmp_path / "out")


def test_other_rows_in_memory_are_another_job(fake: FakeLLM, tmp_path: Path) -> None:
    for text in (["a", "b"], ["a", "b"], ["a", "c"]):
        out = dd.from_pandas(pd.DataFrame({"text": text}), npartitions=2).llm.generate(fake, "text")
        if text[1] == "c":
            with pytest.raises(ValueError, match="table: "):
                out.llm.to_parquet(tmp_path / "out")
        else:
            out.llm.to_parquet(tmp_path / "out")
    assert fake.rows == 2


def test_what_no_job_has_written_is_never_touched(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "part.0.parquet").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"not empty|part\.0\.parquet"):
            ask().llm.to_parquet(path, overwrite=overwrite)
    assert (path / "part.0.parquet").read_text() == "mine"


def test_without_resume_a_directory_with_a_job_is_refused(ask: Ask, tmp_path: Path) -> None:
    ask().llm.to_parquet(tmp_path / "out", resume=False)
    with pytest.raises(ValueError, match="holds a job already"):
        ask().llm.to_parquet(tmp_path / "out", resume=False)


def test_a_manifest_that_cannot_be_read_says_so(ask: Ask, tmp_path: Path) -> None:
    ask().llm.to_parquet(tmp_path / "out")
    for text in ("{", '{"format": 99}', '{"format": 1}'):
        (tmp_path / "out" / "_daskllm.json").write_text(text)
        with pytest.raises(ValueError, match=r"_daskllm\.json cannot be read"):
            ask().llm.to_parquet(tmp_path / "out")
    assert ask().llm.to_parquet(tmp_path / "out", overwrite=True).written == PARTS


def test_a_table_without_answers_is_refused(tmp_path: Path) -> None:
    table = dd.from_pandas(pd.DataFrame({"text": ["a"]}), npartitions=1)
    with pytest.raises(ValueError, match="has no answers"):
        table.llm.to_parquet(tmp_path / "out")


def test_failed_rows_stay_or_go_or_end_the_job(ask: Ask, tmp_path: Path) -> None:
    kept = ask().llm.to_parquet(tmp_path / "kept")
    dropped = ask().llm.to_parquet(tmp_path / "dropped", on_error="drop")
    assert (kept.rows, kept.errors, dropped.rows, dropped.errors) == (ROWS, 1, ROWS - 1, 1)
    whole, rest = pd.read_parquet(tmp_path / "kept"), pd.read_parquet(tmp_path / "dropped")
    assert whole["generated_error"].dropna().tolist() == ["column 'text' is null"]
    assert rest["id"].tolist() == [n for n in range(ROWS) if n != 7]
    with pytest.raises(RowError, match="row 2 of part 1 failed: column 'text' is null"):
        ask().llm.to_parquet(tmp_path / "raised", on_error="raise")
    assert not any("part.00001" in name for name in files(tmp_path / "raised"))
    with pytest.raises(RowError, match="column 'text' is null"):  # the parts are there, and so is the row
        ask().llm.to_parquet(tmp_path / "kept", on_error="raise")
    with pytest.raises(ValueError, match='failed_rows: "kept" there, "dropped" now'):
        ask().llm.to_parquet(tmp_path / "kept", on_error="drop")


@pytest.mark.parametrize(
    ("limit", "stops"), [(0, True), (1, False), (0.04, True), (0.05, False), (1.0, False)]
)
def test_a_job_stops_when_too_many_rows_failed(ask: Ask, tmp_path: Path, limit: float, stops: bool) -> None:
    if not stops:
        assert ask().llm.to_parquet(tmp_path / "out", max_errors=limit).errors == 1
        return
    with pytest.raises(JobError, match="1 of .* rows failed, and max_errors is .*column 'text' is null"):
        ask().llm.to_parquet(tmp_path / "out", max_errors=limit)
    assert files(tmp_path / "out")
    with pytest.raises(JobError):
        ask().llm.to_parquet(tmp_path / "out", max_errors=limit)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"on_error": "ignore"}, ValueError, 'on_error must be "raise", "keep" or "drop"'),
        ({"max_errors": -1}, ValueError, "max_errors must be a number of rows"),
        ({"max_errors": 1.5}, ValueError, "a share between"),
        ({"max_errors": True}, TypeError, "max_errors"),
        ({"max_errors": "5%"}, TypeError, "max_errors"),
        ({"encryption_key": b"short"}, ValueError, "16, 24 or 32 bytes long, not 5"),
        ({"encryption_key": "text"}, TypeError, "encryption_key must be bytes"),
        ({"retry_errors": True}, ValueError, "holds no job yet"),
    ],
)
def test_a_bad_argument_is_refused_before_any_work(
    ask: Ask, tmp_path: Path, fake: FakeLLM, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ask().llm.to_parquet(tmp_path / "out", **arguments)
    assert fake.rows == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_failed_rows_of_text_files_alone_are_asked_again(
    tmp_path: Path, fake: FakeLLM, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    answer = FakeSession._answer

    def moody(self: FakeSession, prompt: Any, *arguments: Any) -> Completion:
        return Completion.failed('a "bad",\nday') if "3" in str(prompt) else answer(self, prompt, *arguments)

    texts = [f'row {i},\n"{i}"' if i != 8 else None for i in range(12)]
    frame = dd.from_pandas(pd.DataFrame({"id": range(12), "text": texts}), npartitions=3)
    path = tmp_path / "out"

    def write(**options: Any) -> Any:
        return getattr(frame.llm.generate(fake, "text").llm, f"to_{kind}")(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(FakeSession, "_answer", moody)
        assert write().errors == 2
    before = {part.name: part.read_bytes() for part in path.glob("part.*")}
    answered = fake.rows
    done = write(retry_errors=True)
    assert (done.written, done.rows, done.errors) == (2, 12, 1)
    assert fake.rows == answered + 2
    whole = getattr(frame.llm.generate(fake, "text").llm, f"to_{kind}")(tmp_path / "whole")
    for part in sorted(path.glob("part.*")):
        assert part.read_bytes() == (tmp_path / "whole" / part.name).read_bytes()
    assert sum(part.read_bytes() != before[part.name] for part in path.glob("part.*")) == 1
    assert (done.prompt_tokens, done.out_tokens) == (whole.prompt_tokens, whole.out_tokens)
    assert write().written == 0


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"n": 2}, {"logprobs": 0}])
def test_failed_rows_alone_are_asked_again(
    ask: Ask, tmp_path: Path, fake: FakeLLM, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    answer = FakeSession._answer

    def moody(self: FakeSession, prompt: Any, *arguments: Any) -> Completion:
        failing = str(prompt) in ("row 3!", "row 11!", "row 13!")
        return Completion.failed("out of sorts") if failing else answer(self, prompt, *arguments)

    path = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(FakeSession, "_answer", moody)
        assert ask(**sampling).llm.to_parquet(path).errors == 4
    first, before, answered = pd.read_parquet(path), files(path), fake.rows
    done = ask(**sampling).llm.to_parquet(path, retry_errors=True)
    assert (done.written, done.rows, done.errors) == (3, ROWS, 1)
    assert fake.rows == answered + 4
    after, mended = files(path), pd.read_parquet(path)
    assert done.new_tokens == done.out_tokens - first["generated_completion_tokens"].sum() > 0
    assert [name[:10] for name in after if after[name] == before[name]] == ["part.00003"]
    rest = [n for n in range(ROWS) if n not in (3, 11, 13)]
    pd.testing.assert_frame_equal(mended.iloc[rest], first.iloc[rest])
    assert mended["generated_error"].notna().tolist() == [n == 7 for n in range(ROWS)]
    seed = manifest(path)["seeds"][0]
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    told = manifest(path) | {"done": [], "state": "unfinished"}
    (undisturbed / "_daskllm.json").write_text(json.dumps(told))
    ask(**sampling).llm.to_parquet(undisturbed)
    assert manifest(undisturbed)["seeds"] == [seed]
    pd.testing.assert_frame_equal(pd.read_parquet(undisturbed), mended)


def test_failed_rows_cannot_be_asked_where_rows_do_not_match(ask: Ask, tmp_path: Path) -> None:
    out = ask()
    filtered = out[out["generated_completion_tokens"] != 9]
    filtered.llm.to_parquet(tmp_path / "out")
    with pytest.raises(ValueError, match="retry_errors needs every row"):
        filtered.llm.to_parquet(tmp_path / "out", retry_errors=True)
    ask().llm.to_parquet(tmp_path / "dropped", on_error="drop")
    with pytest.raises(ValueError, match="are gone"):
        ask().llm.to_parquet(tmp_path / "dropped", on_error="drop", retry_errors=True)


def test_an_encrypted_job_shows_neither_rows_nor_prompt(ask: Ask, tmp_path: Path, fake: FakeLLM) -> None:
    key, path = b"0123456789abcdef", tmp_path / "out"
    ask("A secret: {text}").llm.to_parquet(path, encryption_key=key)
    for file in path.iterdir():
        assert b"secret" not in file.read_bytes()
        assert b"row 3" not in file.read_bytes()
    with pytest.raises(OSError, match="encrypt"):
        pq.read_table(min(path.glob("part.*")))
    decryption = pe.create_decryption_properties(key)
    tables = [pq.read_table(part, decryption_properties=decryption) for part in sorted(path.glob("part.*"))]
    assert pa.concat_tables(tables)["generated"][3].as_py() == "<A secret: row 3>"
    answered = fake.rows
    told = manifest(path)
    (path / "_daskllm.json").write_text(json.dumps(told | {"done": [], "state": "unfinished"}))
    assert ask("A secret: {text}").llm.to_parquet(path, encryption_key=key).written == 0
    assert fake.rows == answered
    for other in (b"fedcba9876543210", None):
        with pytest.raises(ValueError, match="encrypted_with"):
            ask("A secret: {text}").llm.to_parquet(path, encryption_key=other)


def test_json_lines_and_csv_hold_the_same_rows(ask: Ask, tmp_path: Path) -> None:
    out = ask(n=2)
    out.llm.to_parquet(tmp_path / "parquet")
    out.llm.to_json(tmp_path / "json")
    out.llm.to_csv(tmp_path / "csv")
    expected = pd.read_parquet(tmp_path / "parquet")
    parts = sorted((tmp_path / "json").glob("part.*.jsonl"))
    told = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    assert [row["id"] for row in told] == expected["id"].tolist()
    assert told[3]["generated"] == list(expected["generated"][3])
    assert told[7]["generated"] is None
    parts = sorted((tmp_path / "csv").glob("part.*.csv"))
    cells = pd.concat(map(pd.read_csv, parts), ignore_index=True)
    assert cells["id"].tolist() == expected["id"].tolist()
    assert json.loads(cells["generated"][3]) == list(expected["generated"][3])


def test_columns_of_lists_have_one_type_in_all_parts(fake: FakeLLM, tmp_path: Path) -> None:
    table = pd.DataFrame({"text": list("abcd")})
    frame = dd.from_pandas(table, npartitions=2)
    frame.llm.embed(fake, "text").llm.to_parquet(tmp_path / "vectors")
    vectors = pd.read_parquet(tmp_path / "vectors")["embedding"]
    assert np.stack(vectors.tolist()).dtype == np.float32
    frame.llm.score(fake, "text").llm.to_parquet(tmp_path / "scores")
    assert pd.read_parquet(tmp_path / "scores")["score"].tolist() == [-1.0] * 4
    for file in (tmp_path / "vectors").glob("part.*"):
        assert pq.read_schema(file).field("embedding").type == pa.list_(pa.float32())


def test_an_object_store_is_as_good_as_a_directory(ask: Ask, fake: FakeLLM) -> None:
    where = "memory://daskllm-parts/out"
    ask().llm.to_parquet(where)
    answered = fake.rows
    store = fsspec.filesystem("memory")
    try:
        names = sorted(store.ls("/daskllm-parts/out", detail=False))
        assert len(names) == PARTS + 1
        assert ask().llm.to_parquet(where).written == 0
        store.rm(names[-1])
        assert ask().llm.to_parquet(where).written == 1
        assert fake.rows == answered + 5
        assert ask("{text}?").llm.to_parquet(where, overwrite=True).written == PARTS
        assert len(store.ls("/daskllm-parts/out", detail=False)) == PARTS + 1
    finally:
        store.rm("/daskllm-parts", recursive=True)


@pytest.mark.parametrize("conditional", [True, False])
def test_of_two_who_deliver_a_part_the_later_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, conditional: bool
) -> None:
    store = fsspec.filesystem("memory")
    directory = Directory("memory://daskllm-twice")
    put = type(store).pipe_file

    def older(self: Any, path: str, value: bytes) -> Any:
        return put(self, path, value)

    if not conditional:  # a client that knows no conditional put writes over what is there
        monkeypatch.setattr(type(store), "pipe_file", older)
    try:
        first = directory.write("part", b"rows", same=True)
        again = directory.write("part", b"rows", same=True)
        assert (again == first) is conditional
        directory.write("part", b"damaged")
        assert directory.write("part", b"rows", same=True).size == 4
        assert directory.read("part") == b"rows"
    finally:
        store.rm("/daskllm-twice", recursive=True)


def test_rows_that_were_shown_before_are_not_paid_again(rows: Path, tmp_path: Path, fake: FakeLLM) -> None:
    llm = FakeLLM(fake.spec, answers=str(tmp_path / "answers"))
    for sampling in ({}, {"temperature": 1.0}):
        answered = fake.rows
        out = dd.read_parquet(str(rows / "*.parquet")).llm.generate(llm, "{text}!", **sampling)
        shown = out.head(5)
        assert fake.rows == answered + 5
        out.llm.to_parquet(tmp_path / f"out-{len(sampling)}")
        assert fake.rows == answered + ROWS
        table = pd.read_parquet(tmp_path / f"out-{len(sampling)}")
        assert table["generated"].tolist()[:5] == shown["generated"].tolist()


def test_the_processes_scheduler_writes_too(ask: Ask, tmp_path: Path, fake: FakeLLM) -> None:
    with dask.config.set(scheduler="processes", num_workers=2):
        assert ask().llm.to_parquet(tmp_path / "out").written == PARTS
    assert len(set(fake.processes)) >= 1
    assert str(os.getpid()) not in fake.processes


def test_rows_that_are_appended_are_the_only_ones_asked_however_the_table_is_cut(
    tmp_path: Path, fake: FakeLLM
) -> None:
    llm = FakeLLM(fake.spec, answers=str(tmp_path / "answers"))
    table = pd.DataFrame({"text": [f"row {i}" for i in range(60)]})
    first = dd.from_pandas(table.iloc[:50], npartitions=7).llm.generate(llm, "{text}!")
    first.llm.to_parquet(tmp_path / "first")
    assert fake.rows == 50
    dd.from_pandas(table, npartitions=4).llm.generate(llm, "{text}!").llm.to_parquet(tmp_path / "then")
    assert fake.rows == 60
    found = pd.read_parquet(tmp_path / "then")
    assert found["generated"].tolist() == [f"<row {i}!>" for i in range(60)]
    before = pd.read_parquet(tmp_path / "first")
    pd.testing.assert_frame_equal(found.iloc[:50].reset_index(drop=True), before)
