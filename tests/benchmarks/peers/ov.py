"""OpenVINO GenAI's continuous batching on a work file: ``ov.py MODEL WORK``, one JSON line.

The model is exported once with 16-bit weights, beside its directory. What decides the arithmetic is left at
its defaults: where the CPU has bfloat16 products they are used, and keys and values are kept in 8 bits. Up
to 64 sequences run together, as in daskllm, and prompts are cut and mixed with decoding.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai
from common import Answer, Row, arguments, cores, report

CACHE_GB = 4


def exported(path: str) -> Path:
    """The model in OpenVINO's format."""
    target = Path(path.rstrip("/") + "-openvino")
    if not (target / "openvino_model.xml").exists():
        tool = Path(sys.executable).with_name("optimum-cli")
        subprocess.run(
            [tool, "export", "openvino", "--model", path, "--task", "text-generation-with-past",
             "--weight-format", "fp16", target],
            check=True,
            stdout=sys.stderr,
        )  # fmt: skip
    return target


def load(path: Path, prefix_caching: bool) -> Answer:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.max_num_seqs = 64
    scheduler.max_num_batched_tokens = 1024
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = prefix_caching
    pipeline = genai.ContinuousBatchingPipeline(path, scheduler, "CPU", {"INFERENCE_NUM_THREADS": cores()})
    numbers = count()

    def answer(rows: Sequence[Row]) -> int:
        handles = []
        for row in rows:
            config = genai.GenerationConfig()
            config.do_sample, config.ignore_eos = False, True
            config.max_new_tokens = config.min_new_tokens = row["out"]
            ids = openvino.Tensor(np.array([row["prompt"]], dtype=np.int64))
            handles.append(pipeline.add_request(next(numbers), ids, config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
        return sum(len(one.generated_ids) for handle in handles for one in handle.read_all())

    return answer


if __name__ == "__main__":
    args = arguments(__doc__ or "")
    model = exported(args.model)
    report(
        "OpenVINO GenAI, continuous batching" + (", prefix caching" if args.prefix_caching else ""),
        ["openvino", "openvino-genai"],
        args.work,
        lambda: load(model, args.prefix_caching),
    )
