"""daskllm beside other engines on the same work, in turns, and the README's table of it.

    python tests/benchmarks/compare.py --openvino PYTHON --vllm PYTHON --hf PYTHON
        [--shape 135M]... [--rows 64]... [--seed 0]... [--prefix 0] [--rounds 3] [--slow-rounds 1]
        [--results FILE]
    python tests/benchmarks/compare.py --write [--results FILE]

Each PYTHON is the interpreter of an environment in which that engine is installed; peers whose is not given
are left out. Every shape runs with every number of rows and every seed of the lengths; with ``--prefix``, all
rows begin with as many tokens in common, and peers that can keep a prefix are told to. A round runs daskllm
first and then each peer, so that the engines alternate; slow ones (vLLM, which takes a minute to load, and
transformers) may have fewer rounds. Each run is added to the results file as soon as it is there, so that a
sitting may be taken in pieces, and daskllm's ratio to a peer is the median over the rounds that both were in.
``--write`` makes the table in README.md from the file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from inputs import INPUTS, SHAPES, cpu, last_line, make_model, make_work
from table import write_table

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
PEERS = {"openvino": "ov.py", "vllm": "vllm_cpu.py", "hf": "hf.py"}
SLOW = ("vllm", "hf")
CACHES_PREFIXES = ("openvino", "vllm")


def commands(pythons: dict[str, str], model: Path, work: Path, alike: bool) -> dict[str, list[str]]:
    """What runs in a round, daskllm first."""
    ours = [sys.executable, "-m", "daskllm", "bench", "--model", str(model), "--work", str(work), "--json"]
    peers = {
        name: [python, str(HERE / "peers" / PEERS[name]), str(model), str(work)]
        + ["--prefix-caching"] * (alike and name in CACHES_PREFIXES)
        for name, python in pythons.items()
    }
    return {"daskllm": ours, **peers}


def runs(
    pythons: dict[str, str], shape: str, rows: int, seed: int, prefix: int, rounds: int, slow_rounds: int
) -> Iterator[dict[str, Any]]:
    """One case, run by run."""
    model = make_model(INPUTS / f"llama-{shape}", shape)
    work = make_work(INPUTS / f"work-{rows}-{seed}-{prefix}.json", rows, seed, prefix)
    sitting = round(time.time())
    for number in range(rounds):
        for name, command in commands(pythons, model, work, prefix > 0).items():
            if name in SLOW and number >= slow_rounds:
                continue
            line = last_line(command)
            case = {"shape": shape, "rows": rows, "seed": seed, "prefix": prefix}
            yield {**case, "sitting": sitting, "round": number, "engine": name, **line}


def add(path: Path, run: dict[str, Any]) -> None:
    """Write a run to the results file, which is made where it is not there."""
    found = json.loads(path.read_text()) if path.exists() else {"runs": []}
    found |= {"date": datetime.date.today().isoformat(), "cpu": cpu(), "cores": run.get("cpu_count")}
    found["cores"] = found["cores"] or next((r["cpu_count"] for r in found["runs"] if "cpu_count" in r), None)
    found["runs"].append(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in PEERS:
        parser.add_argument(f"--{name}", metavar="PYTHON")
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES), help="(135M)")
    parser.add_argument("--rows", action="append", type=int, help="(64)")
    parser.add_argument("--seed", action="append", type=int, help="(0)")
    parser.add_argument("--prefix", type=int, default=0, help="tokens that all prompts begin with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-rounds", type=int, default=1, help=f"of {' and '.join(SLOW)}")
    parser.add_argument("--write", action="store_true", help="make the table; run nothing")
    today = HERE / "results" / f"{datetime.date.today()}.json"
    parser.add_argument("--results", type=Path, default=today)
    args = parser.parse_args()
    if args.write:
        README.write_text(write_table(README.read_text(), json.loads(args.results.read_text())))
        return
    pythons = {name: given for name in PEERS if (given := getattr(args, name)) is not None}
    for shape, rows, seed in product(args.shape or ["135M"], args.rows or [64], args.seed or [0]):
        for run in runs(pythons, shape, rows, seed, args.prefix, args.rounds, args.slow_rounds):
            add(args.results, run)
            print(f"{shape} {rows} rows, seed {seed}, round {run['round']}: {run['engine']} "
                  f"{run['out_tokens_per_s']} tokens/s", file=sys.stderr)  # fmt: skip
    print(json.dumps({"results": str(args.results)}))


if __name__ == "__main__":
    main()
