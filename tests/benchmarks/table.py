"""The README's table of a comparison, from its results file; it runs nothing.

A line is a case: a model's shape, a number of rows, a seed of their lengths, and how many tokens all prompts
begin with. Speeds are medians over all rounds of an engine; a ratio is the median over the rounds in which
both ran, since speeds move from round to round and both move together. Where daskllm is behind is said below
the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
NAMES = {
    "daskllm": "daskllm",
    "openvino": "OpenVINO GenAI",
    "vllm": "vLLM on CPU",
    "hf": "transformers",
}

Run = dict[str, Any]


def write_table(text: str, results: dict[str, Any]) -> str:
    """A text with what is between the two markers made anew.

    Raises:
        ValueError: the text has not both markers, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the text must have {BEGIN} and then {END}, once each")
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def table(results: dict[str, Any]) -> str:
    """Machine and versions, the table, and where daskllm is behind."""
    runs: list[Run] = results["runs"]
    engines = [name for name in NAMES if any(run["engine"] == name for run in runs)]
    cases = list(dict.fromkeys(_case(run) for run in runs))
    head = ["model", "rows", "lengths", *(NAMES[name] for name in engines)]
    lines = [_cells(head), _cells(["---"] * len(head))]
    for case in cases:
        lines.append(_cells([*case[:2], _lengths(case), *_speeds(_of(runs, case), engines)]))
    loads = [f"{NAMES[name]} {_load(runs, name):.1f} s" for name in engines]
    return "\n".join(
        [
            f"{results['date']}, {results['cores']} cores of {results['cpu']}; {_versions(runs)}.",
            "Output tokens per second, medians of rounds in turns; in brackets daskllm's speed to theirs.",
            "",
            *lines,
            "",
            f"Loading, medians: {', '.join(loads)}.",
            _behind(runs, cases, engines),
        ]
    )


def ratio(runs: Sequence[Run], engine: str) -> float | None:
    """daskllm's speed to an engine's: the median over the rounds that both were in; None where none is.

    >>> done = [{"engine": e, "sitting": 0, "round": i, "out_tokens_per_s": s}
    ...         for i, speeds in enumerate([(20, 10), (30, 10), (30, 20)])
    ...         for e, s in zip(("daskllm", "hf"), speeds)]
    >>> ratio(done, "hf")
    2.0
    """
    ours, theirs = (
        {(r["sitting"], r["round"]): r["out_tokens_per_s"] for r in runs if r["engine"] == name}
        for name in ("daskllm", engine)
    )
    both = ours.keys() & theirs.keys()
    return median(ours[turn] / theirs[turn] for turn in both) if both else None


def _case(run: Run) -> tuple[Any, ...]:
    return run["shape"], run["rows"], run["seed"], run.get("prefix", 0)


def _lengths(case: tuple[Any, ...]) -> str:
    return f"seed {case[2]}" + (f", behind {case[3]} common tokens" if case[3] else "")


def _of(runs: Sequence[Run], case: tuple[Any, ...]) -> list[Run]:
    return [run for run in runs if _case(run) == case]


def _speeds(runs: Sequence[Run], engines: Sequence[str]) -> list[str]:
    cells = []
    for engine in engines:
        speeds = [run["out_tokens_per_s"] for run in runs if run["engine"] == engine]
        found = None if engine == "daskllm" else ratio(runs, engine)
        cell = f"{median(speeds):.0f}" if speeds else "–"
        cells.append(cell if found is None else f"{cell} ({found:.2f})")
    return cells


def _load(runs: Sequence[Run], engine: str) -> float:
    return median(run["load_s"] for run in runs if run["engine"] == engine)


def _versions(runs: Sequence[Run]) -> str:
    """Of every engine's packages, in its latest run."""
    found: dict[str, str] = {}
    for run in runs:
        kept: Callable[[str], bool] = {"daskllm": {"daskllm", "torch"}.__contains__}.get(
            run["engine"], lambda package: package != "torch"
        )
        found |= {package: number for package, number in run["versions"].items() if kept(package)}
    return ", ".join(f"{package} {number}" for package, number in found.items())


def _behind(runs: Sequence[Run], cases: Sequence[tuple[Any, ...]], engines: Sequence[str]) -> str:
    """Where daskllm is slower, in speed or in loading."""
    found = []
    for engine in engines:
        if engine == "daskllm":
            continue
        for case in cases:
            times = ratio(_of(runs, case), engine)
            if times is not None and times < 1:
                found.append(f"{NAMES[engine]} at {case[0]}, {case[1]} rows, {_lengths(case)} ({times:.2f})")
        if _load(runs, engine) < _load(runs, "daskllm"):
            found.append(f"loading beside {NAMES[engine]}")
    return f"Where daskllm is behind: {'; '.join(found) or 'nowhere in this table'}."


def _cells(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
