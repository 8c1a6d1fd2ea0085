"""What eight bits cost in perplexity and gain in speed, as one JSON object.

    python tests/benchmarks/quantised.py [--stories DIR] [--model DIR] [--rows 1200] [--rounds 3]

Perplexity is the bundled model's on the answers of held-out rows that its generator makes, each after its
question; and, of a directory given as ``--stories``, on texts that it draws itself at float32. Speed is of 32
rows that run together, the engines in turns, and the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from inputs import INPUTS, VOCABULARY, cpu, make_model

import daskllm
from daskllm.demo import model_path, share_right, table, tasks

WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8 weights": {"dtype": "bfloat16", "quantize": "int8"},
    "int8 KV": {"dtype": "bfloat16", "kv_dtype": "int8"},
    "int8 weights and KV": {"dtype": "bfloat16", "quantize": "int8", "kv_dtype": "int8"},
}
BATCH, PROMPT, OUT = 32, 64, 128


def perplexity(llm: daskllm.LLM, texts: list[tuple[list[int], int]]) -> float:
    """Of the last so many tokens of each text."""
    scores = llm.score([ids for ids, _ in texts], tokens=True)
    counted = [one for score, (_, last) in zip(scores, texts, strict=True) for one in score[-last:]]
    return math.exp(-sum(counted) / len(counted))


def answers(count: int) -> list[tuple[list[int], int]]:
    """Held-out questions and answers as the bundled model's chats, and how many tokens the answers have."""
    tokenizer = daskllm.LLM(daskllm.types.ModelSpec(path=str(model_path()))).tokenizer
    texts = []
    for row in tasks.sample(count, seed=1, of_held_out=True):
        asked = [{"role": "user", "content": row.prompt}]
        whole = tokenizer.encode_chat(
            [*asked, {"role": "assistant", "content": row.answer}], add_generation_prompt=False
        )
        texts.append((whole, len(whole) - len(tokenizer.encode_chat(asked))))
    return texts


def stories(path: Path, count: int) -> list[tuple[list[int], int]]:
    """Texts drawn from the model itself at float32, without their first token."""
    llm = daskllm.load(path, dtype="float32", answers=None)
    begin = llm.tokenizer.encode("")
    begin = begin or [llm.config.bos_token_id]
    # Each of its own seed: equal rows of one call are one row.
    drawn = [llm.generate([begin], max_tokens=200, temperature=1.0, seed=i)[0] for i in range(count)]
    llm.close()
    return [([*begin, *one.token_ids], len(one.token_ids)) for one in drawn if one.token_ids]


def quality(path: Path, texts: list[tuple[list[int], int]], right: bool) -> dict[str, dict[str, float]]:
    """Perplexity in every way, and how far it is from bfloat16's; with ``right``, of the sample table too."""
    found: dict[str, dict[str, float]] = {}
    for name, options in WAYS.items():
        llm = daskllm.load(path, answers=None, **options)
        found[name] = {"perplexity": perplexity(llm, texts)}
        if right:
            frame = table()
            found[name]["right"] = share_right(frame.llm.chat(llm, "prompt", max_tokens=48))
        llm.close()
        print(f"{path}: {name}: {found[name]}", file=sys.stderr)
    for values in found.values():
        values["change"] = round(values["perplexity"] / found["bfloat16"]["perplexity"] - 1, 6)
    return found


def speeds(path: Path, rounds: int) -> dict[str, Any]:
    """Output tokens a second, prefill included."""
    ways = {name: options for name, options in WAYS.items() if name != "float32"}
    prompts = [[(7919 * row + 104729 * i) % VOCABULARY for i in range(PROMPT)] for row in range(BATCH)]
    opened = {name: daskllm.load(path, answers=None, **options) for name, options in ways.items()}
    for llm in opened.values():
        llm.generate(prompts, max_tokens=4, ignore_eos=True)
    taken: list[dict[str, float]] = []
    for number in range(rounds):
        seconds = {}
        for name, llm in opened.items():
            begun = time.perf_counter()
            llm.generate(prompts, max_tokens=OUT, ignore_eos=True)
            seconds[name] = time.perf_counter() - begun
        taken.append(seconds)
        speed = {name: round(BATCH * OUT / s, 1) for name, s in seconds.items()}
        print(f"round {number + 1}: {speed} tokens/s", file=sys.stderr)
    return {
        name: {
            "out_tokens_per_s": round(median(BATCH * OUT / one[name] for one in taken), 1),
            "ratio": round(median(one["bfloat16"] / one[name] for one in taken), 3),
            "weight_mb": round(sum(llm.residency()[""].values()) / 1e6, 1),
        }
        for name, llm in opened.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="for the speed (a 135M Llama of random weights)")
    parser.add_argument("--stories", type=Path, help="a model that draws texts, such as stories260K")
    parser.add_argument("--rows", type=int, default=1200, help="held-out rows of the bundled model")
    parser.add_argument("--rounds", type=int, default=3, help="of speed; 0 leaves it out")
    args = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu(),
        "bundled": quality(model_path(), answers(args.rows), True),
    }
    if args.stories:
        result["stories"] = quality(args.stories, stories(args.stories, args.rows // 10), False)
    if args.rounds:
        result["batch"] = BATCH
        result["speed"] = speeds(args.model or make_model(INPUTS / "llama-135M"), args.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
