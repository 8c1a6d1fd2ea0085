"""From the call of ``load`` to the first token, in fresh processes, as one JSON object.

    python tests/benchmarks/startup.py [--model DIR] [--rounds 5]

One process before the others reads the files into the page cache and compiles what this machine has not
compiled yet; it is not counted. In each round a process starts, loads and generates, and stays; then a second
one does the same beside it. Importing daskllm is timed by itself, before ``load``; what ``load`` imports
counts as its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from inputs import INPUTS, cpu, make_model

CHILD = """
import json, sys, time
begun = time.perf_counter()
import daskllm
imported = time.perf_counter()
llm = daskllm.load(sys.argv[1], answers=None)
loaded = time.perf_counter()
(answer,) = llm.generate([[5, 6, 7, 8]], max_tokens=1, ignore_eos=True)
done = time.perf_counter()
assert answer.completion_tokens == 1, answer
times = {"import_s": imported - begun, "load_s": loaded - imported, "first_token_s": done - imported}
print(json.dumps(times), flush=True)
sys.stdin.read()
"""


class Started:
    """A process that has generated its first token, and stays until `stop`."""

    def __init__(self, model: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with {self.process.wait()} before its first token")
        self.times: dict[str, float] = json.loads(line)

    def stop(self) -> None:
        self.process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (a 135M Llama of random weights)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = args.model or make_model(INPUTS / "llama-135M")
    Started(model).stop()
    first, second = [], []
    for _ in range(args.rounds):
        one = Started(model)
        two = Started(model)
        two.stop()
        one.stop()
        first.append(one.times)
        second.append(two.times)

    def middle(runs: list[dict[str, float]]) -> dict[str, float]:
        return {name: round(median(run[name] for run in runs), 3) for name in runs[0]}

    more = median(b["first_token_s"] - a["first_token_s"] for a, b in zip(first, second, strict=True))
    result = {
        "cpu": cpu(),
        "model": model.name,
        "rounds": args.rounds,
        "first_process": middle(first),
        "second_process": middle(second),
        "second_takes_more_s": round(more, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
