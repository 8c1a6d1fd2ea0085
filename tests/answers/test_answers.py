"""Answers kept outside the process: whole, for all who write and read, within a size, never in the way."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest

from daskllm.answers import Answers, key_of, segment, space_of, store
from daskllm.answers.index import Index
from daskllm.types import Completion, TokenLogprob


def answer(text: str = "yes", tokens: int = 3, logprobs: bool = False, version: int = 0) -> Completion:
    ids = tuple(range(7, 7 + tokens))
    kept = tuple(TokenLogprob(i, -1 / i, {i: -1 / i, 2: -0.1 - 0.2}) for i in ids) if logprobs else None
    return Completion(text, ids, "stop", 5, tokens, kept, None, version)


def keys(*numbers: int) -> list[bytes]:
    return [key_of([number]) for number in numbers]


def written(directory: Path, space: str = "s") -> list[Path]:
    return sorted((directory / space).iterdir())


@pytest.fixture
def at(tmp_path: Path) -> str:
    return str(tmp_path / "answers")


ROWS: dict[str, list[Completion]] = {
    "plain": [answer("two words\n and a snowman \u2603")],
    "no text": [answer("", 0)],
    "logprobs": [answer(logprobs=True)],
    "no alternatives": [Completion("x", (1,), "length", 1, 1, (TokenLogprob(1, -0.0),))],
    "no logprobs of no token": [Completion("", (), "length", 1, 0, ())],
    "samples": [answer("a"), answer("b", 1, logprobs=True), answer("c", 0)],
    "version": [answer(version=3)],
}


def test_rows_come_back_as_they_were(at: str) -> None:
    one = Answers(at, "s")
    entries = {key_of([i]): row for i, row in enumerate(ROWS.values())}
    one.put(entries)
    assert one.get(list(entries)) == entries
    one.flush()
    assert one.get(list(entries)) == entries
    other = Answers(at, "s")
    found = other.get([*entries, *keys(100, 101)])
    assert found == entries
    assert {key: [repr(c) for c in row] for key, row in found.items()} == {
        key: [repr(c) for c in row] for key, row in entries.items()
    }  # repr: the order of the alternatives, -0.0, tuples
    assert other.get([]) == {}


def test_every_field_of_a_completion_is_kept() -> None:
    kept = {field.name for field in segment._SAMPLE}
    assert kept == {field.name for field in dataclasses.fields(Completion)} - {"error"}


def test_an_object_store_does_as_well() -> None:
    place = f"memory://{uuid.uuid4().hex}"
    one, other = Answers(place, "s"), Answers(place, "s")
    assert other.get(keys(1)) == {}
    for number in range(3):
        one.put({key: [answer(str(number))] for key in keys(number)})
        one.flush()
    assert {row[0].text for row in other.get(keys(0, 1, 2)).values()} == {"0", "1", "2"}


def test_keys_and_spaces_tell_rows_apart() -> None:
    told = [key_of([1, 2]), key_of([1, 2], [0]), key_of([1, 2, 0]), key_of([1], [2]), key_of([1, 2], [0, 0])]
    assert len(set(told)) == len(told)
    assert key_of((1, 2)) == key_of(np.array([1, 2])) == told[0]
    assert space_of({"top_p": 0.5}) != space_of({"top_p": 0.25})


def test_spaces_are_apart(at: str) -> None:
    one = Answers(at, "s")
    one.put({keys(1)[0]: [answer()]})
    one.flush()
    assert Answers(at, "t").get(keys(1)) == {}


def test_rows_are_written_when_they_are_many(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "FLUSH_ROWS", 3)
    one, other = Answers(at, "s"), Answers(at, "s")
    one.put({key: [answer()] for key in keys(1, 2)})
    assert other.get(keys(1)) == {}
    one.put({keys(3)[0]: [answer()]})
    assert len(other.get(keys(1, 2, 3))) == 3
    monkeypatch.setattr(store, "FLUSH_BYTES", 10_000)
    one.put({keys(4)[0]: [answer(tokens=2000, logprobs=True)]})
    assert len(other.get(keys(4))) == 1


def test_rows_are_written_when_a_while_has_passed(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "FLUSH_SECONDS", 0.0)
    Answers(at, "s").put({keys(1)[0]: [answer()]})
    assert len(Answers(at, "s").get(keys(1))) == 1


def over(process: subprocess.Popen[bytes]) -> bool:
    """Whether it is, after a moment."""
    try:
        return process.wait(0.02) is not None
    except subprocess.TimeoutExpired:
        return False


WRITER = """
import sys
from daskllm.answers import Answers, key_of, store
from daskllm.types import Completion

store.SMALL_FILES = 8
at, me = sys.argv[1], int(sys.argv[2])
mine = Answers(at, "s")
for i in range(30):
    # Its own rows, and rows that the others write as well.
    mine.put({key_of([n]): [Completion(str(n), (n,), "stop", 1, 1)] for n in (1000 * me + i, i)})
    mine.flush()
    assert len(mine.get([key_of([1000 * me + i])])) == 1
"""


def test_several_processes_write_at_once(at: str, tmp_path: Path) -> None:
    """While each puts small files together, its own and the others'."""
    root = str(Path(__file__).parents[2])
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, at, str(me)], cwd=root, stderr=subprocess.PIPE)
        for me in (1, 2)
    ]
    reader = Answers(at, "s")
    for writer in writers:
        while not over(writer):
            for key, row in reader.get(keys(*range(30))).items():
                assert key_of(row[0].token_ids) == key
    assert [writer.communicate()[1].decode()[-2000:] for writer in writers] == [""] * 2
    wanted = [*range(30), *(1000 * me + i for me in (1, 2) for i in range(30))]
    for one in (reader, Answers(at, "s")):
        found = one.get(keys(*wanted))
        assert [found[key][0].token_ids for key in keys(*wanted)] == [(n,) for n in wanted]
    assert len(written(tmp_path / "answers")) < 16


def test_small_files_become_one(at: str, tmp_path: Path) -> None:
    one = Answers(at, "s")
    for number in range(3 * store.SMALL_FILES):
        one.put({key: [answer(str(number))] for key in keys(number, 0)})
        one.flush()
        assert len(written(tmp_path / "answers")) < store.SMALL_FILES
    everything = keys(*range(3 * store.SMALL_FILES))
    assert one.get(everything).keys() == set(everything)
    assert Answers(at, "s").get(everything).keys() == set(everything)
    # One that looked before finds them in their new file.
    assert len(one._index) < len(everything) + 3 * store.SMALL_FILES


def test_a_file_that_is_put_together_while_it_is_looked_for(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Answers(at, "s"), Answers(at, "s")
    for number in (1, 2):
        one.put({keys(number)[0]: [answer(str(number))]})
        one.flush()
    checked = Answers._checked

    def as_late_as_can_be(self: Answers, file: store._File) -> object:
        if self is other and len(one._numbers) == 2:
            one._put_together([one._files[n] for n in one._numbers.values()])
        return checked(self, file)

    monkeypatch.setattr(Answers, "_checked", as_late_as_can_be)
    assert {row[0].text for row in other.get(keys(1, 2)).values()} == {"1", "2"}


def test_the_oldest_go_when_a_place_is_full(at: str, tmp_path: Path) -> None:
    size = len(segment.encode({keys(0)[0]: [answer("x" * 1000)]}))
    spaces = [Answers(at, name, limit=10 * size) for name in ("s", "t")]
    for number in range(20):
        one = spaces[number % 2]
        one.put({keys(number)[0]: [answer("x" * 1000)]})
        one.flush()
    left = sum(f.stat().st_size for space in "st" for f in written(tmp_path / "answers", space))
    assert 8 * size <= left <= 10 * size
    found = [len(Answers(at, "st"[n % 2]).get(keys(n))) for n in range(20)]
    assert found == [0] * 10 + [1] * 10
    assert [len(spaces[n % 2].get(keys(n))) for n in range(20)] == found


def test_what_a_lost_writer_left_goes(at: str, tmp_path: Path) -> None:
    one = Answers(at, "s")
    one.put({keys(0)[0]: [answer()]})
    one.flush()
    (file,) = written(tmp_path / "answers")
    old = file.with_name("0" * 16 + file.name[16:] + ".0123456789ab.tmp")
    new = file.with_name(file.name + ".0123456789ab.tmp")
    for unfinished in (old, new):
        unfinished.write_bytes(b"half")
    one = Answers(at, "s")
    one.put({keys(1)[0]: [answer()]})
    one.flush()
    assert not old.exists()
    assert new.exists()
    assert len(Answers(at, "s").get(keys(0, 1))) == 2


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "foreign":
        file.write_bytes(b"something else altogether")
    else:  # a bit of the text: still a file that Arrow reads
        file.write_bytes(data.replace(b"damaged", b"damagee"))
    assert file.read_bytes() != data


@pytest.mark.parametrize("how", ["cut", "empty", "foreign", "flipped"])
def test_a_broken_file_is_left_out(
    at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    for number, text in enumerate(["damaged", "sound"]):
        one = Answers(at, "s")
        one.put({keys(number)[0]: [answer(text)]})
        one.flush()
    (bad,) = (f for f in written(tmp_path / "answers") if b"damaged" in f.read_bytes())
    damage(bad, how)
    (bad.parent / "notes.txt").write_text("no answers")
    other = Answers(at, "s")
    for _ in range(2):
        found = other.get(keys(0, 1, 2))
        assert [row[0].text for row in found.values()] == ["sound"]
    assert sum(bad.name in record.getMessage() for record in caplog.records) == 1
    # The row is generated again, and then it is there.
    other.put({keys(0)[0]: [answer("mended")]})
    other.flush()
    assert other.get(keys(0))[keys(0)[0]][0].text == "mended"


@pytest.mark.parametrize("where", ["a file", "full"])
def test_where_nothing_can_be_written_rows_go_on(
    at: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "a file":
        Path(at).write_text("in the way")
    else:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.replace", full)
    one = Answers(at, "s")
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            one.put({keys(number)[0]: [answer()]})
            one.flush()
            assert one.get(keys(number)) == {}
    assert sum("cannot be written" in record.getMessage() for record in caplog.records) == 1
    if where == "full":
        assert written(Path(at)) == []


def test_a_place_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        Answers("nosuch://bucket/answers", "s")


def test_the_index_finds_what_it_was_given() -> None:
    rng = np.random.default_rng(0)
    first = 3 * rng.choice(10**6, 600, replace=False).astype(np.uint64)
    known = np.stack([first, first + np.uint64(1)], axis=1)
    sizes = rng.integers(0, 20, 60)
    index, at = Index(), []
    for file, size in enumerate(sizes.tolist()):
        start = len(at)
        index.add(known[start : start + size], file)
        at += [(file, row) for row in range(size)][: len(known) - start]
    asked = np.concatenate([known, known + np.uint64(1), known[:, ::-1]])
    files, rows = index.find(asked)
    assert len(index) == len(at) > 500
    assert list(zip(files.tolist(), rows.tolist(), strict=True))[: len(at)] == at
    assert (files[len(at) :] == -1).all()
    index.drop(range(0, 60, 2))
    left = [(file, row) for file, row in at if file % 2]
    files, _ = index.find(asked)
    assert len(index) == len(left) == (files >= 0).sum()
    index.drop(range(60))
    assert (len(index), index.find(asked)[0].max()) == (0, -1)
