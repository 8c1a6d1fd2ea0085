"""Rows that begin alike, with the blocks of their prefix shared and without, as one JSON object.

    python tests/benchmarks/shared_prefix.py [--model DIR] [--rows 256] [--prefix 256] [--out N] [--rounds 1]

The same rows in the same process, in turns; the tokens must be the same. The bound is what the run without
sharing says of itself: the price of a prompt token, fitted to its steps, times the tokens that need not be
computed, taken off its seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from inputs import INPUTS, cpu, make_model, make_work
from scipy.optimize import nnls

import daskllm
from daskllm.bench import WorkRow, read_work, without_drafts
from daskllm.session import Session


def answer(session: Session, work: list[WorkRow], reuse: bool) -> dict[str, Any]:
    """Generate the rows with nothing kept from before; the tokens, and what was counted."""
    batcher, metrics = session.engine.batcher, session.metrics
    batcher.reuse = reuse
    batcher.pool.forget()
    before, steps = metrics.totals(), metrics.steps
    begun = time.perf_counter()
    answers = session.generate([row.prompt for row in work], [row.sampling for row in work])
    seconds = time.perf_counter() - begun
    counted = {k: int(v - before[k]) for k, v in metrics.totals().items() if k.endswith("_tokens")}
    steps = metrics.steps - steps
    assert steps <= len(metrics.history), "more steps than are remembered: take fewer rows"
    return {
        "tokens": [one.token_ids for [one] in answers],
        "seconds": seconds,
        "steps": list(metrics.history)[-steps:],
        **counted,
    }


def bound(without: dict[str, Any], needless: int) -> float:
    """Seconds of the run without sharing, less what its needless prompt tokens cost."""
    steps = without["steps"]
    terms = np.array([[1.0, s.prefill_tokens, s.decode_tokens] for s in steps])
    (_, price, _), _ = nnls(terms, np.array([s.seconds for s in steps]))
    return float(without["seconds"] - price * needless)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (a 135M Llama of random weights)")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prefix", type=int, default=256)
    parser.add_argument("--out", type=int, help="tokens of each row (skewed: 4 to 256)")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    file = INPUTS / f"work-{args.rows}-0-{args.prefix}-{args.out}.json"
    work = read_work(make_work(file, args.rows, prefix=args.prefix, out=args.out))
    llm = daskllm.load(args.model or make_model(INPUTS / "llama-135M"), answers=None)
    session = llm.session()
    without_drafts(session)
    try:
        answer(session, [WorkRow(row.prompt[::-1], row.out) for row in work[:4]], False)
        rounds = []
        for i in range(args.rounds):
            without, shared = answer(session, work, False), answer(session, work, True)
            assert without["tokens"] == shared["tokens"]
            least = bound(without, shared["reused_tokens"])
            rounds.append(
                {
                    "without_s": round(without["seconds"], 2),
                    "with_s": round(shared["seconds"], 2),
                    "bound_s": round(least, 2),
                    "ratio": round(without["seconds"] / shared["seconds"], 2),
                    "of_bound": round(least / shared["seconds"], 3),
                }
            )
            print(f"round {i + 1}: {rounds[-1]}", file=sys.stderr)
    finally:
        llm.close()
    result = {
        "cpu": cpu(),
        "rows": args.rows,
        "prefix": args.prefix,
        "out_tokens": sum(row.out for row in work),
        "prompt_tokens": shared["prompt_tokens"],
        "reused_tokens": shared["reused_tokens"],
        "computed_tokens": shared["prefill_tokens"],
        "ratio": median(one["ratio"] for one in rounds),
        "of_bound": median(one["of_bound"] for one in rounds),
        "rounds": rounds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
