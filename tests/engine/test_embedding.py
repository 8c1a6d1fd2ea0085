"""Token rows read from a mapped file: the right ones, and without holding the file in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from daskllm.blocks import array
from daskllm.engine.batch import Batch, Chunk
from daskllm.engine.layers import Embedding

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
