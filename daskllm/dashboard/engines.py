"""What one worker's engines and stages are doing, as few plain numbers: what it tells the scheduler.

The numbers ride on Dask's own heartbeats, twice a second or less often; a step or a token costs nothing more.
It owns how an open model becomes these numbers. It refuses to know who looks at them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from daskllm.runtime.process import open_sessions
from daskllm.runtime.resident import open_models, resident_bytes

if TYPE_CHECKING:
    from distributed import Worker

    from daskllm.session import Session
    from daskllm.types import ModelSpec

__all__ = ["PHASES", "EngineFigures", "engines_of", "read", "span_of", "told"]

PHASES = ("prefill", "decode", "stage")
"""What an engine's time goes to besides waiting; "stage" is that of a stage that is not the last."""
_NUMBERED = re.compile(r"(.*?)\.?(\d+)")
_STAGES = "daskllm-stages"


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """One model, or one stage of one, on one worker.

    Attributes:
        model: the last part of its path or Hub id.
        stage: "2/3", or "" where the worker holds the whole model.
        layers: which, in words; ``layer_count`` how many.
        resident_bytes: of their weights.
        running, waiting: sequences in the batch and behind it; ``room`` is how many the batch takes.
        kv_used, kv_blocks: KV blocks in use, and that there are.
        prompt_tokens, output_tokens: computed and generated so far, those of rows under way too.
        prefill_seconds, decode_seconds, stage_seconds: busy seconds since then, see `PHASES`.
        idle_seconds: between two steps.
        reused_tokens: of prompts, found instead of computed.
    """

    model: str
    stage: str = ""
    layers: str = ""
    layer_count: int = 0
    resident_bytes: int = 0
    running: int = 0
    waiting: int = 0
    room: int = 0
    kv_used: int = 0
    kv_blocks: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    stage_seconds: float = 0.0
    idle_seconds: float = 0.0
    steps: int = 0
    preemptions: int = 0
    reused_tokens: int = 0


def engines_of(worker: Worker) -> list[EngineFigures]:
    """All that a worker has open; to be called on its event loop, and quick."""
    parts = worker.extensions[_STAGES].parts() if _STAGES in worker.extensions else {}
    found = []
    for spec, (number, session, times) in parts.items():
        stage = f"{number + 1}/{len(spec.stages)}" if len(spec.stages) > 1 else ""
        done: dict[str, Any] = {}
        if times is not None:
            done = {"stage_seconds": times.busy, "idle_seconds": times.waiting, "steps": times.passes}
        found.append(_figures(spec, session, stage, done))
    if not _first_here(worker):
        return found
    sessions = {spec: session for spec, session in open_sessions().items() if not spec.chains}
    others = [spec for spec in open_models() if spec not in parts and spec not in sessions]
    found += [_figures(spec, session) for spec, session in sessions.items()]
    return found + [_figures(spec, None) for spec in others if resident_bytes(spec)]


def _first_here(worker: Worker) -> bool:
    """Whether this worker speaks for its process: several may share one, and with it its engines."""
    from distributed import Worker

    return worker.id == min(
        other.id for other in [*Worker._instances, worker] if other.status.name != "closed"
    )


def _figures(
    spec: ModelSpec, session: Session | None, stage: str = "", known: Mapping[str, Any] | None = None
) -> EngineFigures:
    layers = resident_bytes(spec)
    given: dict[str, Any] = {
        "model": PurePath(spec.path).name or spec.path,
        "stage": stage,
        "layers": span_of(layers),
        "layer_count": len(layers),
        "resident_bytes": sum(layers.values()),
        **(known or {}),
    }
    if session is not None:
        metrics = session.metrics
        given |= {
            "prompt_tokens": metrics.prefill_tokens,
            "output_tokens": metrics.generated_tokens,
            "prefill_seconds": metrics.prefill_seconds,
            "decode_seconds": metrics.decode_seconds,
            "idle_seconds": max(0.0, metrics.waiting_seconds),
            "steps": metrics.steps,
            "preemptions": metrics.preemptions,
            "reused_tokens": metrics.reused_tokens,
        }
        engine = getattr(session, "engine", None)
        if engine is not None:
            # Plain sizes that the engine's thread changes meanwhile; each is read in one piece.
            batcher = engine.batcher
            given |= {
                "running": len(batcher.running),
                "waiting": len(batcher.waiting),
                "room": batcher.max_sequences,
                "kv_used": batcher.pool.used,
                "kv_blocks": batcher.pool.size,
            }
    return EngineFigures(**given)


def span_of(layers: Iterable[str]) -> str:
    """Layers in few words, in the order in which they are given.

    >>> span_of(["embed", "layers.0", "layers.1", "layers.2", "head"])
    'embed, layers 0–2, head'
    """
    words: list[str] = []
    name, first, last = "", 0, -1
    for layer in layers:
        match = _NUMBERED.fullmatch(layer)
        if match is None:
            words.append(layer)
            name = ""
        elif name == match[1] and int(match[2]) == last + 1:
            last += 1
            words[-1] = f"{name} {first}–{last}"
        else:
            name, first, last = match[1], int(match[2]), int(match[2])
            words.append(f"{name} {first}")
    return ", ".join(words)


def told(worker: Worker) -> dict[str, Any]:
    """What goes with a heartbeat: ``{"time": seconds of the epoch, "engines": [fields that are not 0]}``."""
    engines = [{k: v for k, v in asdict(one).items() if v} for one in engines_of(worker)]
    return {"time": time.time(), "engines": engines}


def read(message: Mapping[str, Any]) -> list[EngineFigures]:
    """The engines of a heartbeat; what another release of daskllm tells besides is left out."""
    known = {one.name for one in fields(EngineFigures)}
    return [EngineFigures(**{k: v for k, v in one.items() if k in known}) for one in message["engines"]]
