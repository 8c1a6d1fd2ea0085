"""What a job would take, before it runs: rows, tokens, memory, time; the model answers a few rows at most.

It owns where the sample comes from and what the whole is told from it. Counting is `sample`'s business, time
that of `trial`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dask
import dask.dataframe as dd
import pandas as pd
from dask.delayed import Delayed, delayed

from daskllm.graph import Plan, PlanError
from daskllm.jobs.explanation import Explanation
from daskllm.jobs.lengths import Lengths
from daskllm.jobs.sample import Sample, sample_of
from daskllm.jobs.trial import Trial, trial_of
from daskllm.runtime.call import Call
from daskllm.runtime.columns import labels_of
from daskllm.runtime.slices import PLACE
from daskllm.types import ModelError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["explain"]

SAMPLE_ROWS = 1024
SAMPLE_PARTITIONS = 8
_ENGINES = 4
"""On which rows are tried, all at once, so that those that share a machine are in each other's way."""
_FAN_IN = 16


@dataclass(frozen=True)
class _Where:
    client: Client | None

    def compute(self, parts: Sequence[Delayed]) -> list[Any]:
        if self.client is not None:
            return list(self.client.gather(self.client.compute(list(parts))))
        return list(dask.compute(*parts))


def explain(
    table: pd.DataFrame | dd.DataFrame,
    call: Call,
    client: Client | None = None,
    *,
    full: bool = False,
    seconds: float = 10.0,
) -> Explanation:
    """What ``call`` over ``table`` would take.

    Args:
        table: with `PLACE` where the call draws by that.
        client: whose workers would answer; they read the sample too.
        full: count every row's prompt, instead of about 1,024 from up to 8 partitions.
        seconds: how long some of the sample's rows may run, on up to four engines at once; 0: none runs, and
            nothing is said of time and of how long answers are.

    Raises:
        ValueError: ``seconds`` is negative.

    Example:
        >>> import daskllm
        >>> from daskllm import demo
        >>> from daskllm.types import SamplingParams
        >>> llm = daskllm.load(demo.model_path())
        >>> call = Call(spec=llm.spec, kind="embed", labels=("prompt",), params=SamplingParams())
        >>> explain(demo.table(), call, seconds=0).rows
        200
    """
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not seconds >= 0:
        raise ValueError(f"seconds must be a number of at least 0, not {seconds!r}")
    where = _Where(client)
    rows, partitions, sample, looked = _sampled(table, call, where, full)
    plan = _plan(call, client)
    engines = len(call.spec.chains) or (1 if client is None else max(1, len(client.nthreads())))
    trials = _trials(sample, call, client, engines, seconds) if seconds and sample.trial else []
    scale = rows / sample.rows if sample.rows else 0.0
    alone = sample.rows if call.by_place else min(float(sample.rows), sample.distinct.count)
    # What is alike in different partitions is found by what is kept of the first.
    asked = alone if call.by_place or call.answers is not None else sample.apart
    out = _output_tokens(call, trials)
    good = rows - scale * sample.failed
    to_do = max(0.0, good - scale * sample.remembered) * asked / max(1, sample.rows)
    prompt_tokens = scale * sample.prompt_tokens
    share = to_do / max(1.0, good)
    return Explanation(
        model=str(call.spec.path),
        kind=call.kind,
        rows=rows,
        partitions=partitions,
        looked_at=sample.rows,
        partitions_looked_at=looked,
        counted=sample.counted,
        prompt_tokens=prompt_tokens,
        prompt_tokens_error=2 * scale * sample.variance**0.5 if not full else 0.0,
        longest_prompt=sample.longest,
        failed=scale * sample.failed,
        reasons=sample.reasons,
        most_output_tokens=good * call.params.max_tokens * call.params.n if call.generates else 0.0,
        output_tokens=None if out is None else out * call.params.n * good,
        remembered=scale * sample.remembered,
        duplicates=sample.rows - alone,
        computed=to_do,
        common_prefix=len(sample.prefix or ()),
        engines=engines,
        tried=sum(trial.rows for trial in trials),
        seconds=_seconds(trials, engines, to_do, share * prompt_tokens, (out or 0.0) * call.params.n * to_do),
        plan=plan,
    )


def _sampled(
    table: pd.DataFrame | dd.DataFrame, call: Call, where: _Where, full: bool
) -> tuple[int, int, Sample, int]:
    """Rows, partitions, what was looked at, and of how many partitions that is."""
    places = [label for label in labels_of([PLACE], table.columns) if label in table.columns]
    needed = table[[*call.labels, *places]]
    if isinstance(needed, pd.DataFrame):
        return len(needed), 1, sample_of(needed, call, None if full else SAMPLE_ROWS), 1
    count = needed.npartitions
    chosen = (
        range(count) if full else sorted(random.Random(0).sample(range(count), min(count, SAMPLE_PARTITIONS)))
    )
    each = None if full else -(-SAMPLE_ROWS // len(chosen))
    parts = needed.partitions[list(chosen)].to_delayed() if len(chosen) < count else needed.to_delayed()
    samples = [delayed(sample_of)(part, call, each, number) for number, part in enumerate(parts)]
    while len(samples) > 1:
        samples = [delayed(_add)(list(some)) for some in _batches(samples)]
    (sample,) = where.compute(samples)
    return (sample.rows if full or len(chosen) == count else len(table)), count, sample, len(chosen)


def _batches(samples: Sequence[Delayed]) -> list[Sequence[Delayed]]:
    return [samples[start : start + _FAN_IN] for start in range(0, len(samples), _FAN_IN)]


def _add(samples: Sequence[Sample]) -> Sample:
    whole = samples[0]
    for sample in samples[1:]:
        whole += sample
    return whole


def _plan(call: Call, client: Client | None) -> Plan | None:
    """Which layers are where; None where the model's description cannot be read from here."""
    # Whoever imports the accessors must not import torch with them.
    from daskllm.runtime.facts import Facts
    from daskllm.runtime.placing import plan_of

    try:
        return plan_of(call.spec, Facts(call.spec).config, client)
    except (ModelError, PlanError):
        return None


def _trials(sample: Sample, call: Call, client: Client | None, engines: int, seconds: float) -> list[Trial]:
    """Rows tried on some engines at once, each with its own share of the sample."""
    if client is None:
        return [trial_of(sample.trial, call, seconds)]
    tried = min(engines, _ENGINES, len(sample.trial))
    workers = list(client.nthreads())[:tried]
    futures = [
        client.submit(
            trial_of,
            sample.trial[number::tried],
            call,
            seconds,
            # A copy in stages is chosen by how busy it is, whoever asks.
            workers=None if call.spec.chains else [workers[number]],
            key=f"explain-trial-{number}-{random.getrandbits(64):x}",
            pure=False,
        )
        for number in range(tried)
    ]
    try:
        return list(client.gather(futures))
    except BaseException:
        client.cancel(futures)
        raise


def _output_tokens(call: Call, trials: Sequence[Trial]) -> float | None:
    """What an answer is likely to have; None where nothing tells."""
    if not call.generates:
        return 0.0
    if call.params.ignore_eos and not call.params.stop:
        return float(call.params.max_tokens)
    ended: Counter[int] = Counter()
    for trial in trials:
        ended.update(trial.ended)
    under_way = [length for trial in trials for length in trial.under_way]
    return Lengths(ended, under_way, call.params.max_tokens).mean if ended else None


def _seconds(
    trials: Sequence[Trial], engines: int, rows: float, prompt_tokens: float, output_tokens: float
) -> float | None:
    """How long it takes all engines, those that were not tried being like those that were."""
    alone = [
        t.expected_seconds(rows / engines, prompt_tokens / engines, output_tokens / engines) for t in trials
    ]
    known = [seconds for seconds in alone if seconds]
    if not known:
        return 0.0 if trials and not rows else None
    return len(known) / sum(1 / seconds for seconds in known)
