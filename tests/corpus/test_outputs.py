"""Places that cannot take a job, and jobs that changed: refused with what is wrong; what was there stays."""

from __future__ import annotations

import json
import os
import resource
import signal
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import dask
import pandas as pd
import pytest

from tests.corpus.conftest import Command, refused
from tests.tiny import make_model

MANIFEST = "_daskllm.json"


@dataclass(frozen=True)
class Output:
    """What is done to a directory with a finished job, how the command goes on, and what it then says.

    Attributes:
        harm: changes the directory ``out`` below a path, or what lies beside it.
        options: of the second command.
        words: of its refusal; empty where it ends well.
        written: parts that it then makes.
    """

    name: str
    harm: Callable[[Path], Any]
    options: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    written: int = 0


def told(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "out" / MANIFEST).read_text()))


def tell(**changes: Any) -> Callable[[Path], Any]:
    return lambda path: (path / "out" / MANIFEST).write_text(json.dumps(told(path) | changes))


def write(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_bytes(data)


def parts(path: Path) -> list[Path]:
    return sorted((path / "out").glob("part.*"))


def same_length(path: Path) -> None:
    """Another answer in a part of the same size and time."""
    part = parts(path)[0]
    stat, data = part.stat(), bytearray(part.read_bytes())
    data[50] ^= 1
    part.write_bytes(data)
    os.utime(part, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def swapped(path: Path) -> None:
    first, second = parts(path)[:2]
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def nothing(path: Path) -> None:
    """Nothing is changed."""


OUTPUTS = [
    Output("nothing changed", nothing),
    Output("a foreign file", write("out/notes.txt", b"mine")),
    Output(
        "a foreign file, begun again", write("out/notes.txt", b"mine"), ("--overwrite",), ("'notes.txt'",)
    ),
    Output("a foreign part", write("out/part.0.parquet", b"mine"), ("--overwrite",), ("'part.0.parquet'",)),
    Output("what was being written", write("out/.part.00001-0123456789abcdef.parquet.0f.tmp", b"half")),
    Output("a part that is gone", lambda path: parts(path)[0].unlink(), written=1),
    Output("a part of no bytes", lambda path: parts(path)[0].write_bytes(b""), written=1),
    Output(
        "a part cut off", lambda path: parts(path)[0].write_bytes(parts(path)[0].read_bytes()[:-9]), written=1
    ),
    Output("a part with a bit changed", same_length, written=1),
    Output("two parts in each other's place", swapped, written=2),
    Output(
        "a part that is a directory",
        lambda path: (parts(path)[0].unlink(), parts(path)[0].name, (path / "out" / "sub").mkdir()),
        written=1,
    ),
    Output("no manifest", lambda path: (path / "out" / MANIFEST).unlink(), (), ("is not empty",)),
    Output("a manifest that is none", write(f"out/{MANIFEST}", b"{"), (), ("_daskllm.json cannot be read",)),
    Output("a manifest of no bytes", write(f"out/{MANIFEST}", b""), (), ("_daskllm.json cannot be read",)),
    Output("a manifest that is no UTF-8", write(f"out/{MANIFEST}", b"\xff"), (), ("cannot be read",)),
    Output("a manifest that is a list", write(f"out/{MANIFEST}", b"[]"), (), ("cannot be read",)),
    Output("a manifest of a later version", tell(format=99), (), ("it has the format 99",)),
    Output("a manifest that lacks a field", tell(parts=None), (), ("cannot be read",)),
    Output("a manifest begun again", write(f"out/{MANIFEST}", b"{"), ("--overwrite",), written=4),
    Output("a manifest that knows no part", tell(done=[], state="unfinished")),
    Output(
        "a manifest that knows parts that are not",
        lambda path: [part.unlink() for part in parts(path)],
        written=4,
    ),
    Output("more tokens", nothing, ("--max-tokens", "3"), ("sampling.max_tokens: 2 there, 3 now",)),
    Output("another system", nothing, ("--system", "Be brief."), ('system: null there, "Be brief." now',)),
    Output("another column", nothing, ("--column", "other"), ("another job",)),
    Output("rows dropped", nothing, ("--on-error", "drop"), ('failed_rows: "kept" there, "dropped" now',)),
    Output("no resume", nothing, ("--no-resume",), ("holds a job already",)),
    Output(
        "an input of another size",
        write("in0.csv", b"text\nother rows\n"),
        (),
        ("in0.csv: has another size",),
    ),
    Output("an input of another time", lambda path: os.utime(path / "in1.csv", (1, 1)), (), ("in1.csv",)),
    Output("an input more", write("in4.csv", b"text\nnew\n"), (), ("in4.csv: was not there",)),
    Output("an input less", lambda path: (path / "in3.csv").unlink(), (), ("in3.csv: is not there now",)),
]


@pytest.mark.parametrize("case", OUTPUTS, ids=lambda case: case.name)
def test_a_directory_with_a_job(generate: Command, tmp_path: Path, case: Output) -> None:
    for number in range(4):
        (tmp_path / f"in{number}.csv").write_text(f"text\nrow {number}\n")
    assert generate().exit_code == 0
    before = pd.read_parquet(tmp_path / "out")
    case.harm(tmp_path)
    there = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    done = generate(*case.options)
    if case.words:
        refused(done, *case.words)
        assert {
            path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()
        } == there
        return
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads(done.stdout.splitlines()[-1])["written"] == case.written
    found = pd.concat([pd.read_parquet(part) for part in parts(tmp_path)], ignore_index=True)
    pd.testing.assert_frame_equal(found, before)
    assert told(tmp_path)["state"] == "finished"


@dataclass(frozen=True)
class Place:
    """A place for a job that cannot be one."""

    name: str
    make: Callable[[Path], Any]
    output: str
    words: str


PLACES = [
    Place("a file", write("out", b"mine"), "out", "out"),
    Place("below a file", write("file", b"mine"), "file/out", "file/out"),
    Place("the kernel's", nothing, "/proc/daskllm", "/proc/daskllm"),
    Place("a device", nothing, "/dev/null", "/dev/null"),
    Place(
        "a directory with a file",
        lambda path: ((path / "out").mkdir(), write("out/a", b"")(path)),
        "out",
        "not empty",
    ),
    Place("a link to nothing", lambda path: os.symlink(path / "gone" / "x", path / "out"), "out", "out"),
    Place("the inputs' own", nothing, ".", "not empty"),
    Place("a name of 300 letters", nothing, "x" * 300, "xxx"),
    Place("no name", nothing, "", "--output names the directory"),
    Place("an unknown protocol", nothing, "gopher://host/out", "gopher"),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_a_place_that_cannot_take_a_job(generate: Command, tmp_path: Path, place: Place) -> None:
    (tmp_path / "in.csv").write_text("text\na\n")
    place.make(tmp_path)
    refused(generate(output=place.output), place.words)
    assert list(tmp_path.rglob("part.*")) == []


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(generate: Command, tmp_path: Path) -> None:
    noise = "".join(Random(0).choices(string.ascii_letters, k=400_000))  # which no compression makes small
    for number, more in enumerate(("", "", noise)):
        pd.DataFrame({"text": [f"row {number}"], "more": [more]}).to_parquet(tmp_path / f"in{number}.parquet")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limit[1]))
    try:
        with dask.config.set(scheduler="synchronous"):
            done = generate()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, signal_before)
    refused(done, "part.00002", "File too large")
    assert "part.00002" not in [part.name[:10] for part in parts(tmp_path)]
    assert generate().exit_code == 0
    assert pd.read_parquet(tmp_path / "out")["more"].tolist() == ["", "", noise]


def test_other_weights_in_the_model_s_directory_are_another_job(
    generate: Command, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_text("text\na\n")
    assert generate().exit_code == 0
    other = make_model("llama-gqa", tmp_path / "model", seed=7)
    refused(generate("--model", other), "model.content")
