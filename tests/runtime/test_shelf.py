"""Files as ranges of bytes: what is there is told exactly, whatever happens to the directory."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskllm.checkpoint import open_checkpoint
from daskllm.runtime.shelf import FileOffer, Ranges, Shelf
from daskllm.types import ModelError
from tests.tiny import make_model

spans = st.tuples(st.integers(0, 30), st.integers(1, 8)).map(lambda span: (span[0], span[0] + span[1]))


@given(st.lists(spans, max_size=12), spans)
def test_ranges_are_a_set_of_bytes(added: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    ranges, held = Ranges(), set()
    for start, stop in added:
        ranges.add(start, stop)
        held |= set(range(start, stop))
    listed = ranges.all()
    assert {byte for start, stop in listed for byte in range(start, stop)} == held
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(listed))
    assert ranges.covers(*asked) == (set(range(*asked)) <= held)
    assert FileOffer(99, 0, listed).covers(*asked) == ranges.covers(*asked)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = make_model("llama-gqa", tmp_path / "model", max_shard_size="200KB")
    (made / "additional_chat_templates").mkdir()
    (made / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    (made / "notes.md").write_text("mine")
    return made


def test_a_shelf_has_what_a_copy_needs_when_the_directory_is_gone(path: Path) -> None:
    shelf = Shelf.of(open_checkpoint(path))
    names = {"config.json", "tokenizer.json", "additional_chat_templates/short.jinja"}
    shards = {file.name: file.read_bytes() for file in path.glob("model-*.safetensors")}
    assert names | set(shards) < set(shelf.offer())
    assert "notes.md" not in shelf.offer()
    for file in list(path.glob("model-*.safetensors")):
        file.unlink()
    name, content = shards.popitem()
    assert shelf.read(name, 100, 5000) == content[100:5000]
    assert shelf.read(name, 0, len(content) + 1) is None
    assert shelf.read("../secret", 0, 1) is None


def test_files_of_which_one_is_written_over_are_offered_no_more(path: Path) -> None:
    shelf = Shelf.of(open_checkpoint(path))
    file = path / "config.json"
    file.write_text(file.read_text())
    os.utime(file, ns=(1, 1))
    assert shelf.offer() == {}
    assert shelf.read("config.json", 0, 10) is None
    assert shelf.read("tokenizer.json", 0, 10) is not None


def test_a_copy_is_sparse_and_has_what_was_written(tmp_path: Path) -> None:
    offer = {"a.safetensors": FileOffer(1 << 20, 8, None), "inside/b.json": FileOffer(3, 3, None)}
    shelf = Shelf.empty(tmp_path / "copy", offer)
    file = tmp_path / "copy" / "a.safetensors"
    assert file.stat().st_size == 1 << 20
    assert file.stat().st_blocks == 0
    assert shelf.read("a.safetensors", 0, 1) is None
    shelf.write("a.safetensors", 10, memoryview(b"0123456789"))
    assert shelf.offer()["a.safetensors"] == FileOffer(1 << 20, 8, ((10, 20),))
    assert shelf.read("a.safetensors", 12, 15) == b"234"
    assert file.read_bytes()[10:20] == b"0123456789"
    shelf.close()
    assert not file.exists()
    assert shelf.read("a.safetensors", 12, 15) == b"234"


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "inside/../../outside"])
def test_a_copy_stays_in_its_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="not of its own directory"):
        Shelf.empty(tmp_path / "copy", {name: FileOffer(3, 3, None)})
