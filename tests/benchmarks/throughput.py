"""``daskllm bench`` beside another engine on the same work file, in turns, as one JSON object.

    python tests/benchmarks/throughput.py [--model DIR] [--work FILE] [--rounds 3] [--peer COMMAND]...

A peer is a command that is given MODEL and WORK and prints one JSON line with ``out_tokens_per_s`` last, such
as ``--peer "/venvs/other/bin/python peers/ov.py"``; without one it is transformers (``peers/hf.py``). Speeds
move from run to run, so the engines alternate A B A B and the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from inputs import INPUTS, cpu, last_line, make_model, make_work

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (a 135M Llama of random weights)")
    parser.add_argument("--work", type=Path, help="a work file (64 rows of skewed lengths)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], help="a command; may be given again")
    parser.add_argument("--workers", type=int, help="run daskllm on a local cluster")
    args = parser.parse_args()
    model = args.model or make_model(INPUTS / "llama-135M")
    work = args.work or make_work(INPUTS / "work.json")

    ours = [sys.executable, "-m", "daskllm", "bench", "--model", str(model), "--work", str(work), "--json"]
    ours += ["--workers", str(args.workers)] if args.workers else []
    peers = [shlex.split(peer) for peer in args.peer] or [[sys.executable, str(HERE / "peers" / "hf.py")]]
    rounds: list[list[dict[str, Any]]] = []
    for i in range(args.rounds):
        rounds.append([last_line(ours), *(last_line([*peer, str(model), str(work)]) for peer in peers)])
        print(f"round {i + 1}: {[run['out_tokens_per_s'] for run in rounds[-1]]} tokens/s", file=sys.stderr)

    speeds = [[run["out_tokens_per_s"] for run in round_] for round_ in rounds]
    result = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu(),
        "transformers": version("transformers"),
        "daskllm": {
            **rounds[-1][0],
            "out_tokens_per_s": round(median(speed[0] for speed in speeds), 1),
        },
        "peers": [
            {
                "peer": rounds[0][k]["peer"],
                "out_tokens_per_s": round(median(speed[k] for speed in speeds), 1),
                "ratio": round(median(speed[0] / speed[k] for speed in speeds), 2),
            }
            for k in range(1, len(peers) + 1)
        ],
        "rounds": speeds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
