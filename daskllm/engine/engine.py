"""One model's loop: requests of any number of callers in, samples out.

A thread of the engine's own runs step after step while there is work: schedule, run, choose, hand out. All
callers' rows share its batch, so that it does not drain when one caller's rows come to an end. It knows
token ids only.

Where the first layers are elsewhere, a step goes to them first and the engine runs the last ones when it
lands; meanwhile others are under way. How a step travels is not its business.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from daskllm.engine import sampler
from daskllm.engine.batch import Batch
from daskllm.engine.batcher import Batcher, Step
from daskllm.engine.knee import Knee
from daskllm.engine.runner import LOGIT_ROWS, Runner
from daskllm.engine.sequence import Request, Sample, SequenceState
from daskllm.engine.speculation import Speculation
from daskllm.engine.stage import Flight
from daskllm.engine.ticket import EngineClosedError, Ticket
from daskllm.metrics import EngineMetrics, StepRecord

__all__ = ["Engine", "EngineClosedError", "Ticket"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Under:
    """A step under way, and the seconds that it took here so far."""

    step: Step
    flight: Flight
    seconds: float = 0.0


class Engine:
    """Continuous batching over a runner.

    Args:
        runner: a runner with all layers, or with the last ones.
        batcher: the state machine, with its blocks.
        context: a sample ends with "length" when prompt and output reach it.
        threads: OpenMP threads of a step.
        depart: sends a step through the layers before the runner's, without waiting; what comes of it is
            given to `land`. None where the runner has all layers.
        speculate: guess tokens where that pays; for kernels that promise a row's bits.
    """

    def __init__(
        self,
        runner: Runner,
        batcher: Batcher,
        context: int,
        threads: int,
        depart: Callable[[Flight], None] | None = None,
        speculate: bool = False,
    ) -> None:
        self.runner, self.batcher, self.sampler, self.context = runner, batcher, sampler, context
        self.metrics = EngineMetrics()
        self._speculation = Speculation(self.metrics, context)
        batcher.draft = self._speculation.draft if speculate else None
        self._knee = Knee(self.metrics) if depart is None else None
        self._threads = threads
        self._changed = threading.Condition()
        self._depart = depart
        self._tickets: dict[Request, Ticket] = {}
        self._arrived: list[Ticket] = []
        self._dropped: set[Request] = set()
        self._copies: list[tuple[int, int]] = []
        self._under: dict[int, _Under] = {}
        self._landed: list[tuple[int, torch.Tensor | BaseException]] = []
        self._here: dict[int, torch.Tensor] = {}
        self._departed = 0
        self._stuck = False
        self._thread: threading.Thread | None = None
        self._end: BaseException | None = None
        self._news = False  # for those who wait; to wake them after every step would cost each step time

    # --- callers' side ------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> list[Ticket]:
        """Queue requests; they begin in the next step."""
        with self._changed:
            if self._end is not None:
                raise self._end
            tickets = [Ticket(request) for request in requests]
            self._arrived += tickets
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="daskllm-engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return tickets

    def wait(self, tickets: Sequence[Ticket], timeout: float | None = None) -> list[Ticket]:
        """Those that are done, once all are or the time is up; raises what broke the engine, if it broke."""
        left = list(tickets)

        def over() -> bool:
            # From the end, and never twice past one that is done: a long table is not scanned every step.
            while left and left[-1].done:
                left.pop()
            return not left

        self.wait_until(over, timeout)
        for ticket in tickets:
            if ticket.failure is not None:
                raise ticket.failure
        return [t for t in tickets if t.done]

    def wait_until(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait for something that a step may bring about; whether it came before the time was up."""
        with self._changed:
            return self._changed.wait_for(predicate, timeout)

    def under_way(self, caller: object) -> tuple[tuple[int, int], ...]:
        """Of each sample of a caller's in the batch, how many tokens of its prompt were read and how many it
        has generated."""
        running = list(self.batcher.running)  # in one piece, beside the engine's thread
        return tuple(
            (min(s.computed, len(s.request.prompt)), s.produced)
            for s in running
            if s.request.caller is caller
        )

    def abort(self, tickets: Sequence[Ticket]) -> None:
        """Stop decoding these and free their blocks before the next step."""
        with self._changed:
            self._dropped.update(t.request for t in tickets if not t.done)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the thread after the step it is in; rows still waiting fail with `EngineClosedError`."""
        self.stop(EngineClosedError("the model was closed"))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def stop(self, why: BaseException) -> None:
        """End with ``why`` for all who wait and all who come, without waiting for the thread."""
        with self._changed:
            self._end = self._end or why
            self._changed.notify_all()

    def land(self, number: int, hidden: torch.Tensor | BaseException) -> None:
        """Give a departed step's residual stream, or what went wrong with it, to the engine's thread.

        A number that the engine does not wait for, or no longer, is left out.
        """
        with self._changed:
            self._landed.append((number, hidden))
            self._changed.notify_all()

    # --- the loop -----------------------------------------------------------------------------------

    def _loop(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP counts threads per calling thread
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._end or self._arrived or self._dropped or self._landed or self._can_begin()
                )
                if self._end is not None:
                    self._fail(self._end)
                    return
            try:
                with self._changed:
                    self._take_changes()
                    landed, self._landed = self._landed, []
                self._turn(landed)
            except Exception as error:  # whatever broke, every waiting caller must hear of it
                logger.exception("a step of the engine failed")
                with self._changed:
                    self._fail(error)

    def _can_begin(self) -> bool:
        """Whether a step might be found; none was, and nothing changed since, where `_stuck`."""
        return bool(self._tickets) and len(self._under) < self.batcher.flights and not self._stuck

    def _take_changes(self) -> None:
        self._stuck = False
        for ticket in self._arrived:
            self._tickets[ticket.request] = ticket
            self.metrics.prompt_tokens += len(ticket.request.prompt)
            self.batcher.add(SequenceState.of(ticket.request, 0))
        self._arrived.clear()
        if self._dropped:
            dropped = self._dropped
            self.metrics.aborted += self.batcher.abort(lambda s: s.request in dropped)
            self._tickets = {r: t for r, t in self._tickets.items() if r not in dropped}
            self._dropped = set()

    def _fail(self, error: BaseException) -> None:
        for ticket in (*self._tickets.values(), *self._arrived):
            ticket.failure = error
        self.batcher.clear()
        self._under.clear()
        self._here.clear()
        self._tickets.clear()
        self._arrived.clear()
        self._copies.clear()
        self._changed.notify_all()

    def _turn(self, landed: Sequence[tuple[int, torch.Tensor | BaseException]]) -> None:
        for number, hidden in landed:
            if number not in self._under:  # of rows that have failed meanwhile
                continue
            if isinstance(hidden, BaseException):
                raise hidden
            self._here[number] = hidden
        # A step reads what those before it wrote: one that overtakes a failed step's bad news waits for them.
        while self._under and (first := next(iter(self._under))) in self._here:
            self._finish_step(self._under.pop(first), self._here.pop(first))
        if self._can_begin():
            self._begin_step()
        if self._news:
            self._news = False
            with self._changed:
                self._changed.notify_all()

    def _begin_step(self) -> None:
        began = time.monotonic()
        if self._knee is not None:
            self.batcher.max_sequences = self._knee.look()
        step = self.batcher.schedule()
        for sequence, why in step.failed:
            self._finish(sequence, sequence.finished("error", why))
        if not step.chunks:
            self._stuck = bool(self._under)
            return
        under = _Under(step, Flight(self._departed, self._lay_out(step), tuple(self._copies)))
        self._copies.clear()
        self._departed += 1
        if self._depart is None:
            self._finish_step(under, None, began)
            return
        self._under[under.flight.number] = under
        self._depart(under.flight)
        under.seconds = time.monotonic() - began

    def _lay_out(self, step: Step) -> Batch:
        return Batch.of([c.laid_out() for c in step.chunks], self.runner.device)

    def _finish_step(self, under: _Under, hidden: torch.Tensor | None, began: float | None = None) -> None:
        began = time.monotonic() if began is None else began
        flight = under.flight
        self.runner.cache.copy(flight.copies)
        last = self.runner.run(flight.batch) if hidden is None else self.runner.run(flight.batch, hidden)
        decode = sum(c.count == 1 and c.sequence.produced > 0 for c in under.step.chunks)
        tried = self.metrics.drafted_tokens, self.metrics.accepted_tokens
        callers = self._deal(under.step, last)
        self._record(under.step, decode, tried, under.seconds + time.monotonic() - began, callers)

    def _deal(self, step: Step, hidden: torch.Tensor) -> int:
        """Give every row to who waits for it; how many callers had rows in the step.

        Args:
            hidden: the last hidden states of the wanted rows; only some of them need logits.
        """
        choosing: list[tuple[int, SequenceState]] = []
        drafted: dict[SequenceState, tuple[int, ...]] = {}
        scoring: list[tuple[int, SequenceState, int]] = []
        whole: list[SequenceState] = []
        end = 0
        for chunk in step.chunks:
            sequence, kind = chunk.sequence, chunk.sequence.request.kind
            rows = range(end, end + len(chunk.wanted))
            end = rows.stop
            if sequence.dropped:
                continue
            if kind == "generate":
                choosing += [(row, one) for row in rows for one in self._samples_of(sequence)]
                if chunk.drafts:
                    drafted[sequence] = chunk.drafts
                continue
            if kind == "score":
                first = sequence.computed + 1
                targets = sequence.tokens[first : first + len(rows)]
                scoring += [(row, sequence, token) for row, token in zip(rows, targets, strict=True)]
            else:
                sequence.pool(hidden[rows.start : end].double().cpu().numpy())
            if chunk.completes:
                whole.append(sequence)
        self._score(scoring, hidden)
        self.batcher.advance(step)
        if choosing:
            self._choose(choosing, hidden, drafted)
        for sequence in whole:
            self._finish(sequence, sequence.finished("length"))
        return len({c.sequence.request.caller for c in step.chunks})

    def _choose(
        self,
        choosing: Sequence[tuple[int, SequenceState]],
        hidden: torch.Tensor,
        drafted: Mapping[SequenceState, tuple[int, ...]],
    ) -> None:
        """The next token of sequences from their rows of ``hidden``: samples of one prompt share its row,
        a sequence with drafts has a row for each besides its own."""
        rows = list(dict.fromkeys(row for row, _ in choosing))
        places = {row: place for place, row in enumerate(rows)}
        wanted = hidden if len(rows) == len(hidden) else hidden[rows]
        if all(sequence.takes_likeliest for _, sequence in choosing):
            likeliest = self.runner.likeliest(wanted).tolist()
            tokens = [likeliest[places[row]] for row, _ in choosing]
        else:
            logits = self.runner.logits(wanted)
            if len(rows) < len(choosing):
                logits = logits[[places[row] for row, _ in choosing]]
            tokens = self.sampler.choose(logits, [sequence for _, sequence in choosing])
        self.metrics.generated_tokens += len(tokens) - sum(1 + len(drafts) for drafts in drafted.values())
        # Siblings before their parent: it may end with its first token, and they start on its blocks.
        for (_, sequence), token in zip(reversed(choosing), reversed(tokens), strict=True):
            if sequence not in drafted:
                self._extend(sequence, token)
        for sequence, drafts in drafted.items():
            chosen = [token for (_, one), token in zip(choosing, tokens, strict=True) if one is sequence]
            self._verify(sequence, drafts, chosen)

    def _verify(self, sequence: SequenceState, drafts: Sequence[int], tokens: Sequence[int]) -> None:
        """Append what was chosen behind the last token and behind each draft, as far as the drafts are it."""
        right, before = 0, len(sequence.tokens)
        for token in tokens:
            if not self._extend(sequence, token):
                break
            if right == len(drafts) or drafts[right] != token:
                self.batcher.accept(sequence, right)
                break
            right += 1
        self.metrics.generated_tokens += len(sequence.tokens) - before
        self._speculation.fared(sequence, len(drafts), right)

    def _score(self, scoring: Sequence[tuple[int, SequenceState, int]], hidden: torch.Tensor) -> None:
        """Note how likely each row makes the token after it; no more logits are held than it takes."""
        for start in range(0, len(scoring), LOGIT_ROWS):
            rows, sequences, targets = zip(*scoring[start : start + LOGIT_ROWS], strict=True)
            scores = self.sampler.token_scores(self.runner.logits(hidden[list(rows)]), targets)
            for sequence, score in zip(sequences, scores, strict=True):
                sequence.scores.append(score)

    def _samples_of(self, sequence: SequenceState) -> list[SequenceState]:
        """The sequences that choose from this row: itself, and its siblings when its prompt is done."""
        params = sequence.request.params
        if params.n == 1 or sequence.sample != 0 or sequence.produced:
            return [sequence]
        return [sequence, *(SequenceState.of(sequence.request, i) for i in range(1, params.n))]

    def _extend(self, sequence: SequenceState, token: int) -> bool:
        """Append a token; end the sample, or start it where it is a sibling's first. Whether it goes on."""
        request, params = sequence.request, sequence.request.params
        sequence.tokens.append(token)
        sequence.counts[token] += 1
        stopped = False
        if request.on_token is not None:
            stopped, self._news = request.on_token(sequence.sample, sequence.output), True
        early = sequence.produced < params.min_tokens
        if (stopped or token in request.stop_ids) and not early:
            self._finish(sequence, sequence.finished("stop"))
            return False
        if sequence.produced >= params.max_tokens or len(sequence.tokens) >= self.context:
            self._finish(sequence, sequence.finished("length"))
            return False
        if not sequence.blocks:
            self._fork(sequence)
        return True

    def _fork(self, sibling: SequenceState) -> None:
        parent = next(
            (s for s in self.batcher.running if s.request is sibling.request and s.sample == 0), None
        )
        if parent is None:  # its first token was its last
            self.batcher.waiting.appendleft(sibling)
        elif (copy := self.batcher.fork(parent, sibling)) is not None:
            self._copies.append(copy)

    def _finish(self, sequence: SequenceState, sample: Sample) -> None:
        self.batcher.finish(sequence)
        ticket = self._tickets.get(sequence.request)
        if ticket is None:  # aborted while its step ran
            return
        self.metrics.sequences += 1
        self.metrics.output_tokens += len(sample.token_ids)
        if sample.finish_reason == "error" and not sequence.produced:  # no sibling was begun either
            ticket.samples = [sample] * len(ticket.samples)
        ticket.samples[sequence.sample] = sample
        if ticket.done:
            del self._tickets[sequence.request]
            self._news = True

    def _record(self, step: Step, decode: int, tried: tuple[int, int], seconds: float, callers: int) -> None:
        self.metrics.preemptions = self.batcher.preemptions
        self.metrics.reused_tokens = self.batcher.reused_tokens
        self.metrics.record(
            StepRecord(
                time=time.monotonic(),
                seconds=seconds,
                prefill_tokens=sum(c.count for c in step.chunks) - decode,
                decode_tokens=decode,
                running=len(step.chunks),
                waiting=len(self.batcher.waiting),
                callers=callers,
                blocks_used=self.batcher.pool.used,
                drafted=self.metrics.drafted_tokens - tried[0],
                accepted=self.metrics.accepted_tokens - tried[1],
            )
        )
