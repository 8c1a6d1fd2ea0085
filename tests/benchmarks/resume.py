"""A finished job that is run again, with its inputs overwritten meanwhile, as one JSON object.

    python tests/benchmarks/resume.py [--parts 1000]

``daskllm generate`` answers a Parquet file for each part. Then every input becomes as many other bytes with
the same time, which nothing could read, and the same command is run again: it must end well and leave every
part as it was. Beside it stands what the command line takes to say how it is used.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
from inputs import cpu

from daskllm import demo


def timed(*arguments: str) -> float:
    """Seconds of a command line; whatever it says goes to standard error."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "daskllm", *arguments], stdout=sys.stderr, check=True)
    return time.perf_counter() - begun


def overwrite(path: Path) -> None:
    """Other bytes, as many, of the same time."""
    known = path.stat()
    path.write_bytes(os.urandom(known.st_size))
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))


def run(parts: int, folder: Path) -> dict[str, Any]:
    """The job, the garbage, the job again."""
    inputs, out = folder / "in", folder / "out"
    inputs.mkdir()
    prompts = demo.table()["prompt"].tolist()
    for number in range(parts):
        row = {"text": [f"{prompts[number % len(prompts)]} ({number})"]}
        pd.DataFrame(row).to_parquet(inputs / f"{number:06}.parquet")
    command = [
        "generate",
        "--model",
        str(demo.model_path()),
        "--input",
        f"{inputs}/*.parquet",
        "--prompt",
        "{text}",
    ]
    command += ["--max-tokens", "2", "--no-answers", "--output", str(out)]
    first = timed(*command)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for file in inputs.iterdir():
        overwrite(file)
    again = [timed(*command) for _ in range(3)]
    usage = [timed("generate", "--help") for _ in range(3)]
    after = {file.name: file.read_bytes() for file in out.iterdir()}
    return {
        "parts": sum(name.endswith(".parquet") for name in before),
        "first_s": round(first, 2),
        "again_s": [round(seconds, 2) for seconds in again],
        "help_s": [round(seconds, 2) for seconds in usage],
        "same_parts": before == after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = run(args.parts, Path(folder))
    print(json.dumps({"date": datetime.date.today().isoformat(), "cpu": cpu(), **measured}))
    sys.exit(not measured["same_parts"])


if __name__ == "__main__":
    main()
