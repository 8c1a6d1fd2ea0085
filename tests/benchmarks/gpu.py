"""Throughput and latency on a GPU, written to ``results/gpu-YYYY-MM-DD.json`` (`make gpu`).

    PYTHONPATH=. python tests/benchmarks/gpu.py [--model DIR] [--batches 1,8,64] [--new 128]

For each batch size: decode tokens per second, the mean time of a step, and the share of the card's memory
bandwidth that reading every weight once per step comes to. Needs torch, triton and cupy, and no Dask.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from inputs import VOCABULARY, make_model

from daskllm.blocks.store import STORE
from daskllm.session import Session
from daskllm.types import ModelSpec, SamplingParams

HERE = Path(__file__).resolve().parent
PROMPT_TOKENS = 64
COPIED_BYTES = 1 << 30


def bandwidth() -> float:
    """Bytes per second that this card moves in a plain copy, reads and writes counted."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(20):
        target.copy_(source)
    torch.cuda.synchronize()
    return 20 * 2 * COPIED_BYTES / (time.perf_counter() - begun)


def timed(session: Session, batch: int, new: int) -> dict[str, Any]:
    """One batch of equal rows: the whole run, less one with a single new token (its prefill)."""
    draw = Random(batch)
    prompts = [[draw.randrange(1, VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]
    seconds = []
    for tokens in (4, 1, new):  # the first is the warm-up
        begun = time.perf_counter()
        session.generate(prompts, SamplingParams(max_tokens=tokens, ignore_eos=True))
        seconds.append(time.perf_counter() - begun)
    step = (seconds[2] - seconds[1]) / (new - 1)
    return {
        "batch": batch,
        "prefill_s": round(seconds[1], 4),
        "step_ms": round(1000 * step, 3),
        "decode_tokens_per_s": round(batch / step, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (a 1B Llama of random weights)")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--new", type=int, default=128)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: this benchmark needs one")
    model = args.model or make_model(HERE.parents[1] / "build" / "bench" / "llama-1B", "1B")
    moved = bandwidth()
    begun = time.perf_counter()
    session = Session.open(ModelSpec(path=str(model), device="cuda"))
    load_s = time.perf_counter() - begun
    weights = STORE.nbytes()
    runs = [timed(session, int(batch), args.new) for batch in args.batches.split(",")]
    for run in runs:
        run["bandwidth_share"] = round(weights / (run["step_ms"] / 1000) / moved, 3)
    session.close()
    today = datetime.date.today().isoformat()
    result = {
        "date": today,
        "device": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "copy_gb_per_s": round(moved / 1e9, 1),
        "weights_mb": round(weights / 1e6, 1),
        "load_s": round(load_s, 3),
        "runs": runs,
    }
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / f"gpu-{today}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
