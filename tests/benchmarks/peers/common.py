"""What every peer has in common: the work file, the clock, and the line that it prints.

The rules are those of ``daskllm bench``: each row gets exactly the tokens that it asks for, end tokens
ignored; loading is timed by itself, four rows warm up, and the rest is the time. A peer runs in an
environment of its own, so that this file needs the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Answer = Callable[[Sequence[Row]], int]
"""Generates for rows; the number of tokens that came."""

WARM_UP_ROWS = 4


def arguments(description: str) -> argparse.Namespace:
    """``MODEL WORK [--prefix-caching]``."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("model", help="a model directory")
    parser.add_argument("work", help="a work file")
    parser.add_argument("--prefix-caching", action="store_true", help="where the peer has it")
    return parser.parse_args()


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_dtype() -> str:
    """What a peer that computes by torch is fastest in: float32 where this CPU multiplies no bfloat16."""
    import torch  # peers that ask have it

    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def report(peer: str, packages: Sequence[str], work: str, load: Callable[[], Answer]) -> None:
    """Load, warm up, time, and print one JSON line.

    Args:
        peer: its name, with the settings that matter.
        packages: whose versions are printed.
        load: makes the model ready.

    Raises:
        RuntimeError: not exactly the tokens came that were asked for, so that the time means nothing.
    """
    rows = json.loads(Path(work).read_text())
    begun = time.perf_counter()
    answer = load()
    load_s = time.perf_counter() - begun
    # Backwards: where prompts are cached, the warm-up must not have seen those of the work.
    answer([{**row, "prompt": row["prompt"][::-1]} for row in rows[:WARM_UP_ROWS]])
    begun = time.perf_counter()
    tokens = answer(rows)
    seconds = time.perf_counter() - begun
    asked = sum(row["out"] for row in rows)
    if tokens != asked:
        raise RuntimeError(f"{peer} gave {tokens} tokens where {asked} were asked for")
    line = {
        "peer": peer,
        "load_s": round(load_s, 3),
        "seconds": round(seconds, 3),
        "out_tokens": tokens,
        "out_tokens_per_s": round(tokens / seconds, 1),
        "versions": {package: version(package) for package in packages},
    }
    print(json.dumps(line), flush=True)
