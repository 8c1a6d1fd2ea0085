"""A client of its own process that writes a job's parts, for tests that kill it.

    python -m tests.jobs.client ROWS OUT GATE LOG FREE

Rows whose number is at least FREE wait until the file GATE is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import dask
import dask.dataframe as dd

from tests.fake_session import FakeLLM, FakeSession, FakeSpec


def answered(rows: Path, gate: Path, log: Path) -> dd.DataFrame:
    """The table that this process and the test's own write."""
    llm = FakeLLM(FakeSpec(log=str(log), gate=str(gate), free=1_000_000))
    return dd.read_parquet(str(rows / "*.parquet")).llm.generate(llm, "{text}", temperature=1.0)


def main() -> None:
    rows, out, gate, log = map(Path, sys.argv[1:5])
    free = int(sys.argv[5])
    enter = FakeSession._enter

    def enter_free(self: FakeSession, prompts: list) -> None:
        numbers = [int(str(one.prompt).split()[-1]) for one in prompts]
        if min(numbers) >= free:
            self._wait(None)
        enter(self, prompts)

    FakeSession._enter = enter_free  # type: ignore[method-assign]
    with dask.config.set(num_workers=8):  # more than wait
        answered(rows, gate, log).llm.to_parquet(out)


if __name__ == "__main__":
    main()
