"""vLLM's CPU build on a work file: ``vllm_cpu.py MODEL WORK``, one JSON line.

bfloat16 where the CPU has it, compiled as it comes, up to 64 sequences together, as in daskllm.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from common import Answer, Row, arguments, report, torch_dtype

CACHE_GB = 4
CONTEXT = 2048


def load(path: str, prefix_caching: bool) -> Answer:
    # Read when vLLM is imported, in this process and in its engine's.
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(CACHE_GB)
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm import LLM, SamplingParams

    engine = LLM(
        path,
        dtype=torch_dtype(),
        max_model_len=CONTEXT,
        max_num_seqs=64,
        enable_prefix_caching=prefix_caching,
    )

    def answer(rows: Sequence[Row]) -> int:
        each = [
            SamplingParams(
                temperature=0.0,
                max_tokens=row["out"],
                min_tokens=row["out"],
                ignore_eos=True,
                detokenize=False,
            )
            for row in rows
        ]
        prompts = [{"prompt_token_ids": row["prompt"]} for row in rows]
        done = engine.generate(prompts, each, use_tqdm=False)
        return sum(len(one.token_ids) for request in done for one in request.outputs)

    return answer


if __name__ == "__main__":  # its engine's process imports this file
    args = arguments(__doc__ or "")
    report(
        f"vLLM on CPU, {torch_dtype()}" + (", prefix caching" if args.prefix_caching else ""),
        ["vllm-cpu", "torch"],
        args.work,
        lambda: load(args.model, args.prefix_caching),
    )
