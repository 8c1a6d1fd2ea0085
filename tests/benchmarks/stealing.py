"""Two replicas of one core each, one slowed down by load: how near a table's job comes to the ideal split.

    python tests/benchmarks/stealing.py [--model DIR] [--rows 2048] [--out 8] [--loops 2]

The load is a number of endless loops on the second worker's core. Under it each worker first answers rows of
its own, both at the same time; that gives their speeds. Ideally all of the table's rows then take as long as
they would at the sum of the speeds. What a worker has begun it keeps, some 64 rows, so that a job of few rows
ends later by chance. Bytes moved are what tasks' results took between the workers (prompts whose slices were
stolen, answers on their way to the merge), and what came of the weights (none).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import dask.dataframe as dd
import pandas as pd
from dask.utils import key_split
from distributed import Client, LocalCluster
from inputs import INPUTS, cpu, make_model, make_work

from daskllm.llm import LLM, load
from daskllm.runtime.blockserver import block_traffic_on
from daskllm.runtime.call import Call
from daskllm.runtime.progress import Increment, follow
from daskllm.runtime.tasks import answer_rows
from daskllm.types import SamplingParams

SAMPLE = 64
"""Rows by which a worker's speed is measured: what an engine runs together."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def texts(rows: int, seed: int) -> list[str]:
    """Random prompts of skewed lengths, short enough that many rows take minutes.

    A letter is a token of the model that `make_model` writes.
    """
    work = json.loads(make_work(INPUTS / f"stealing-{rows}-{seed}.json", rows, seed).read_text())
    draw = Random(seed)
    return ["".join(draw.choices(LETTERS, k=len(row["prompt"]) // 4)) for row in work]


def pin(core: int) -> None:
    """Keep this process to one core: threads that are there already, and by them those to come."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


@contextmanager
def loops(count: int, core: int) -> Iterator[None]:
    """So many endless loops on a core."""
    busy = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    running = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(count)]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()


def speeds(client: Client, workers: list[str], call: Call, rounds: int) -> list[float]:
    """Rows a second of each worker, all at once; the faster ones go on until the slowest is done."""
    stop = threading.Event()
    found: dict[str, float] = {}

    def measure(number: int, worker: str) -> None:
        seconds, turn = [], 0
        while len(seconds) < rounds or not stop.is_set():
            rows = [(text,) for text in texts(SAMPLE, seed=1000 * number + turn + 1)]
            begun = time.perf_counter()
            client.submit(_answer, rows, call, workers=[worker], pure=False).result()
            turn += 1
            if not stop.is_set():
                seconds.append(time.perf_counter() - begun)
            if worker == workers[-1] and len(seconds) == rounds:
                stop.set()
        found[worker] = SAMPLE / median(seconds)

    threads = [threading.Thread(target=measure, args=each) for each in enumerate(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[worker] for worker in workers]


def _answer(rows: list[tuple[str]], call: Call) -> int:
    return len(answer_rows(rows, call, [(0, row) for row in range(len(rows))]))


def _received(dask_worker: Any) -> dict[str, int]:
    """Prefix of keys -> bytes of their results that came from other workers."""
    total: Counter[str] = Counter()
    for transfer in dask_worker.transfer_incoming_log:
        for key, size in transfer["keys"].items():
            total[key_split(key)] += size
    return dict(total)


def run(client: Client, llm: LLM, workers: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Speeds first, then the table."""
    sampling = {"max_tokens": args.out, "ignore_eos": True, "truncate": "left"}
    call = Call(spec=llm.spec, kind="generate", params=SamplingParams.of(sampling))
    call = replace(call, labels=("text",))
    speed = speeds(client, workers, call, args.sample_rounds)
    rows_of: Counter[str] = Counter()

    def count(increment: Increment) -> None:
        rows_of[increment.worker] += increment.rows

    table = dd.from_pandas(pd.DataFrame({"text": texts(args.rows, seed=0)}), npartitions=args.partitions)
    before, held = client.run(_received), llm.residency()
    with follow(client, count):
        begun = time.perf_counter()
        out = table.llm.generate(llm, "text", **sampling).compute()
        seconds = time.perf_counter() - begun
    if len(out) != args.rows or out["generated_error"].notna().any():
        raise RuntimeError("rows were lost or failed: the seconds mean nothing")
    moved: Counter[str] = Counter()
    for worker, total in client.run(_received).items():
        moved.update({key: size - before[worker].get(key, 0) for key, size in total.items()})
    # A slice's key has three parts: a name, the partition, the slice.
    steals = [event for _, event in client.get_events("stealing") if event[0] == "confirm"]
    traffic = client.run(block_traffic_on)
    ideal = args.rows / sum(speed)
    return {
        "seconds": round(seconds, 2),
        "ideal_seconds": round(ideal, 2),
        "ratio_to_ideal": round(seconds / ideal, 3),
        "alone_seconds": round(args.rows / max(speed), 2),
        "rows_per_s": [round(one, 2) for one in speed],
        "rows": [rows_of[worker] for worker in workers],
        "steals": sum(len(event[1]) == 3 for event in steals),
        "bytes_moved": {key: size for key, size in moved.items() if size},
        "block_bytes_moved": sum(sum(one["pulled"].values()) for one in traffic.values()),
        "blocks_stayed": held == llm.residency(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (a 135M Llama of random weights)")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--partitions", type=int, help="of the table (one for 256 rows)")
    parser.add_argument("--out", type=int, default=8, help="tokens generated for each row")
    parser.add_argument("--loops", type=int, default=2, help="endless loops beside the slow worker")
    parser.add_argument("--sample-rounds", type=int, default=2, help="times a worker's speed is measured")
    args = parser.parse_args()
    args.partitions = args.partitions or max(1, args.rows // 256)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed, one for each worker")
    INPUTS.mkdir(parents=True, exist_ok=True)
    model = args.model or make_model(INPUTS / "llama-135M")
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        workers = list(client.nthreads())
        for worker, core in zip(workers, cores, strict=True):
            client.run(pin, core, workers=[worker])
        llm = load(model, client=client, answers=False)
        with loops(args.loops, cores[1]):
            result = run(client, llm, workers, args)
        llm.close()
    shape = {"rows_in_table": args.rows, "partitions": args.partitions, "out": args.out, "loops": args.loops}
    print(json.dumps({"date": datetime.date.today().isoformat(), "cpu": cpu(), **shape, **result}))


if __name__ == "__main__":
    main()
