"""A job whose workers are killed all the time, beside the same job undisturbed, as one JSON object.

    python tests/benchmarks/recovery.py [--model DIR] [--rows 6000] [--every 4] [--workers 3]

Worker processes of one thread each answer a table; every few seconds one of them is killed (SIGKILL), and
its nanny starts another. The job must end, and its table must be the undisturbed one's. Printed is what the
deaths cost: seconds, and rows generated more than once because they were unfinished when their worker died.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import pandas as pd
from distributed import Client, LocalCluster
from inputs import cpu

import daskllm
from daskllm import demo
from daskllm.runtime.progress import Increment, follow

SAMPLING = {"max_tokens": 48, "ignore_eos": True}


class Killer(threading.Thread):
    """Kills a worker of a local cluster every few seconds until it is told to stop."""

    def __init__(self, cluster: LocalCluster, every: float) -> None:
        super().__init__(daemon=True)
        self.cluster, self.every, self.kills = cluster, every, 0
        self.over = threading.Event()

    def run(self) -> None:
        draw = random.Random(0)
        while not self.over.wait(self.every):
            # A nanny does not try again where its worker dies before it has come up.
            there = self.cluster.scheduler.workers
            pids = [nanny.pid for nanny in self.cluster.workers.values() if nanny.worker_address in there]
            if pids:
                with suppress(ProcessLookupError):
                    os.kill(draw.choice(pids), signal.SIGKILL)
                    self.kills += 1


def run(model: Path, table: pd.DataFrame, workers: int, answers: str, every: float | None) -> dict[str, Any]:
    """One job; what it took, and its answers."""
    counted: list[Increment] = []
    frame = dd.from_pandas(table, npartitions=-(-len(table) // 256))
    with (
        daskllm.local_cluster(workers, threads=1) as cluster,
        Client(cluster) as client,
        follow(client, counted.append),
    ):
        llm = daskllm.load(model, client=client, answers=answers)
        killer = None if every is None else Killer(cluster, every)
        begun = time.perf_counter()
        if killer is not None:
            killer.start()
        out = frame.llm.generate(llm, "text", **SAMPLING).compute()
        seconds = time.perf_counter() - begun
        if killer is not None:
            killer.over.set()
            killer.join()
    return {
        "seconds": round(seconds, 1),
        "kills": 0 if killer is None else killer.kills,
        "rows_generated": sum(one.rows - one.remembered for one in counted),
        "rows_remembered": sum(one.remembered for one in counted),
        "out": out,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (the bundled model)")
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between two kills")
    args = parser.parse_args()
    model = args.model or demo.model_path()
    table = pd.DataFrame({"text": [f"row {i}: " + "word " * (i * 7 % 40) for i in range(args.rows)]})
    with tempfile.TemporaryDirectory() as answers:
        calm = run(model, table, args.workers, f"{answers}/calm", None)
        print(f"undisturbed: {calm['seconds']} s", file=sys.stderr)
        killed = run(model, table, args.workers, f"{answers}/killed", args.every)
    same = calm.pop("out").equals(killed.pop("out"))
    result = {"cpu": cpu(), "rows": args.rows, "workers": args.workers, "kill_every_s": args.every}
    print(json.dumps({**result, "undisturbed": calm, "killed": killed, "same_table": bool(same)}))
    sys.exit(not same)


if __name__ == "__main__":
    main()
