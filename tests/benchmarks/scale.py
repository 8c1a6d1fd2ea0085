"""What a row costs without a model: microseconds, tasks and memory, as a table grows.

    python tests/benchmarks/scale.py [--rows 10000 100000 1000000] [--partition-rows 1000 10000] [--workers 2]

Scheduler, workers and client are processes of their own. The rows are made on the workers and their answers
counted there, so that no process sees all of the table. Memory is each process's peak so far, so that rows
should be given in ascending order.

"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import pandas as pd
from distributed import Client
from inputs import cpu
from null_engine import NullLLM

HERE = str(Path(__file__).resolve().parent)


def part(number: int, rows: int) -> pd.DataFrame:
    """One partition, made where it is read."""
    start = number * rows
    text = [f"row {i} of a table with some words in it" for i in range(start, start + rows)]
    return pd.DataFrame({"id": range(start, start + rows), "text": text})


def peak_mb(pid: int) -> float:
    """The most memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def measure(client: Client, rows: int, size: int, pids: dict[str, int]) -> dict[str, Any]:
    """One table."""
    partitions = -(-rows // size)
    frame = dd.from_map(part, range(partitions), rows=size, meta=part(0, 1))
    answered = frame.llm.generate(NullLLM(), "Say {text}")
    total = answered["generated_completion_tokens"].sum()
    tasks = len(total.optimize().__dask_graph__())
    begun = time.perf_counter()
    if client.compute(total).result() != partitions * size:
        raise RuntimeError("rows were lost: the seconds mean nothing")
    seconds = time.perf_counter() - begun
    return {
        "rows": partitions * size,
        "partition_rows": size,
        "seconds": round(seconds, 2),
        "us_per_row": round(1e6 * seconds / (partitions * size), 1),
        "tasks": tasks,
        "peak_mb": {name: peak_mb(pid) for name, pid in pids.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--partition-rows", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    started: list[subprocess.Popen[bytes]] = []
    found = []
    code = f"import sys; sys.path.insert(0, {HERE!r}); from distributed.cli import {{0}}; {{0}}.main()"
    try:
        place = Path(f"/tmp/daskllm-scale-{time.time_ns()}.json")
        run = [sys.executable, "-c"]
        common = ["--scheduler-file", str(place)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        scheduler = [*run, code.format("dask_scheduler"), *common, "--host", "127.0.0.1", "--port", "0"]
        started.append(subprocess.Popen([*scheduler, "--no-dashboard"], **quiet))
        while not place.exists():
            time.sleep(0.05)
        worker = [
            *run,
            code.format("dask_worker"),
            *common,
            "--no-nanny",
            "--nthreads",
            "2",
            "--no-dashboard",
        ]
        started += [subprocess.Popen(worker, **quiet) for _ in range(args.workers)]
        with Client(scheduler_file=str(place)) as client:
            client.wait_for_workers(args.workers)
            pids = {"scheduler": started[0].pid, "client": os.getpid()}
            pids |= {f"worker {i}": one.pid for i, one in enumerate(started[1:])}
            measure(client, 2000, 1000, pids)  # what is imported once does not count
            for size in args.partition_rows:
                for rows in args.rows:
                    found.append(measure(client, rows, size, pids))
                    print(json.dumps(found[-1]), file=sys.stderr)
    finally:
        for one in started:
            one.kill()
        for one in started:
            one.wait()
        place.unlink(missing_ok=True)
    print(json.dumps({"date": datetime.date.today().isoformat(), "cpu": cpu(), "tables": found}))


if __name__ == "__main__":
    main()
