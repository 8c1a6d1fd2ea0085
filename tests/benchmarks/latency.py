"""One row alone: tokens per second, and the share of the memory's bandwidth, as one JSON object.

    python tests/benchmarks/latency.py [--model DIR] [--tokens 128] [--rounds 5]

A token of a row alone needs every weight of the layers and the head once, and the keys and values before it.
The bytes of the steps that were run, over their seconds, are set against what this machine reads at most,
measured here. Tokens are not guessed ahead: `speculation.py` measures that.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from statistics import median

from inputs import INPUTS, VOCABULARY, cpu, make_model

from daskllm.bench import machine_rates, without_drafts
from daskllm.engine.kvcache import bytes_per_block
from daskllm.engine.sizes import BLOCK_SIZE
from daskllm.llm import load
from daskllm.session import Session
from daskllm.types import SamplingParams

PROMPT_TOKENS = 16


def once(session: Session, tokens: int, draw: Random) -> tuple[int, float]:
    """Steps and seconds of so many tokens after a new prompt and its first token."""
    prompt = [draw.randrange(1, VOCABULARY) for _ in range(PROMPT_TOKENS)]
    before = session.metrics.steps
    session.generate([prompt], SamplingParams(max_tokens=tokens + 1, ignore_eos=True))
    steps = session.metrics.steps - before
    records = list(session.metrics.history)[-steps:]
    return steps - 1, records[-1].time - records[0].time


def step_bytes(session: Session, tokens: int) -> float:
    """Bytes that a step reads at least, on the mean: weights, and keys and values of half of the tokens."""
    config, keys = session.config, session.engine.runner.cache.keys[0]
    kv = bytes_per_block(config.num_layers, config.num_kv_heads, config.head_dim, keys.element_size())
    weights = sum(size for layer, size in session.model.nbytes().items() if layer != "embed")
    return weights + kv / BLOCK_SIZE * (PROMPT_TOKENS + tokens / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (a 135M Llama of random weights)")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = args.model or make_model(INPUTS / "llama-135M")
    llm = load(str(model), answers=None)
    session, draw = llm.session(), Random(0)
    without_drafts(session)
    once(session, 8, draw)
    rounds = [once(session, args.tokens, draw) for _ in range(args.rounds)]
    size, dtype = step_bytes(session, args.tokens), session.model.torch_dtype
    llm.close()
    with ThreadPoolExecutor(1) as thread:
        bandwidth = thread.submit(machine_rates, dtype).result().bandwidth
    read = median(steps * size / seconds for steps, seconds in rounds)
    result = {
        "cpu": cpu(),
        "model": model.name,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": args.tokens,
        "tokens_per_s": round(median(args.tokens / seconds for _, seconds in rounds), 1),
        "read_gb_per_s": round(read / 1e9, 1),
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "bandwidth_share": round(read / bandwidth, 3),
        "rounds": [round(args.tokens / seconds, 1) for _, seconds in rounds],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
