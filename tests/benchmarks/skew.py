"""One partition of long rows among short ones, on two workers of one core each: how near to the ideal time.

    python tests/benchmarks/skew.py [--model DIR] [--partitions 8] [--rows 64] [--rounds 3]

Half of what one worker of one core takes for the same table is ideal where two cores do twice the work of
one. Beside it each round takes the same rows dealt evenly by hand to the engines of the two workers, without
tables and tasks: what two engines that share a memory can bring. No round has prompts of another, which would
be found in the engines' caches. The last partition's rows read some ten times as much as the others' and
write eight times as much. Each table is the first job of its cluster.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import dask.dataframe as dd
import pandas as pd
from distributed import Client, LocalCluster
from inputs import INPUTS, cpu, make_model

from daskllm.llm import LLM, load
from daskllm.machine import set_share
from daskllm.runtime.process import session_for
from daskllm.types import ModelSpec, SamplingParams

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHORT, LONG = (32, 8), (320, 64)
"""Letters of a prompt, each a token of the model that `make_model` writes, and tokens of an answer."""


def texts(draw: Random, count: int, letters: int) -> list[str]:
    """So many prompts of random letters."""
    return ["".join(draw.choices(LETTERS, k=letters)) for _ in range(count)]


def table(draw: Random, llm: LLM, partitions: int, rows: int) -> Any:
    """The answered table: partitions of short rows, and one of long rows behind them."""
    short = pd.DataFrame({"text": texts(draw, (partitions - 1) * rows, SHORT[0])})
    long = pd.DataFrame({"text": texts(draw, rows, LONG[0])})
    frames = ((dd.from_pandas(short, partitions - 1), SHORT[1]), (dd.from_pandas(long, 1), LONG[1]))
    return dd.concat(
        [frame.llm.generate(llm, "text", max_tokens=out, ignore_eos=True) for frame, out in frames]
    )


def answer(spec: ModelSpec, prompts: list[str], outs: list[int]) -> int:
    """What a worker's engine generates for these rows, the longest first: tokens."""
    each = [SamplingParams(max_tokens=out, ignore_eos=True) for out in outs]
    return sum(row[0].completion_tokens for row in session_for(spec).generate(prompts, each))


def pin(core: int) -> None:
    """Keep this process to one core, and its engine to one thread."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})
    set_share(2)


@contextmanager
def opened(model: Path, cores: list[int]) -> Iterator[tuple[Client, LLM]]:
    """A new cluster of one worker on each core, and the model on them, warm."""
    with (
        LocalCluster(
            n_workers=len(cores), threads_per_worker=2, memory_limit=0, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        for worker, core in zip(client.nthreads(), cores, strict=True):
            client.run(pin, core, workers=[worker])
        llm = load(model, client=client, answers=None)
        llm.generate(["warm"] * 8 * len(cores), max_tokens=4)
        yield client, llm
        llm.close()


def seconds(client: Client, llm: LLM, draw: Random, args: argparse.Namespace) -> float:
    """What the table takes."""
    made = table(draw, llm, args.partitions, args.rows)
    begun = time.perf_counter()
    client.gather(client.compute([made["generated_completion_tokens"].sum()]))
    return time.perf_counter() - begun


def by_hand(client: Client, llm: LLM, draw: Random, args: argparse.Namespace) -> float:
    """What the same rows take where each worker gets every other one."""
    rows = [(text, LONG[1]) for text in texts(draw, args.rows, LONG[0])]
    rows += [(text, SHORT[1]) for text in texts(draw, (args.partitions - 1) * args.rows, SHORT[0])]
    workers = list(client.nthreads())
    begun = time.perf_counter()
    asked = [
        client.submit(answer, llm.spec, *map(list, zip(*rows[i :: len(workers)], strict=True)), workers=[w])
        for i, w in enumerate(workers)
    ]
    client.gather(asked)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (a 135M Llama of random weights)")
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64, help="of each partition")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed, one for each worker")
    model = args.model or make_model(INPUTS / "llama-135M")
    taken: dict[str, list[float]] = {"one_worker_s": [], "two_workers_s": [], "by_hand_s": []}
    for number in range(args.rounds):
        draw = Random(number)
        with opened(model, cores[:1]) as (client, llm):
            taken["one_worker_s"].append(seconds(client, llm, draw, args))
        with opened(model, cores) as (client, llm):
            taken["two_workers_s"].append(seconds(client, llm, draw, args))
            taken["by_hand_s"].append(by_hand(client, llm, draw, args))
        print(
            f"round {number + 1}: { ({name: round(each[-1], 2) for name, each in taken.items()}) }",
            file=sys.stderr,
        )
    pairs = list(zip(*taken.values(), strict=True))
    result = {name: [round(one, 2) for one in each] for name, each in taken.items()} | {
        "of_half_of_one_worker": round(median(2 * two / one for one, two, _ in pairs), 3),
        "of_two_engines_by_hand": round(median(two / hand for _, two, hand in pairs), 3),
    }
    shape = {"partitions": args.partitions, "rows_of_each": args.rows}
    print(json.dumps({"date": datetime.date.today().isoformat(), "cpu": cpu(), **shape, **result}))


if __name__ == "__main__":
    main()
