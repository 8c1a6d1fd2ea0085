"""What was found out of a job before it runs, as data, as a text table and as HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from daskllm import markup
from daskllm.graph import Plan

__all__ = ["Explanation", "duration"]


@dataclass(frozen=True)
class Explanation:
    """What a job would take. Numbers with a fraction are estimates from the rows that were looked at.

    Attributes:
        model: its path.
        kind: what is asked: "generate", "chat", "score" or "embed".
        rows, partitions: of the table.
        looked_at, partitions_looked_at: rows that were read, and of how many partitions.
        counted: rows whose prompts were made and counted.
        prompt_tokens, prompt_tokens_error: tokens of all prompts, and how far off in 19 of 20 samples.
        longest_prompt: tokens of the longest one that was counted.
        failed, reasons: rows that cannot be answered, and why, a few.
        most_output_tokens: what ``max_tokens`` allows.
        output_tokens: what is expected from the answers to the rows that were tried; None where none was.
        remembered: rows whose answers are kept from before.
        duplicates: of the rows looked at, those that are like an earlier one.
        computed: rows that the model would really answer: not those that fail, are remembered, or are like
            another of their partition; of any partition, where answers are kept.
        common_prefix: tokens that all counted prompts begin with.
        engines: that would answer.
        tried: rows that the model really answered to tell the time.
        seconds: what the job would take; None where nothing was tried.
        plan: which layers are where; None where that cannot be told from here.

    Example:
        >>> import daskllm
        >>> from daskllm import demo
        >>> llm = daskllm.load(demo.model_path())
        >>> found = demo.table().llm.explain(llm, "prompt", "chat", seconds=0)
        >>> print(str(found).splitlines()[1])
        rows             200 in 1 partitions
        >>> found.to_dict()["duplicates"]
        0
    """

    model: str
    kind: str
    rows: int
    partitions: int
    looked_at: int
    partitions_looked_at: int
    counted: int
    prompt_tokens: float
    prompt_tokens_error: float
    longest_prompt: int
    failed: float
    reasons: tuple[str, ...]
    most_output_tokens: float
    output_tokens: float | None
    remembered: float
    duplicates: float
    computed: float
    common_prefix: int
    engines: int
    tried: int
    seconds: float | None
    plan: Plan | None

    @property
    def stages(self) -> int:
        """Parts that a copy of the model is cut into."""
        return max((len(r.stages) for r in self.plan.replicas), default=1) if self.plan is not None else 1

    @property
    def memory(self) -> float | None:
        """Bytes on the worker that needs most, weights and KV cache."""
        if self.plan is None:
            return None
        return max(stage.memory.total for replica in self.plan.replicas for stage in replica.stages)

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON; numbers of rows and tokens are rounded."""
        out: dict[str, Any] = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name != "plan"
        }
        for name, value in out.items():
            if isinstance(value, float) and name != "seconds":
                out[name] = round(value)
        seconds = None if self.seconds is None else round(self.seconds, 3)
        memory = None if self.memory is None else round(self.memory)
        return out | {
            "reasons": list(self.reasons),
            "seconds": seconds,
            "stages": self.stages,
            "memory": memory,
        }

    def _lines(self) -> list[tuple[str, str]]:
        sampled = self.counted < self.rows
        about = f"± {self.prompt_tokens_error:,.0f}, " if self.prompt_tokens_error >= 0.5 else ""
        mean = self.prompt_tokens / max(1.0, self.rows - self.failed)
        each = f"; mean {mean:,.1f}, longest {self.longest_prompt:,}"
        where = f"{self.counted:,} counted in {self.partitions_looked_at:,} partitions"
        where = where if sampled else "all counted"
        failed = f"{self.failed:,.0f}" + (f": {'; '.join(self.reasons)}" if self.reasons else "")
        lines = [
            ("model", self.model),
            ("rows", f"{self.rows:,} in {self.partitions:,} partitions"),
            ("prompt tokens", f"{self.prompt_tokens:,.0f} ({about}{where}){each}"),
            ("output tokens", self._output()),
            ("rows that fail", failed),
            ("rows remembered", f"{self.remembered:,.0f}"),
            ("shared", self._shared()),
            ("rows computed", f"{self.computed:,.0f}"),
            ("plan", f"{self.engines:,} engine(s) of {self.stages} stage(s)"),
        ]  # fmt: skip
        if self.memory is not None:
            lines.append(("memory", f"{self.memory / 2**20:,.0f} MiB on a worker, weights and KV cache"))
        time = "unknown: no row was tried" if self.seconds is None else duration(self.seconds)
        if self.tried:
            time += f", from {self.tried:,} rows tried"
        return [*lines, ("time", time)]

    def _shared(self) -> str:
        alike = f"{self.duplicates:,.0f} of {self.looked_at:,} rows looked at are like an earlier one"
        return f"{alike}; all prompts begin with the same {self.common_prefix:,} tokens"

    def _output(self) -> str:
        if self.kind in ("score", "embed"):
            return "none"
        most = f"at most {self.most_output_tokens:,.0f}"
        if self.output_tokens is None:
            return most
        mean = self.output_tokens / max(1.0, self.rows - self.failed)
        return f"{self.output_tokens:,.0f} expected, mean {mean:,.1f}; {most}"

    def __str__(self) -> str:
        lines = self._lines()
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)

    def _repr_html_(self) -> str:
        return markup.facts(self._lines())

    __repr__ = __str__


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(0.25), duration(75), duration(7322), duration(200_000)
    ('0.2 s', '1 min 15 s', '2 h 2 min', '2 d 7 h')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, smaller, per in ((86400, "d", "h", 3600), (3600, "h", "min", 60), (60, "min", "s", 1)):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // per} {smaller}"
    return f"{whole} s"
