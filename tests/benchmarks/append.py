"""Rows appended to a table that was answered, and the whole cut in other partitions: what is generated again.

    python tests/benchmarks/append.py [--rows 10000] [--more 100] [--partitions 40 17]

The bundled model answers a table; then the same table with more rows behind it is asked, in another number of
partitions. Only the new rows are to be generated (`daskllm.answers`); the rest must be what it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import pandas as pd
from inputs import cpu

import daskllm
from daskllm import demo
from daskllm.runtime.progress import Increment, follow


def questions(rows: int) -> pd.DataFrame:
    """Short questions of the bundled model's own kind, no two alike."""
    prompts = demo.table()["prompt"].tolist()
    return pd.DataFrame(
        {"id": range(rows), "text": [f"{prompts[i % len(prompts)]} ({i})" for i in range(rows)]}
    )


def answered(llm: daskllm.LLM, table: pd.DataFrame, partitions: int, out: int, path: Path) -> dict[str, Any]:
    """A job; its seconds, the rows and tokens that the model took, and its table."""
    counted: list[Increment] = []
    before = llm.session().metrics.totals()
    frame = dd.from_pandas(table, npartitions=partitions)
    with follow(None, counted.append):
        begun = time.perf_counter()
        done = frame.llm.chat(llm, "text", max_tokens=out).llm.to_parquet(path)
        seconds = time.perf_counter() - begun
    after = llm.session().metrics.totals()
    return {
        "seconds": round(seconds, 2),
        "rows": done.rows,
        "rows_generated": sum(one.rows - one.remembered for one in counted),
        "output_tokens": int(after["output_tokens"] - before["output_tokens"]),
        "table": pd.read_parquet(path),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--more", type=int, default=100, help="rows that are appended")
    parser.add_argument("--partitions", type=int, nargs=2, default=(40, 17), help="before and after")
    parser.add_argument("--out", type=int, default=16, help="tokens of an answer at most")
    args = parser.parse_args()
    table = questions(args.rows + args.more)
    with tempfile.TemporaryDirectory() as place, dask.config.set(num_workers=2):
        llm = daskllm.load(demo.model_path(), answers=f"{place}/answers")
        first = answered(llm, table.iloc[: args.rows], args.partitions[0], args.out, Path(place, "first"))
        then = answered(llm, table, args.partitions[1], args.out, Path(place, "then"))
        llm.close()
    due, found = first.pop("table"), then.pop("table")
    same = found.iloc[: args.rows].reset_index(drop=True).equals(due.reset_index(drop=True))
    right = bool(same and len(found) == len(table) and then["rows_generated"] == args.more)
    shape = {"rows": args.rows, "appended": args.more, "partitions": list(args.partitions)}
    result = {"date": datetime.date.today().isoformat(), "cpu": cpu(), **shape, "first": first, "then": then}
    print(json.dumps({**result, "same_rows": bool(same), "only_the_new": right}))
    sys.exit(not right)


if __name__ == "__main__":
    main()
