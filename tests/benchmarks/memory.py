"""How much memory a model takes beside what it must hold, as one JSON object.

    python tests/benchmarks/memory.py [--model DIR] [--rows 64] [--kv-memory BYTES]

A process imports everything, notes what is resident, loads, answers a work file and notes the most that ever
was. It must hold the weights and the keys and values of its rows: those blocks that were in use at the same
time at most. Then a process does the same in a control group that may hold 1.1 times that, what the process
had of its own before ``load``, and some room: far less than a second copy of the weights. Pages that only
cache files are given up there. Where no control group can be made, ``runs_under_limit`` is null.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inputs import INPUTS, cpu, make_model, make_work

MEGABYTE = 1_000_000
ROOM = 96 * MEGABYTE
"""Beside weights and KV cache: stacks and arenas of threads, logits and a step's other results."""
GROUPS = Path("/sys/fs/cgroup")


def status(name: str) -> int:
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextmanager
def control_group(limit: int) -> Iterator[Path | None]:
    """A group whose processes may hold so many bytes; None where none can be made."""
    old = GROUPS / "memory"
    root, file = (old, "memory.limit_in_bytes") if old.exists() else (GROUPS, "memory.max")
    group = root / f"daskllm-{os.getpid()}"
    try:
        group.mkdir()
        (group / file).write_text(str(limit))
    except OSError as error:
        print(f"no control group: {error}", file=sys.stderr)
        if group.exists():
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def child(model: str, work: str, kv_memory: int, group: str) -> None:
    """Load and answer in this process, in a control group where one is named."""
    if group:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    import torch

    from daskllm.bench import read_work
    from daskllm.checkpoint import open_checkpoint
    from daskllm.engine.kernels.cpu import operations as cpu
    from daskllm.engine.kvcache import bytes_per_block
    from daskllm.llm import load
    from daskllm.models import describe

    described = describe(open_checkpoint(model).config)
    cpu.load(torch.bfloat16, False, torch.bfloat16, described)  # code, not a copy of weights
    rows = read_work(work)
    base, own = status("VmRSS"), status("RssAnon")
    llm = load(model, kv_memory=kv_memory, answers=None)
    session = llm.session()
    loaded = status("VmHWM")
    answers = session.generate([row.prompt for row in rows], [row.sampling for row in rows])
    assert all(answer.completion_tokens == row.out for (answer,), row in zip(answers, rows, strict=True))
    config, cache = session.config, session.engine.runner.cache
    block = bytes_per_block(
        config.num_layers, config.num_kv_heads, config.head_dim, cache.keys[0].element_size()
    )
    sizes = session.model.nbytes()
    print(
        json.dumps(
            {
                "base_mb": base / MEGABYTE,
                "base_own_mb": own / MEGABYTE,
                "loaded_mb": loaded / MEGABYTE,
                "peak_mb": status("VmHWM") / MEGABYTE,
                "weights_mb": sum(sizes.values()) / MEGABYTE,
                "kv_used_mb": block * max(s.blocks_used for s in session.metrics.history) / MEGABYTE,
            }
        )
    )
    llm.close()


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        model, work, kv_memory, group = sys.argv[2:]
        child(model, work, int(kv_memory), group)
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (a 0.5B Llama of random weights)")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--kv-memory", type=int, default=256 * MEGABYTE, help="bytes")
    args = parser.parse_args()
    model = args.model or make_model(INPUTS / "llama-0.5B", "0.5B")
    work = make_work(INPUTS / f"work-{args.rows}-0.json", args.rows)
    free = run(model, work, args.kv_memory, "")
    if free.returncode:
        sys.exit(free.stderr)
    found: dict[str, Any] = json.loads(free.stdout.splitlines()[-1])
    must = found["weights_mb"] + found["kv_used_mb"]
    limit = round(MEGABYTE * (found["base_own_mb"] + 1.1 * must)) + ROOM
    limited = None
    with control_group(limit) as group:
        if group is not None:
            limited = run(model, work, args.kv_memory, group)
            if limited.returncode:
                print(limited.stderr or f"ended with {limited.returncode}", file=sys.stderr)
    result = {
        "cpu": cpu(),
        "model": model.name,
        "rows": args.rows,
        **{name: round(size, 1) for name, size in found.items()},
        "peak_less_base_mb": round(found["peak_mb"] - found["base_mb"], 1),
        "ratio": round((found["peak_mb"] - found["base_mb"]) / must, 3),
        "limited_to_mb": round(limit / MEGABYTE, 1),
        "runs_under_limit": None if limited is None else limited.returncode == 0,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
