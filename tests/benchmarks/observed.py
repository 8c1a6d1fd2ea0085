"""What it costs to be watched: one JSON object.

    python tests/benchmarks/observed.py [--model DIR] [--work FILE] [--rounds 5] [--tokens 48]

Two clusters of one worker stand side by side: one as `daskllm.load` leaves it, with a viewer of the page LLM
and a scrape of both ``/metrics`` every second; the other without any of it. The same rows are answered by one
and by the other in turns, in the opposite order each round, and the medians are compared. The viewer stands
for a browser and a Prometheus on other machines: a process of the lowest priority, there before the rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from bokeh.client import pull_session
from distributed import Client
from inputs import INPUTS, cpu, make_model, make_work

import daskllm


@contextmanager
def opened(model: Path, observed: bool) -> Iterator[tuple[daskllm.LLM, list[str]]]:
    """A model on a worker of its own, and the addresses that are watched."""
    with ExitStack() as stack:
        cluster = stack.enter_context(daskllm.local_cluster(1))
        client = stack.enter_context(Client(cluster, set_as_default=False))
        if not observed:
            stack.enter_context(patch("daskllm.dashboard.install"))
        llm = daskllm.load(model, client=client, answers=None)
        workers = client.scheduler_info()["workers"].values()
        pages = [str(cluster.dashboard_link).removesuffix("/status")]
        pages += [f"http://{worker['host']}:{worker['services']['dashboard']}" for worker in workers]
        yield llm, pages if observed else []


def view(pages: list[str], opened: Any, over: Any) -> None:
    """Look at the page and take the metrics, every second."""
    os.nice(19)
    session = pull_session(url=f"{pages[0]}/llm")
    opened.set()
    while not over.wait(1.0):
        session.force_roundtrip()  # takes what the page was sent meanwhile
        for page in pages:
            urllib.request.urlopen(f"{page}/metrics").read()
    session.close()


@contextmanager
def watched(pages: list[str]) -> Iterator[None]:
    """Have a viewer from before until after."""
    if not pages:
        yield
        return
    processes = multiprocessing.get_context("spawn")
    opened, over = processes.Event(), processes.Event()
    viewer = processes.Process(target=view, args=(pages, opened, over))
    viewer.start()
    if not opened.wait(60):
        raise RuntimeError("the page did not open")
    try:
        yield
    finally:
        over.set()
        viewer.join()


def speed(llm: daskllm.LLM, prompts: list[list[int]], tokens: int) -> float:
    """Output tokens per second of a run of all prompts."""
    begun = time.perf_counter()
    answers = llm.generate(prompts, max_tokens=tokens, ignore_eos=True)
    return sum(one.completion_tokens for one in answers) / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (a 135M Llama of random weights)")
    parser.add_argument("--work", type=Path, help="a work file, for its prompts (128 rows of skewed lengths)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="generated for each row")
    args = parser.parse_args()
    model = args.model or make_model(INPUTS / "llama-135M")
    work = args.work or make_work(INPUTS / "work-128.json", rows=128)
    prompts = [row["prompt"] for row in json.loads(work.read_text())]
    speeds: dict[str, list[float]] = {"observed": [], "bare": []}
    with opened(model, True) as observed, opened(model, False) as bare:
        both: dict[str, tuple[Any, list[str]]] = {"observed": observed, "bare": bare}
        for llm, _ in both.values():
            speed(llm, prompts[:64], 4)
        for number in range(args.rounds):
            for name in sorted(both, reverse=number % 2 == 1):
                llm, pages = both[name]
                with watched(pages):
                    speeds[name].append(speed(llm, prompts, args.tokens))
            print(f"round {number + 1}: { ({n: round(s[-1]) for n, s in speeds.items()}) }", file=sys.stderr)
    middle = {name: median(found) for name, found in speeds.items()}
    result = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu(),
        "rounds": args.rounds,
        "rows": len(prompts),
        "out_tokens_per_s": {name: round(value, 1) for name, value in middle.items()},
        "each": {name: [round(one, 1) for one in found] for name, found in speeds.items()},
        "observed / bare": round(middle["observed"] / middle["bare"], 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
