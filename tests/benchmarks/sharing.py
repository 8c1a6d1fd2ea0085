"""A table of which rows are alike and all begin alike: tokens asked for, tokens computed, and the time saved.

    python tests/benchmarks/sharing.py [--rows 1000] [--duplicates 0.3] [--prefix 200] [--out 16]

The rows stand behind a template of so many tokens, and a share of them is there before. The same rows go
through the table call, and one by one, without anything shared, through the session; the answers must be the
same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
from inputs import cpu

import daskllm
from daskllm import demo
from daskllm.session import Session
from daskllm.types import SamplingParams

WORDS = [
    "the",
    "a",
    "two",
    "red",
    "old",
    "new",
    "cat",
    "dog",
    "house",
    "river",
    "goes",
    "comes",
    "sees",
    "says",
]


def template(session: Session, tokens: int, draw: Random) -> str:
    """A text of so many tokens, give or take one."""
    text = ""
    while len(session.encode([text + " {text}"], SamplingParams())[0].ids) < tokens:
        text += f" {draw.choice(WORDS)}"
    return text.strip() + " {text}"


def rows(count: int, duplicates: float, draw: Random) -> list[str]:
    """Short texts, of which a share repeats others, anywhere in the table."""
    fresh = count - round(duplicates * count)
    texts = [f"{' '.join(draw.choices(WORDS, k=draw.randrange(3, 12)))} {i}" for i in range(fresh)]
    texts += draw.choices(texts, k=count - fresh)
    draw.shuffle(texts)
    return texts


def counted(session: Session, ask: Any) -> dict[str, Any]:
    """Answers, and what they took."""
    session.engine.batcher.pool.forget()
    before = session.metrics.totals()
    begun = time.perf_counter()
    answers = ask()
    seconds = time.perf_counter() - begun
    after = session.metrics.totals()
    took = {
        name: int(after[name] - before[name]) for name in ("prefill_tokens", "decode_tokens", "reused_tokens")
    }
    return {"seconds": round(seconds, 2), **took, "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (the bundled model)")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--duplicates", type=float, default=0.3, help="share of rows that are there before")
    parser.add_argument("--prefix", type=int, default=200, help="tokens of the template")
    parser.add_argument("--out", type=int, default=16, help="tokens of every answer")
    args = parser.parse_args()
    draw = Random(0)
    llm = daskllm.load(args.model or demo.model_path(), answers=None)
    session = llm.session()
    prompt = template(session, args.prefix, draw)
    table = pd.DataFrame({"text": rows(args.rows, args.duplicates, draw)})
    sampling = {"max_tokens": args.out, "ignore_eos": True}
    whole = [prompt.replace("{text}", text) for text in table["text"]]
    asked = sum(len(one.ids) for one in session.encode(whole, SamplingParams()))
    session.generate(whole[:64], SamplingParams.of(sampling))  # what is slow once
    shared = counted(session, lambda: table.llm.generate(llm, prompt, **sampling)["generated"].tolist())
    session.engine.batcher.reuse = False
    alone = counted(
        session, lambda: [s[0].text for s in session.generate(whole, SamplingParams.of(sampling))]
    )
    llm.close()
    same = shared.pop("answers") == alone.pop("answers")
    result = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu(),
        "rows": args.rows,
        "different_rows": table["text"].nunique(),
        "template_tokens": args.prefix,
        "tokens_asked": asked + args.rows * args.out,
        "tokens_computed": shared["prefill_tokens"] + shared["decode_tokens"],
        "tokens_computed_alone": alone["prefill_tokens"] + alone["decode_tokens"],
        "seconds_saved": round(alone["seconds"] - shared["seconds"], 2),
        "speedup": round(alone["seconds"] / shared["seconds"], 2),
        "shared": shared,
        "alone": alone,
        "same_answers": same,
    }
    print(json.dumps(result))
    sys.exit(not same)


if __name__ == "__main__":
    main()
