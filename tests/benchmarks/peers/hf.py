"""transformers' own ``generate`` on a work file: ``hf.py MODEL WORK``, one JSON line.

bfloat16 where the CPU has it, batches of 16 rows in the given order, padded on the left; a batch runs until
its longest row has its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import Answer, Row, arguments, cores, report, torch_dtype
from transformers import AutoModelForCausalLM

BATCH = 16


def load(path: str) -> Answer:
    torch.set_num_threads(cores())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype()).eval()
    model.generation_config.eos_token_id = None  # exactly as many tokens as are asked for

    def batch(rows: Sequence[Row]) -> None:
        width, steps = max(len(r["prompt"]) for r in rows), max(r["out"] for r in rows)
        ids = torch.tensor([[0] * (width - len(r["prompt"])) + r["prompt"] for r in rows])
        mask = torch.tensor([[0] * (width - len(r["prompt"])) + [1] * len(r["prompt"]) for r in rows])
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=steps, pad_token_id=0)
        assert out.shape[1] == width + steps

    def answer(rows: Sequence[Row]) -> int:
        for i in range(0, len(rows), BATCH):
            batch(rows[i : i + BATCH])
        return sum(row["out"] for row in rows)  # what came beyond a row's own number is thrown away

    return answer


if __name__ == "__main__":
    args = arguments(__doc__ or "")
    report(
        f"transformers generate, batches of {BATCH}, {torch_dtype()}",
        ["transformers", "torch"],
        args.work,
        lambda: load(args.model),
    )
