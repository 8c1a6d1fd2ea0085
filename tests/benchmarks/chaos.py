"""A job whose workers, client and scheduler are killed, beside the same job undisturbed, as one JSON object.

    python tests/benchmarks/chaos.py [--rows 50000] [--every 20] [--workers 2]

Scheduler, workers (``dask worker --nanny``) and client (``daskllm generate``) are processes of their own,
each started again by the same command line when it has ended. A worker is killed (SIGKILL) every so many
seconds, one that has finished rows, so that the job goes on however slowly workers start; the client when a
third of the parts is there, the scheduler when two thirds are. The final table must be the undisturbed one's,
row for row; the exit status says whether it is. "Recomputed" are rows that an engine finished more than once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from inputs import cpu
from processes import Run, differences, last_json, rows_made, running, to_the_end

from daskllm import demo

CLIENT_AT, SCHEDULER_AT = 1 / 3, 2 / 3
"""Shares of the parts at which they are killed."""


class Deaths:
    """Kills them; a function for `processes.to_the_end`.

    Args:
        every: seconds between two workers' deaths; one dies as soon as the first rows are there.
    """

    def __init__(self, every: float, seed: int) -> None:
        self.every = every
        self._draw = random.Random(seed)
        self._next: float | None = None
        self._left = ["scheduler", "client"]

    def __call__(self, run: Run) -> None:
        there, of = run.parts()
        if of and self._left == ["scheduler", "client"] and there >= CLIENT_AT * of:
            self._kill(run, "client")
        elif of and self._left == ["scheduler"] and there >= SCHEDULER_AT * of:
            self._kill(run, "scheduler")
        if self._next is None:
            self._next = run.seconds if run.rows_made() else None
        elif run.seconds >= self._next and (pids := run.working_pids()):
            with suppress(ProcessLookupError):
                os.kill(self._draw.choice(pids), signal.SIGKILL)
                run.note("worker")
            self._next = run.seconds + self.every

    def _kill(self, run: Run, name: str) -> None:
        self._left.remove(name)
        run.note(name)
        getattr(run, name).kill()


def questions(path: Path, rows: int, seed: int = 0) -> None:
    """Short questions of the bundled model's own kind, no two alike, in files of a thousand."""
    path.mkdir(parents=True)
    prompts = demo.table()["prompt"].tolist()
    texts = pd.Series([f"{prompts[i % len(prompts)]} ({i})" for i in range(rows)])
    table = pd.DataFrame({"id": range(rows), "text": texts.sample(frac=1, random_state=seed).tolist()})
    for begin in range(0, rows, 1000):
        table.iloc[begin : begin + 1000].to_parquet(path / f"{begin:09}.parquet", index=False)


def command_of(rows: Path, output: Path, args: argparse.Namespace) -> list[str]:
    """The client's command; ``{scheduler}`` stands for the address."""
    command = [sys.executable, "-m", "daskllm", "generate", "--model", str(args.model or demo.model_path())]
    command += ["--input", f"{rows}/*.parquet", "--prompt", "text", "--chat", "--output", str(output)]
    return [*command, "--max-tokens", str(args.out), "--scheduler", "{scheduler}", "--json"]


def job(place: Path, rows: Path, args: argparse.Namespace, deaths: Deaths | None) -> dict[str, Any]:
    """One job; what it took, and its table."""
    output = place / "out"
    command = command_of(rows, output, args)
    env = {"DASK_DASKLLM__ANSWERS": str(place / "answers")}
    with running(place / "run", command, output, args.workers, env, ["count_rows.py"]) as run:
        seconds = to_the_end(run, deaths or (lambda run: None), args.limit)
        generated, tokens = rows_made(run.place)
        said = last_json(run.place / "client.log")
        faults = [what for _, what in run.faults]
        starts = {"client": run.client.starts, "scheduler": run.scheduler.starts}
        starts["workers"] = len(list(run.place.glob("pids/*")))
    return {
        "seconds": round(seconds, 1),
        "rows_said": said["rows"],
        "errors": said["errors"],
        "rows_generated": generated,
        "tokens_generated": tokens,
        "starts": starts,
        "kills": {name: faults.count(name) for name in ("worker", "client", "scheduler")},
        "table": pd.read_parquet(output),
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (the bundled model)")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two workers' deaths")
    parser.add_argument("--out", type=int, default=16, help="tokens of an answer at most")
    parser.add_argument("--seed", type=int, default=0, help="of who dies")
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds after which a job has failed")
    parser.add_argument("--keep", type=Path, help="a directory for the tables and logs, which stay")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    place = args.keep or Path(tempfile.mkdtemp(prefix="daskllm-chaos-"))
    try:
        questions(place / "rows", args.rows)
        calm = job(place / "calm", place / "rows", args, None)
        print(f"undisturbed: {calm['seconds']} s", file=sys.stderr)
        killed = job(place / "killed", place / "rows", args, Deaths(args.every, args.seed))
    finally:
        if args.keep is None:
            shutil.rmtree(place, ignore_errors=True)
    due = calm.pop("table")
    found = differences(killed.pop("table"), due)
    whole = len(due) == args.rows and not any(found.values()) and all(killed["kills"].values())
    result = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu(),
        "rows": args.rows,
        "workers": args.workers,
        "kill_every_s": args.every,
        **found,
        "recomputed": killed["rows_generated"] - calm["rows_generated"],
        "overhead": round(killed["seconds"] / calm["seconds"] - 1, 3),
        "undisturbed": calm,
        "disturbed": killed,
        "same_table": whole,
    }
    print(json.dumps(result))
    sys.exit(not whole)


if __name__ == "__main__":
    main()
