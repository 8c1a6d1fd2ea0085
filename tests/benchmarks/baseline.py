"""What transformers' own ``generate`` needs for a work file: ``baseline.py MODEL WORK``, one JSON line.

bfloat16, batches of 16 rows in the given order, padded on the left; a batch runs until its longest row has
its tokens. The warm-up is four rows, as in ``daskllm bench``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

BATCH = 16


def answer(model: PreTrainedModel, rows: list[dict[str, Any]]) -> None:
    """Generate for one batch."""
    width, steps = max(len(r["prompt"]) for r in rows), max(r["out"] for r in rows)
    ids = torch.tensor([[0] * (width - len(r["prompt"])) + r["prompt"] for r in rows])
    mask = torch.tensor([[0] * (width - len(r["prompt"])) + [1] * len(r["prompt"]) for r in rows])
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=steps, pad_token_id=0)
    assert out.shape[1] == width + steps


def main(path: str, work: str) -> None:
    """Load, warm up, time."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # exactly as many tokens as are asked for
    load_s = time.perf_counter() - begun
    rows = json.loads(Path(work).read_text())
    answer(model, rows[:4])
    begun = time.perf_counter()
    for i in range(0, len(rows), BATCH):
        answer(model, rows[i : i + BATCH])
    seconds = time.perf_counter() - begun
    tokens = sum(row["out"] for row in rows)
    print(
        json.dumps(
            {
                "peer": f"transformers generate, batches of {BATCH}",
                "load_s": round(load_s, 3),
                "seconds": round(seconds, 3),
                "out_tokens": tokens,
                "out_tokens_per_s": round(tokens / seconds, 1),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
