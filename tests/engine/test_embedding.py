"""Token rows read from a mapped file: the right ones, and without holding the file in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from daskllm.blocks import array
from daskllm.engine.batch import Batch, Chunk
from daskllm.engine.kernels.cpu import operations as cpu
from daskllm.engine.layers import Embedding, Head, ResidentModel
from daskllm.types import ModelSpec
from tests import tiny

VOCABULARY, HIDDEN = 1 << 18, 64


def resident(file: Path) -> int:
    """Bytes of a file that this process has in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    found = [next(x for x in lines if x.startswith("Rss")) for line in lines if str(file) in line]
    return sum(int(line.split()[1]) for line in found) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")
def test_many_lookups_do_not_hold_a_mapped_table(tmp_path: Path) -> None:
    file = tmp_path / "table.bin"
    np.arange(VOCABULARY * HIDDEN, dtype=np.uint16).tofile(file)
    mapped = np.memmap(file, np.uint16, "r+", shape=(VOCABULARY, HIDDEN))
    table = array.to_torch(np.asarray(mapped), "bfloat16")
    embedding = Embedding(table, None)
    tokens = list(range(0, VOCABULARY, VOCABULARY // 1024))
    for start in range(0, len(tokens), 512):
        part = tokens[start : start + 512]
        rows = embedding.rows(Batch.of([Chunk(part, 0, range(16))]))
        bits = rows.view(torch.uint16).numpy()
        assert (bits[:, 0] == np.array([token * HIDDEN % 65536 for token in part])).all()
    assert resident(file) <= 10 << 20  # of 32 MiB, all of whose pages were near some lookup


def test_a_table_in_memory_stays(tmp_path: Path) -> None:
    table = torch.arange(40.0).view(10, 4)
    rows = Embedding(table, table * 100).rows(Batch.of([Chunk([3, 7], 1, [0])]))
    assert torch.equal(rows, table[[3, 7]] + 100 * table[[1, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(288, 64), (271, 37)])
def test_a_packed_weight_gives_its_rows_back(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).to(dtype)
    tokens = torch.tensor([0, 31, 32, 7, 7, shape[0] - 1])
    rows = cpu.pack([weight], None).rows(tokens)
    assert rows.is_contiguous()
    assert torch.equal(rows, weight[tokens])


@pytest.mark.parametrize("name", ["llama-tied-odd", "gpt2"])
def test_a_tied_table_is_read_in_the_head_where_that_is_there(tmp_path: Path, name: str) -> None:
    path = tiny.make_model(name, tmp_path / "model")
    model = ResidentModel.open(ModelSpec(path=str(path), device="cpu"))
    alone = model.layer("embed")
    other = ResidentModel.open(ModelSpec(path=str(path), device="cpu"))
    head, tied = other.layer("head"), other.layer("embed")
    assert isinstance(alone, Embedding)
    assert isinstance(tied, Embedding)
    assert isinstance(head, Head)
    assert tied.tokens is head.lm_head
    batch = Batch.of([Chunk([3, 7, 260, 7], 1, [0])])
    assert torch.equal(tied.rows(batch), alone.rows(batch))
    # Nothing is read, and where that is needed converted, that the head has already.
    assert other.nbytes()["embed"] == (0 if tied.positions is None else tied.positions.nbytes)
    table = other.block("embed", "tokens.weight")
    assert torch.equal(table, model.block("embed", "tokens.weight"))
    for one in (model, other):
        one.close()
