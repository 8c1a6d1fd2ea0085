"""What guessed tokens gain where few rows run together, as one JSON object.

    python tests/benchmarks/speculation.py [--model DIR] [--rows 8] [--tokens 64] [--rounds 3]

The bundled model answers rows of its table one by one and by few together, in three engines in turns: one
that never guesses, one that guesses where its counters say that it pays, and one that guesses wrong,
to show what finding that out costs. Another model gets random prompts: one of random weights says the same
again and again, so that its gain is the most there is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from inputs import INPUTS, VOCABULARY, cpu, make_model

from daskllm.demo import model_path, tasks
from daskllm.engine.lookup import Lookup
from daskllm.session import Session
from daskllm.types import ModelSpec, Prompt, SamplingParams

WAYS = ("off", "on", "wrong")


class Wrong(Lookup):
    """Guesses whenever there is something to guess, and never right: no answer has these tokens."""

    __slots__ = ()

    def find(self, tokens: Any, count: int) -> list[int]:
        return [3 for _ in super().find(tokens, count) or range(count)]


def opened(model: Path, way: str) -> Session:
    session = Session.open(ModelSpec(path=str(model), device="cpu"))
    if way == "off":
        session.engine.batcher.draft = None
    if way == "wrong":
        draft = session.engine.batcher.draft
        assert draft is not None

        def wrongly(sequence: Any, running: int, most: int) -> Any:
            sequence.lookup = sequence.lookup or Wrong()
            return draft(sequence, running, most)

        session.engine.batcher.draft = wrongly
    return session


def once(session: Session, prompts: list[Prompt], params: SamplingParams, batch: int) -> dict[str, float]:
    """All prompts, so many at a time."""
    metrics = session.metrics
    before, begun = metrics.totals(), time.perf_counter()
    for start in range(0, len(prompts), batch):
        session.generate(prompts[start : start + batch], params)
    seconds, after = time.perf_counter() - begun, metrics.totals()
    made = {name: after[name] - before[name] for name in after}
    return {
        "tokens_per_s": made["output_tokens"] / seconds,
        "tokens_per_step": made["output_tokens"] / made["steps"],
        "drafted": made["drafted_tokens"],
        "accepted": made["accepted_tokens"],
    }


def compared(model: Path, prompts: list[Prompt], params: SamplingParams, rounds: int) -> dict[str, Any]:
    sessions = {way: opened(model, way) for way in WAYS}
    found: dict[str, Any] = {}
    for batch in (1, 4, 8, 16):
        taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(rounds + 1):  # the first warms up
            for way, session in sessions.items():
                one = once(session, prompts, params, batch)
                if number:
                    taken[way].append(one)
        found[f"batch {batch}"] = {
            way: {
                **{name: round(median(one[name] for one in each), 2) for name in each[0]},
                "ratio": round(
                    median(
                        one["tokens_per_s"] / off["tokens_per_s"]
                        for one, off in zip(each, taken["off"], strict=True)
                    ),
                    3,
                ),
            }
            for way, each in taken.items()
        }
        print(f"{model.name}, {batch} together: {found[f'batch {batch}']}", file=sys.stderr)
    for session in sessions.values():
        session.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a second model (a 135M Llama of random weights)")
    parser.add_argument("--rows", type=int, default=8, help="of the second; ten times as many of the bundled")
    parser.add_argument("--tokens", type=int, default=64, help="that the second model makes of each row")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows: list[Prompt] = [
        [{"role": "user", "content": row.prompt}]
        for row in tasks.sample(10 * args.rows, seed=2, of_held_out=True)
    ]
    draw = Random(0)
    random: list[Prompt] = [[draw.randrange(1, VOCABULARY) for _ in range(32)] for _ in range(args.rows)]
    exact = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    second = args.model or make_model(INPUTS / "llama-135M")
    result = {
        "cpu": cpu(),
        "bundled": compared(model_path(), rows, SamplingParams(max_tokens=48), args.rounds),
        second.name: compared(second, random, exact, args.rounds),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
