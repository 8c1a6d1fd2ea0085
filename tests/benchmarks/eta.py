"""How well a running job tells when it will be done: at shares of the time, how far off what is left was.

    python tests/benchmarks/eta.py [--rows 12000] [--workers 2] [--order given|short|long]

The bundled model answers its own kind of questions, whose answers end by themselves. With ``--order`` the
table is sorted by its prompts' length, short or long ones first, the worst for who counts rows; Dask takes a
table's partitions from its end, more or less. "By rows" is what counting them says at the same moments.
"""

from __future__ import annotations

import argparse
import datetime
import json
import threading
import time
from typing import Any

import dask.dataframe as dd
import pandas as pd
from distributed import Client
from inputs import cpu

from daskllm import demo
from daskllm.jobs.eta import Eta, State
from daskllm.jobs.watch import watching
from daskllm.llm import load
from daskllm.runtime.deploy import local_cluster

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


def table(rows: int, order: str) -> pd.DataFrame:
    """The bundled table's prompts in turn, numbered so that no two are alike."""
    prompts = demo.table()["prompt"].tolist()
    made = pd.DataFrame({"prompt": [f"{prompts[i % len(prompts)]} ({i})" for i in range(rows)]})
    if order == "given":
        return made.sample(frac=1, random_state=0, ignore_index=True)
    made = made.iloc[made["prompt"].str.len().argsort(kind="stable")]
    return (made if order == "short" else made.iloc[::-1]).reset_index(drop=True)


def looked_at(eta: Eta, over: threading.Event) -> list[tuple[float, State]]:
    """The state a few times a second until the job is over."""
    seen = []
    while not over.wait(0.1):
        seen.append((time.monotonic(), eta.state()))
    return seen


def errors(seen: list[tuple[float, State]], begun: float, end: float, rows: int) -> dict[str, dict[str, Any]]:
    """At each share of the time: off by what part of what was left, in percent; and counting rows alone."""
    out: dict[str, dict[str, Any]] = {}
    for share in SHARES:
        now, state = next((one for one in seen if one[0] >= begun + share * (end - begun)), seen[-1])
        left = max(1e-9, end - now)
        by_rows = (rows - state.rows) * (now - begun) / state.rows if state.rows else None
        off = None if state.eta is None else round(100 * (state.eta / left - 1), 1)
        plain = None if by_rows is None else round(100 * (by_rows / left - 1), 1)
        out[f"{share:.0%}"] = {"off_percent": off, "by_rows_percent": plain}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=12000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--order", choices=("given", "short", "long"), default="given")
    args = parser.parse_args()
    with local_cluster(args.workers, 2) as cluster, Client(cluster) as client:
        llm = load(str(demo.model_path()), client=client, answers=None)
        frame = dd.from_pandas(table(args.rows, args.order), npartitions=-(-args.rows // 256))
        answered = frame.llm.chat(llm, "prompt", max_tokens=64)
        over, seen = threading.Event(), []
        with watching(answered.expr, client, args.rows) as eta:
            looker = threading.Thread(target=lambda: seen.extend(looked_at(eta, over)))
            looker.start()
            begun = time.monotonic()
            out = answered.compute()
            end = time.monotonic()
            over.set()
            looker.join()
        llm.close()
    if len(out) != args.rows or out["generated_error"].notna().any():
        raise RuntimeError("rows were lost or failed: the times mean nothing")
    shape = {
        "rows": args.rows,
        "workers": args.workers,
        "order": args.order,
        "seconds": round(end - begun, 1),
    }
    found = errors(seen, begun, end, args.rows)
    print(json.dumps({"date": datetime.date.today().isoformat(), "cpu": cpu(), **shape, "eta": found}))


if __name__ == "__main__":
    main()
