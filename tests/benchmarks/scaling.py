"""What Dask costs and what a second core brings, as one JSON object.

    python tests/benchmarks/scaling.py [--model DIR] [--work FILE] [--rounds 3]

Layouts are measured in turns by ``daskllm bench`` and compared by the medians of their rounds: the bare
engine and one worker on all cores; one worker on one core; two workers of one core each, as replicas and as
stages. Beside them two bare engines of one core answer half of the rows each, at the same time and without
Dask: what two cores that share a memory can bring at most. Beside the speeds it says how many seconds of
cores there were, how many the engines' processes took, and how many client and scheduler.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from inputs import INPUTS, cpu, last_line, make_model, make_work

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "bare": (2, []),
    "one worker": (2, ["--workers", "1"]),
    "one core": (1, ["--workers", "1"]),
    "two replicas": (2, ["--workers", "2"]),
    "two stages": (2, ["--workers", "2", "--stages", "2"]),
}
"""Cores and options of each."""
TWO_ALONE = "two engines alone"
RATIOS = {
    "one worker / bare": ("one worker", "bare"),
    "two replicas / one core": ("two replicas", "one core"),
    "two stages / one core": ("two stages", "one core"),
    "two engines alone / one core": (TWO_ALONE, "one core"),
    "two replicas / two engines alone": ("two replicas", TWO_ALONE),
}


def bench(model: Path, work: Path) -> list[str]:
    """The command that answers a work file."""
    return [sys.executable, "-m", "daskllm", "bench", "--model", str(model), "--work", str(work), "--json"]


def halves(work: Path, folder: Path) -> list[Path]:
    """The rows in two files, the longest dealt out first, so that both take equally long."""
    rows = sorted(json.loads(work.read_text()), key=lambda row: -len(row["prompt"]) - row["out"])
    files = [folder / f"half-{i}.json" for i in range(2)]
    for i, file in enumerate(files):
        file.write_text(json.dumps(rows[i::2]))
    return files


def at_once(commands: list[list[str]], cores: list[int]) -> float:
    """Output tokens per second of commands that run at the same time, each on a core of its own."""
    running = []
    for command, core in zip(commands, cores, strict=True):
        os.sched_setaffinity(0, {core})  # a process begins with its parent's
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    ended = [one.communicate()[0] for one in running]
    if failed := [one.args for one in running if one.returncode]:
        raise RuntimeError(f"{failed[0]} failed")
    return round(sum(json.loads(out.strip().splitlines()[-1])["out_tokens_per_s"] for out in ended), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (a 135M Llama of random weights)")
    parser.add_argument("--work", type=Path, help="a work file (256 rows of skewed lengths)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = args.model or make_model(INPUTS / "llama-135M")
    work = args.work or make_work(INPUTS / "work-256.json", rows=256)
    all_cores = sorted(os.sched_getaffinity(0))
    command = bench(model, work)
    speeds: dict[str, list[float]] = {name: [] for name in (*LAYOUTS, TWO_ALONE)}
    cpu_s: dict[str, list[tuple[float, float, float]]] = {name: [] for name in LAYOUTS}
    for i in range(args.rounds):
        for name, (cores, options) in LAYOUTS.items():
            os.sched_setaffinity(0, all_cores[:cores])
            line = last_line([*command, *options])
            speeds[name].append(line["out_tokens_per_s"])
            cpu_s[name].append((line["seconds"] * cores, line["cpu_s"], line.get("client_cpu_s", 0.0)))
        with TemporaryDirectory() as folder:
            parts = [bench(model, half) for half in halves(work, Path(folder))]
            speeds[TWO_ALONE].append(at_once(parts, all_cores[:2]))
        print(f"round {i + 1}: { ({name: speed[-1] for name, speed in speeds.items()}) }", file=sys.stderr)
    middle = {name: median(speed) for name, speed in speeds.items()}
    seconds = {
        name: dict(
            zip(
                ("cores", "engines", "client_and_scheduler"),
                map(median, zip(*each, strict=True)),
                strict=True,
            )
        )
        for name, each in cpu_s.items()
    }
    result = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu(),
        "rounds": args.rounds,
        "out_tokens_per_s": middle,
        "core_seconds": seconds,
        "ratios": {name: round(middle[a] / middle[b], 3) for name, (a, b) in RATIOS.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
