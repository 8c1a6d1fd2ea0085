"""A job in trouble of every kind for a while, beside the same job undisturbed, as one JSON object.

    python tests/benchmarks/soak.py [--rows 20000] [--seconds 600] [--every 5] [--seed 0]

Every few seconds one of these, in an order that the seed draws: a worker stopped and continued, a worker told
to end (SIGTERM, as a spot notice is) or killed, a second client of the same command at the same time, so that
parts are delivered twice, a finished part damaged, the client killed. All the while the workers' disk is slow
and their clocks are wrong. After the given seconds the job is left alone; the same command then mends what
was damaged, and the table must be the undisturbed one's, row for row.
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
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from chaos import command_of, questions
from inputs import cpu
from processes import Process, Run, differences, last_json, rows_made, running, to_the_end

STOPPED_SECONDS = 2.0
KINDS = ("stop", "notice", "kill", "twin", "damage", "client")


class Troubles:
    """Deals trouble; a function for `processes.to_the_end`.

    Args:
        every: seconds between two of them.
        seconds: after which there are no more, once each kind has been.
    """

    def __init__(self, every: float, seconds: float, seed: int) -> None:
        self.every, self.seconds = every, seconds
        self.draw = random.Random(seed)
        self.deck: list[str] = []
        self.dealt: set[str] = set()
        self.next = 0.0
        self.stopped: list[tuple[float, int]] = []
        self.twin: Process | None = None

    def __call__(self, run: Run) -> None:
        for until, pid in [one for one in self.stopped if one[0] < time.monotonic()]:
            self._signal(pid, signal.SIGCONT)
            self.stopped.remove((until, pid))
        over = run.seconds > self.seconds and self.dealt == set(KINDS)
        if over:
            (run.place / "hold").unlink(missing_ok=True)
            if not self.stopped:
                self.end()
            return
        if run.seconds < self.next or not run.rows_made():
            return
        self.next = run.seconds + self.every
        if not self.deck:
            self.deck = self.draw.sample(KINDS, len(KINDS))
        kind = self.deck.pop()
        if getattr(self, f"_{kind}")(run):
            self.dealt.add(kind)
            run.note(kind)
        else:
            self.deck.insert(0, kind)  # there is nothing yet that it could befall

    def end(self) -> None:
        """End the second client, if there is one."""
        if self.twin is not None:
            self.twin.stop()
            self.twin = None

    def _stop(self, run: Run) -> bool:
        return self._at_worker(run, signal.SIGSTOP)

    def _kill(self, run: Run) -> bool:
        return self._at_worker(run, signal.SIGKILL)

    def _at_worker(self, run: Run, what: signal.Signals) -> bool:
        pids = run.worker_pids()
        if not pids:
            return False
        pid = self.draw.choice(sorted(pids))
        if what == signal.SIGSTOP:
            self.stopped.append((time.monotonic() + STOPPED_SECONDS, pid))
        return self._signal(pid, what)

    def _notice(self, run: Run) -> bool:
        running = [one for one in run.workers if one.ended() is None]
        return bool(running) and self._signal(self.draw.choice(running).pid, signal.SIGTERM)

    def _twin(self, run: Run) -> bool:
        self.end()
        self.twin = Process(run.client.command, run.place / "twin.log", run.client.env)
        return True

    def _client(self, run: Run) -> bool:
        if run.client.ended() is not None:
            return False
        run.client.kill()
        return True

    def _damage(self, run: Run) -> bool:
        parts = sorted(run.output.glob("part.*"))
        if not parts:
            return False
        part = self.draw.choice(parts)
        data = bytearray(part.read_bytes())
        data[self.draw.randrange(len(data))] ^= 0xFF
        part.write_bytes(data)
        return True

    @staticmethod
    def _signal(pid: int, what: signal.Signals) -> bool:
        with suppress(ProcessLookupError):
            os.kill(pid, what)
            return True
        return False


def job(place: Path, args: argparse.Namespace, troubles: Troubles | None) -> dict[str, Any]:
    """One job; what it took, and its table."""
    output = place / "out"
    command = command_of(place.parent / "rows", output, args)
    env = {"DASK_DASKLLM__ANSWERS": str(place / "answers")}
    preload = ["count_rows.py"] if troubles is None else ["count_rows.py", "trouble.py"]
    with running(place / "run", command, output, args.workers, env, preload) as run:
        if troubles is not None:
            (run.place / "hold").touch()
        try:
            seconds = to_the_end(run, troubles or (lambda run: None), args.limit)
        finally:
            if troubles is not None:
                troubles.end()
        if troubles is not None:
            run.client.start()  # the same command finds and mends what was damaged since
            to_the_end(run, lambda run: None, args.limit)
        clocks = run.place / "clocks"
        return {
            "seconds": round(seconds, 1),
            "rows_said": last_json(run.place / "client.log")["rows"],
            "rows_generated": rows_made(run.place)[0],
            "faults": [what for _, what in run.faults],
            "clocks_off_s": [int(line.split()[1]) for line in clocks.read_text().splitlines()]
            if clocks.exists()
            else [],
            "table": pd.read_parquet(output),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (the bundled model)")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long there is trouble")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two troubles")
    parser.add_argument("--out", type=int, default=16, help="tokens of an answer at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds after which a job has failed")
    parser.add_argument("--keep", type=Path, help="a directory for the tables and logs, which stay")
    args = parser.parse_args()
    place = args.keep or Path(tempfile.mkdtemp(prefix="daskllm-soak-"))
    try:
        questions(place / "rows", args.rows)
        calm = job(place / "calm", args, None)
        troubled = job(place / "troubled", args, Troubles(args.every, args.seconds, args.seed))
    finally:
        if args.keep is None:
            shutil.rmtree(place, ignore_errors=True)
    due = calm.pop("table")
    found = differences(troubled.pop("table"), due)
    whole = len(due) == args.rows and not any(found.values()) and set(troubled["faults"]) == set(KINDS)
    faults = {kind: troubled["faults"].count(kind) for kind in KINDS}
    result = {"date": datetime.date.today().isoformat(), "cpu": cpu(), "rows": args.rows, "seed": args.seed}
    result |= {**found, "recomputed": troubled["rows_generated"] - calm["rows_generated"], "faults": faults}
    print(json.dumps({**result, "undisturbed": calm, "troubled": troubled, "same_table": whole}))
    sys.exit(not whole)


if __name__ == "__main__":
    main()
