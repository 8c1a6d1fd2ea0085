"""Where an engine's time goes: seconds, operations and bytes of each part of its steps.

`Profile` puts a stopwatch around what an engine holds (its runner's kernels, its batcher, its sampler) and
around a few of its own methods. An engine that nobody profiles holds the plain objects and pays nothing.
Seconds are exclusive: a part that calls another does not count the other's, so that the parts of a step sum
to the step. What the counting itself takes is a part of its own.

Bytes are the fewest that a part can move, each weight, key and value read once per call; operations are
those of the formula. Against a machine's `Rates` they give a lower bound of the time (the roofline of
Williams et al. 2009, https://doi.org/10.1145/1498765.1498785), and its share in the measured one.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch

from daskllm.engine.batch import Batch
from daskllm.engine.engine import Engine
from daskllm.engine.kernels.composed import Composed

__all__ = ["NOT_KERNELS", "PARTS", "Phase", "Profile", "Rates", "Work"]

LINEAR, ATTENTION, NORM, ROPE, ACTIVATION = "linear", "attention", "norm", "rope", "activation"
OTHER, EDGES, SAMPLING = "other kernels", "embedding and head", "sampling"
SCHEDULING, PYTHON, COUNTING = "scheduling", "python", "counting"
PARTS = (
    LINEAR, ATTENTION, NORM, ROPE, ACTIVATION, OTHER, EDGES, SAMPLING, SCHEDULING, PYTHON, COUNTING,
)  # fmt: skip
"""The parts of a step. "python" is what no other part covers; "counting" is the profile's own."""
NOT_KERNELS = (SCHEDULING, PYTHON)
_PARTS_OF = {"norm": NORM, "rope": ROPE, "attention": ATTENTION}  # of a stack's phases; the others are linear
_IDLE = "idle"


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does: bytes per second from memory, operations per second in products of the model's
    type, and in float32, in which everything between the products is computed."""

    bandwidth: float
    products: float
    float32: float


@dataclass(slots=True)
class Work:
    """What a part took and had to do, added up."""

    seconds: float = 0.0
    operations: float = 0.0
    bytes: float = 0.0

    def add(self, other: Work) -> None:
        """Count another's as well."""
        self.seconds += other.seconds
        self.operations += other.operations
        self.bytes += other.bytes

    def least(self, bandwidth: float, rate: float) -> float:
        """Seconds below which a machine cannot do it.

        >>> Work(operations=10.0, bytes=4.0).least(bandwidth=1.0, rate=2.0)
        5.0
        """
        return max(self.operations / rate, self.bytes / bandwidth)


@dataclass(slots=True)
class Phase:
    """Steps of one kind: their number, their tokens, and the parts of their time."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    parts: dict[str, Work] = field(default_factory=lambda: {part: Work() for part in PARTS})

    @property
    def seconds(self) -> float:
        """All of its steps."""
        return sum(work.seconds for work in self.parts.values())

    @property
    def not_kernels(self) -> float:
        """The share of everything that is no kernel in the steps' time, the profile's own left out."""
        rest = sum(self.parts[part].seconds for part in NOT_KERNELS)
        return rest / max(self.seconds - self.parts[COUNTING].seconds, 1e-12)

    def report(self, rates: Rates) -> dict[str, Any]:
        """Plain numbers; parts that took no time are left out."""
        whole = self.seconds
        return {
            "seconds": round(whole, 4),
            "steps": self.steps,
            "prefill_tokens": self.prefill_tokens,
            "decode_tokens": self.decode_tokens,
            "not_kernels": round(self.not_kernels, 4),
            "parts": {name: _line(name, w, whole, rates) for name, w in self.parts.items() if w.seconds},
        }


def _line(name: str, work: Work, whole: float, rates: Rates) -> dict[str, Any]:
    line: dict[str, Any] = {"seconds": round(work.seconds, 6), "share": round(work.seconds / whole, 4)}
    if work.bytes:
        least = work.least(rates.bandwidth, rates.products if name in (LINEAR, EDGES) else rates.float32)
        line |= {"gflop": round(work.operations / 1e9, 6), "gb": round(work.bytes / 1e9, 6)}
        line["roofline"] = round(least / work.seconds, 6)
    return line


class Profile:
    """Counts an engine's steps from now on, for the rest of its life.

    A step with prompt tokens and decode rows is neither prefill nor decode, since one reading of the weights
    serves both: it counts as "mixed".

    Args:
        engine: at rest, with all layers, on a CPU: a GPU's kernels end after their call returned.

    Attributes:
        phases: "prefill", "mixed" and "decode"; complete when the engine is closed.

    Raises:
        ValueError: the engine is on a GPU.
    """

    def __init__(self, engine: Engine) -> None:
        runner = engine.runner
        if runner.device != "cpu":
            raise ValueError(f"a profile times the kernels of a CPU, not of {runner.device!r}")
        self.phases = {"prefill": Phase(), "mixed": Phase(), "decode": Phase()}
        self._engine, self._metrics = engine, engine.metrics
        self._parts: defaultdict[str, Work] = defaultdict(Work)
        self._now = _IDLE
        self._last = time.perf_counter()
        self._costs = _Costs(runner.config.vocab_size)
        over: Any = engine  # what is put in the place of its parts has their methods, not their types
        over.runner.kernels = _Timed(runner.kernels, self._kernel)
        if isinstance(runner.stack, Composed):
            runner.stack.operations = _Timed(runner.stack.operations, self._kernel)
        elif runner.stack is not None:
            over.runner.stack = self._stacked(runner.stack)
        over.runner.logits = self._timed(runner.logits, EDGES, _logits_cost)
        over.runner.likeliest = self._timed(runner.likeliest, EDGES)
        if runner.embedding is not None:
            over.runner.embedding.rows = self._timed(runner.embedding.rows, EDGES, _embed_cost)
        over.batcher = _Timed(engine.batcher, self._scheduling)
        over.sampler = _Timed(engine.sampler, self._sampling)
        over._lay_out = self._timed(engine._lay_out, SCHEDULING)
        over._take_changes = self._timed(engine._take_changes, SCHEDULING)
        over._turn = self._turns(engine._turn)

    def report(self, seconds: float, rates: Rates) -> dict[str, Any]:
        """A run of so many seconds as plain numbers; ``idle_s`` is what was spent outside of steps."""
        phases = {name: phase.report(rates) for name, phase in self.phases.items() if phase.steps}
        busy = sum(phase.seconds for phase in self.phases.values())
        total = Phase()
        for phase in self.phases.values():
            for part, work in phase.parts.items():
                total.parts[part].add(work)
        return {
            "seconds": round(seconds, 4),
            "idle_s": round(seconds - busy, 4),
            **{f"{name}_s": round(phase.seconds, 4) for name, phase in self.phases.items()},
            "not_kernels": round(total.not_kernels, 4),
            "measured_gb_per_s": round(rates.bandwidth / 1e9, 1),
            "measured_product_gflop_per_s": round(rates.products / 1e9, 1),
            "measured_float32_gflop_per_s": round(rates.float32 / 1e9, 1),
            "phases": phases,
        }

    # --- the stopwatch, in the engine's thread --------------------------------------------------------

    def _charge(self, part: str) -> None:
        now = time.perf_counter()
        self._parts[part].seconds += now - self._last
        self._last = now

    def _timed(
        self, function: Callable[..., Any], part: str, cost: Callable[..., Work] | None = None
    ) -> Callable[..., Any]:
        """The function, its time charged to a part and what it has to do counted by ``cost``."""

        def call(*given: Any, **named: Any) -> Any:
            outer = self._now
            # The head's product is the head's, and not one of the layers' linears.
            own = outer if outer == EDGES else part
            self._charge(outer)
            self._now = own
            try:
                result = function(*given, **named)
            finally:
                self._charge(own)
                self._now = outer
            if cost is not None:
                self._parts[own].add(cost(result, *given, **named))
                self._charge(COUNTING)
            return result

        return call

    def _turns(self, turn: Callable[..., None]) -> Callable[..., None]:
        timed = self._timed(turn, PYTHON)

        def call(*given: Any) -> None:
            steps = self._metrics.steps
            timed(*given)
            if self._metrics.steps > steps:
                self._keep()

        return call

    def _keep(self) -> None:
        """Give what was charged since the last step to its phase."""
        step = self._metrics.history[-1]
        kind = "decode" if not step.prefill_tokens else "mixed" if step.decode_tokens else "prefill"
        phase = self.phases[kind]
        phase.steps += 1
        phase.prefill_tokens += step.prefill_tokens
        phase.decode_tokens += step.decode_tokens
        self._parts.pop(_IDLE, None)
        for part, work in self._parts.items():
            phase.parts[part].add(work)
        self._parts.clear()

    # --- what is timed --------------------------------------------------------------------------------

    def _kernel(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        part, cost = self._costs.kernels.get(name, (OTHER, None))
        return self._timed(function, part, cost)

    def _stacked(self, stack: Any) -> Callable[..., torch.Tensor]:
        """The layers in one call, which tells itself how long each operation took."""

        def call(hidden: torch.Tensor, batch: Batch, angles: Any) -> torch.Tensor:
            self._charge(self._now)
            before = stack.seconds.copy()
            delta: torch.Tensor = stack(hidden, batch, angles)
            for phase, seconds in zip(stack.phases, stack.seconds - before, strict=True):
                self._parts[_PARTS_OF.get(phase, LINEAR)].seconds += seconds
                self._last += seconds
            self._charge(self._now)
            for part, work in self._costs.stack(stack.layers, hidden, batch):
                self._parts[part].add(work)
            self._charge(COUNTING)
            return delta

        return call

    def _scheduling(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._timed(function, SCHEDULING)

    def _sampling(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._timed(function, SAMPLING, _sampling_cost)


class _Timed:
    """An object whose functions are timed; everything else is the object's own."""

    def __init__(self, target: Any, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        self._target, self._wrap = target, wrap

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value) or isinstance(value, type):
            return value
        timed = self._wrap(name, value)
        setattr(self, name, timed)  # found there from now on
        return timed


# --- what has to be done --------------------------------------------------------------------------------


def _nbytes(weights: Any) -> int:
    """Bytes of all tensors in a packed weight, whatever a kernel file packs."""
    if isinstance(weights, torch.Tensor):
        return weights.numel() * weights.element_size()  # an opaque tensor knows no nbytes
    if is_dataclass(weights):
        return sum(_nbytes(getattr(weights, f.name)) for f in fields(weights))
    if isinstance(weights, tuple | list):
        return sum(map(_nbytes, weights))
    return 0


class _Costs:
    """Operations and bytes of the kernels' calls, with what need not be counted twice."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.kernels: Mapping[str, tuple[str, Callable[..., Work]]] = {
            "linear": (LINEAR, self._linear),
            "likeliest": (EDGES, self._likeliest),
            "attention": (ATTENTION, self._attention),
            "add_norm": (NORM, _norm_cost),
            "rope_store": (ROPE, _rope_cost),
            "activate": (ACTIVATION, _activate_cost),
        }
        self._weights: dict[int, int] = {}
        self._batch: Batch | None = None
        self._spans: dict[int | None, tuple[int, int]] = {}

    def _linear(self, y: torch.Tensor, x: torch.Tensor, weight: Any, *_: Any) -> Work:
        operations = 2 * x.shape[0] * x.shape[1] * y.shape[1]
        return Work(0.0, operations, self._nbytes(weight) + x.nbytes + y.nbytes)

    def _likeliest(self, tokens: torch.Tensor, x: torch.Tensor, weight: Any) -> Work:
        operations = 2 * x.shape[0] * x.shape[1] * self._vocab_size
        return Work(0.0, operations, self._nbytes(weight) + x.nbytes)

    def _nbytes(self, weight: Any) -> int:
        if id(weight) not in self._weights:
            self._weights[id(weight)] = _nbytes(weight)
        return self._weights[id(weight)]

    def stack(
        self, layers: Sequence[tuple[Any, torch.Tensor, torch.Tensor]], hidden: torch.Tensor, batch: Batch
    ) -> Iterator[tuple[str, Work]]:
        """The parts of layers in one call; the activation is done inside of a product."""
        rows, (norm, size) = len(hidden), (2 * hidden.nbytes, hidden.element_size())
        for layer, keys, values in layers:
            for weight in (layer.qkv, layer.o, layer.gate_up, layer.down):
                moved = self._nbytes(weight) + rows * (weight.inputs + weight.outputs) * size
                yield LINEAR, Work(0.0, 2 * rows * weight.inputs * weight.outputs, moved)
            yield NORM, Work(0.0, 10 * hidden.numel(), 4 * norm)
            qkv = rows * layer.qkv.outputs
            yield ROPE, Work(0.0, 3 * qkv, 2 * qkv * size)
            q = hidden.new_empty((rows, layer.o.inputs), device="meta")
            yield ATTENTION, self._attention(q, q, keys, values, batch, layer.window, 1.0)

    def _attention(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: Batch,
        window: int | None,
        scale: float,
    ) -> Work:
        if batch is not self._batch:
            self._batch, self._spans = batch, {}
        if window not in self._spans:
            self._spans[window] = _spans(batch, window)
        pairs, read = self._spans[window]
        each = 2 * keys[0, :, :, 0].nbytes  # a value is as wide as a key, but for what pads it
        # A product with a key and one with a value for each pair and query feature.
        return Work(0.0, 4 * q.shape[1] * pairs, read * each + q.nbytes + out.nbytes)


def _spans(batch: Batch, window: int | None) -> tuple[int, int]:
    """Pairs of a query and a key in a batch, and keys that have to be read: once for all rows of a chunk."""
    pairs = batch.positions + 1
    if window is not None:
        pairs = pairs.clamp(max=window)
    first: dict[int, int] = {}
    end: dict[int, int] = {}
    for chunk, _, rows, start in batch.tiles.tolist():
        first.setdefault(chunk, 0 if window is None else max(0, start + 1 - window))
        end[chunk] = start + rows
    return int(pairs.sum()), sum(end[chunk] - first[chunk] for chunk in end)


def _norm_cost(out: torch.Tensor, delta: torch.Tensor | None, residual: torch.Tensor, *_: Any) -> Work:
    normed = Work(0.0, 4 * out.numel(), residual.nbytes + out.nbytes)
    if delta is not None:
        normed.add(Work(0.0, out.numel(), delta.nbytes + residual.nbytes))
    return normed


def _rope_cost(q: torch.Tensor, qkv: torch.Tensor, *_: Any) -> Work:
    return Work(0.0, 3 * qkv.numel(), 2 * qkv.nbytes)


def _activate_cost(out: torch.Tensor, x: torch.Tensor, *_: Any) -> Work:
    return Work(0.0, 4 * out.numel(), x.nbytes + out.nbytes)


def _embed_cost(out: torch.Tensor, *_: Any) -> Work:
    return Work(0.0, 0.0, 2 * out.nbytes)


def _logits_cost(logits: torch.Tensor, *_: Any) -> Work:
    """What comes on top of the head's product: its result in float32."""
    return Work(0.0, 0.0, logits.nbytes)


def _sampling_cost(chosen: Sequence[Any], logits: torch.Tensor, *_: Any) -> Work:
    return Work(0.0, logits.numel(), logits.nbytes)
