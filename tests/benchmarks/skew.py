"""One partition of long rows among short ones, on two workers of one core each: how near to the ideal time.

    python tests/benchmarks/skew.py [--model DIR] [--partitions 8] [--rows 64] [--rounds 1]

The ideal is half of what one worker of one core takes for the same table. The last partition's rows read some
ten times as much as the others' and write eight times as much.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import dask.dataframe as dd
import pandas as pd
from distributed import Client, LocalCluster
from inputs import INPUTS, cpu, make_model

from daskllm.llm import load
from daskllm.machine import set_share

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHORT, LONG = (32, 8), (320, 64)
"""Letters of a prompt, each a token of the model that `make_model` writes, and tokens of an answer."""


def tables(partitions: int, rows: int) -> dict[str, dd.DataFrame]:
    """The short rows, and the long ones, which are one partition."""
    draw = Random(0)

    def texts(count: int, letters: int) -> pd.DataFrame:
        return pd.DataFrame({"text": ["".join(draw.choices(LETTERS, k=letters)) for _ in range(count)]})

    short = texts((partitions - 1) * rows, SHORT[0])
    return {
        "short": dd.from_pandas(short, npartitions=partitions - 1),
        "long": dd.from_pandas(texts(rows, LONG[0]), 1),
    }


def pin(core: int) -> None:
    """Keep this process to one core, and its engine to one thread."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})
    set_share(2)


def seconds(workers: int, model: Path, args: argparse.Namespace, cores: list[int]) -> float:
    """What the table takes on so many workers."""
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=2, memory_limit=0, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        for worker, core in zip(client.nthreads(), cores, strict=False):
            client.run(pin, core, workers=[worker])
        llm = load(model, client=client, answers=None)
        llm.generate(["warm"] * 8 * workers, max_tokens=4)
        took = []
        for _ in range(args.rounds):
            made = tables(args.partitions, args.rows)
            each: list[Any] = [
                made[name].llm.generate(llm, "text", max_tokens=out, ignore_eos=True)
                for name, (_, out) in (("short", SHORT), ("long", LONG))
            ]
            begun = time.perf_counter()
            client.gather(client.compute([dd.concat(each)["generated_completion_tokens"].sum()]))
            took.append(time.perf_counter() - begun)
        llm.close()
        return median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (a 135M Llama of random weights)")
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64, help="of each partition")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed, one for each worker")
    model = args.model or make_model(INPUTS / "llama-135M")
    alone, both = seconds(1, model, args, cores), seconds(2, model, args, cores)
    result = {
        "one_worker_s": round(alone, 2),
        "two_workers_s": round(both, 2),
        "ratio": round(2 * both / alone, 3),
    }
    shape = {"partitions": args.partitions, "rows_of_each": args.rows}
    print(json.dumps({"date": datetime.date.today().isoformat(), "cpu": cpu(), **shape, **result}))


if __name__ == "__main__":
    main()
