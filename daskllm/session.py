"""Text in, completions out, in one process: a model that is open here.

It tokenises prompts, feeds the engine, watches for stop strings, turns what comes back into text, and keeps
a row's error to that row. It knows no Dask and no table.
"""

from __future__ import annotations

import atexit
import functools
import queue
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from daskllm import machine
from daskllm.engine import knee
from daskllm.engine.batcher import Batcher
from daskllm.engine.engine import Engine
from daskllm.engine.kvcache import BlockPool
from daskllm.engine.layers import ResidentModel
from daskllm.engine.runner import Runner
from daskllm.engine.sequence import Request, Sample
from daskllm.engine.stage import MAX_STEP_TOKENS, Flight, kv_room, open_runner
from daskllm.metrics import EngineMetrics, Progress
from daskllm.models import end_tokens, layer_names
from daskllm.results import Embedding, Score
from daskllm.rows import Follower, Row, embedding_of, score_of
from daskllm.text.encode import Encoded, Encoder
from daskllm.text.tokenizer import Tokenizer
from daskllm.text.watch import TextWatcher
from daskllm.types import URGENT, Completion, ModelSpec, Pooling, Prompt, RowError, SamplingParams

__all__ = ["Progress", "Session"]

_POLL_SECONDS = 0.25


class Session:
    """An open model. `Session.open` makes one; one per process and specification is enough, since all its
    callers share the engine's batch."""

    def __init__(self, spec: ModelSpec, model: ResidentModel, tokenizer: Tokenizer, engine: Engine) -> None:
        self.spec, self.model, self.tokenizer, self.engine = spec, model, tokenizer, engine
        self.config, self.context = model.config, engine.context
        self.eos_token_ids = end_tokens(model.checkpoint.generation_config, model.config)
        self._encoder = Encoder(tokenizer, self.config.vocab_size, self.context)
        # The engine's thread must have left torch before the interpreter takes it down.
        self._at_exit = functools.partial(_close_at_exit, weakref.WeakMethod(self.close))
        atexit.register(self._at_exit)

    @classmethod
    def open(cls, spec: ModelSpec, model: ResidentModel | None = None) -> Session:
        """Open a model in this process.

        Args:
            model: its layers, where they are held already.

        Raises:
            ModelError: the directory cannot be loaded; nothing of it stays in memory.
            ValueError: the device or the memory asked for is not there.
        """
        model = model or ResidentModel.open(spec)
        layers = layer_names(model.config)
        try:
            # Room that is asked for is checked before anything is loaded; else it is what the weights leave.
            asked = None if spec.kv_memory is None else kv_room(model, layers, spec.kv_memory)
            with ThreadPoolExecutor(1, "daskllm-opening") as beside:
                tokenizer = beside.submit(Tokenizer.from_directory, model.checkpoint.path)
                model.load(layers)
            blocks = asked or kv_room(model, layers, None)
            runner = open_runner(model, layers, blocks)
            return cls.over(spec, model, runner, blocks, tokenizer=tokenizer.result())
        except BaseException:
            model.close()
            raise

    @classmethod
    def over(
        cls,
        spec: ModelSpec,
        model: ResidentModel,
        runner: Runner,
        blocks: int,
        depart: Callable[[Flight], None] | None = None,
        flights: int = 1,
        tokenizer: Tokenizer | None = None,
    ) -> Session:
        """A session on a runner of the model's last layers, or of all.

        Args:
            blocks: KV blocks that every stage has.
            depart: sends a step through the stages before; see `Engine`.
            flights: steps under way at once.
            tokenizer: the model's, where it is read already.
        """
        tokenizer = tokenizer or Tokenizer.from_directory(model.checkpoint.path)
        threads = machine.cores()
        batcher = Batcher(BlockPool(blocks), flights * knee.FIRST, MAX_STEP_TOKENS, flights)
        speculate = depart is None and model.kernels.INVARIANT
        engine = Engine(runner, batcher, model.config.max_positions, threads, depart, speculate)
        return cls(spec, model, tokenizer, engine)

    @property
    def metrics(self) -> EngineMetrics:
        """What the engine has done so far."""
        return self.engine.metrics

    @property
    def rows_together(self) -> int:
        """How many sequences the engine runs together at most, by what it has seen so far."""
        return self.engine.batcher.max_sequences

    def close(self) -> None:
        """Stop the engine and let the weights go; rows that are still waiting fail."""
        atexit.unregister(self._at_exit)
        self.engine.close()
        self.model.close()

    # --- generation ---------------------------------------------------------------------------------

    def encode(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Encoded]:
        """The token ids that `generate` gives to the model; it takes them in the place of the prompts."""
        return self._encoder.encode(prompts, params)

    def generate(
        self,
        prompts: Sequence[Prompt | Encoded],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        job_seed: int = 0,
        places: Sequence[tuple[int, ...]] | None = None,
        priority: int = 0,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        finished: Callable[[Sequence[tuple[int, list[Completion]]]], None] | None = None,
    ) -> list[list[Completion]]:
        """Answer prompts; the i-th list holds the ``n`` completions of the i-th prompt.

        Args:
            prompts: text (taken as it is), token ids, chat messages, what `encode` made of them, or a
                `RowError` that is passed on.
            params: for all, or one for each.
            job_seed, places: where ``params.seed`` is None, a row draws from (job seed, its place); a place
                is its position in ``prompts`` unless given.
            priority: rows wait before those with a lower one.
            progress: called from this thread with what was done since its last call, a few times a second.
            cancelled: asked a few times a second; True stops decoding and raises ``InterruptedError``.
            finished: called like ``progress``, and before it, with the positions and completions of the rows
                that have come to an end since; a last time where something raises, so that they can be kept.

        A row that cannot be answered has finish_reason "error" and does not change its neighbours.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        rows = self._rows(prompts, each)
        caller = object()
        pending = [row for row in rows if row.error is None]
        requests = []
        for number, row in enumerate(rows):
            if row.error is None:
                place = (number,) if places is None else places[number]
                requests.append(self._request(row, job_seed, place, caller, priority))
        # Longest first, where that is known, so that no long row runs on alone at the end (Graham 1969, LPT).
        # Among equals, those that begin alike beside one another: the engine computes what they share once,
        # and finds it as long as it does not need the room.
        order = sorted(
            range(len(pending)), key=lambda i: (-_least_tokens(requests[i]), tuple(requests[i].prompt))
        )
        for i, ticket in zip(order, self.engine.submit([requests[i] for i in order]), strict=True):
            pending[i].ticket = ticket
        if finished is None:
            self._await(rows, progress, cancelled)
        else:
            self._await(rows, progress, cancelled, lambda r: finished([(i, self._answer(x)) for i, x in r]))
        return [self._answer(row) for row in rows]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """The text of one answer in pieces, as it comes; their join is the completion's text.

        Somebody reads along, so it is `URGENT`.

        Leaving the iterator early stops the decoding.

        Raises:
            RowError: the prompt cannot be answered.
        """
        if params.n != 1:
            raise ValueError(f"stream gives one answer: n must be 1, not {params.n}")
        row = self._rows([prompt], [params])[0]
        if row.error is not None:
            raise RowError(row.error)
        pieces: queue.SimpleQueue[str] = queue.SimpleQueue()
        request = self._request(row, 0, (), object(), URGENT, pieces.put)
        [ticket] = self.engine.submit([request])
        try:
            while not ticket.done or not pieces.empty():
                self.engine.wait_until(lambda: ticket.done or not pieces.empty())
                while not pieces.empty():
                    yield pieces.get()
            self.engine.wait([ticket])
            if row.watchers and (rest := row.watchers[0].rest()):
                yield rest
            sample = ticket.samples[0]
            if sample is not None and sample.error is not None:
                raise RowError(sample.error)
        finally:
            self.engine.abort([ticket])

    def score(
        self,
        prompts: Sequence[Prompt],
        *,
        priority: int = 0,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Score]:
        """The log-probability that the model gives to each text; arguments as for `generate`."""
        rows = self._read(prompts, progress, cancelled, kind="score", priority=priority)
        return [score_of(row) for row in rows]

    def embed(
        self,
        prompts: Sequence[Prompt],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        priority: int = 0,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Embedding]:
        """Each text as a vector: its hidden states behind the model's last norm, pooled.

        Args:
            pooling: "mean" of all of its tokens, or its "last" token alone.
            normalize: make each vector's Euclidean length 1.

        The rest is as for `generate`.
        """
        rows = self._read(prompts, progress, cancelled, kind="embed", pooling=pooling, priority=priority)
        return [embedding_of(row, self.config.hidden_size, normalize) for row in rows]

    def _read(
        self,
        prompts: Sequence[Prompt],
        progress: Callable[[Progress], None] | None,
        cancelled: Callable[[], bool] | None,
        **asked: Any,
    ) -> list[Row]:
        """Rows of texts that nothing is generated for, when all are done; ``asked`` is of their `Request`."""
        rows = self._rows(prompts, [SamplingParams(max_tokens=1)] * len(prompts), room=0)
        pending = [row for row in rows if row.error is None]
        caller = object()
        requests = [Request(row.ids, row.params, caller=caller, **asked) for row in pending]
        for row, ticket in zip(pending, self.engine.submit(requests), strict=True):
            row.ticket = ticket
        self._await(rows, progress, cancelled)
        return rows

    # --- rows ---------------------------------------------------------------------------------------

    def _rows(
        self, prompts: Sequence[Prompt | Encoded], params: Sequence[SamplingParams], room: int = 1
    ) -> list[Row]:
        """Prompts as ids; ``room`` is how many positions must stay free for an answer."""
        encoded = self._encoder.encode(prompts, params, room)
        return [Row(one.ids, one.error, own) for one, own in zip(encoded, params, strict=True)]

    def _request(
        self,
        row: Row,
        job_seed: int,
        place: tuple[int, ...],
        caller: object,
        priority: int,
        emit: Callable[[str], None] | None = None,
    ) -> Request:
        params = row.params
        stop_ids = frozenset(params.stop_token_ids or ())  # type: ignore[arg-type]
        if not params.ignore_eos:
            stop_ids |= frozenset(self.eos_token_ids)
        on_token = None
        if params.stop or emit is not None:
            row.watchers = [
                TextWatcher(self.tokenizer, tuple(params.stop or ()), params.min_tokens, stop_ids, emit)
                for _ in range(params.n)
            ]

            def on_token(sample: int, output: Sequence[int]) -> bool:
                return row.watchers[sample].push(output)

        key = (params.seed, (row.ids,)) if params.seed is not None else (job_seed, (place,))
        return Request(row.ids, params, stop_ids, key, on_token, priority=priority, caller=caller)

    def _await(
        self,
        rows: Sequence[Row],
        progress: Callable[[Progress], None] | None,
        cancelled: Callable[[], bool] | None,
        finished: Callable[[Sequence[tuple[int, Row]]], None] | None = None,
    ) -> None:
        tickets = [row.ticket for row in rows if row.ticket is not None]
        follower = Follower(rows, self.engine, progress, finished)
        watched = progress is not None or cancelled is not None or finished is not None
        try:
            while len(self.engine.wait(tickets, _POLL_SECONDS if watched else None)) < len(tickets):
                follower.report()
                if cancelled is not None and cancelled():
                    raise InterruptedError("the rows were cancelled")
            follower.report()
        except BaseException:
            follower.report()
            raise
        finally:  # an interrupt or a cancelled task must not leave its rows decoding
            self.engine.abort(tickets)

    def _answer(self, row: Row) -> list[Completion]:
        if row.answer is None:
            row.answer = self._completions(row)
        return row.answer

    def _completions(self, row: Row) -> list[Completion]:
        n, version = row.params.n, self.spec.version
        if row.error is not None or row.ticket is None:
            return [Completion.failed(row.error or "the row was not run", len(row.ids), version)] * n
        return [self._completion(row, number, sample) for number, sample in enumerate(row.samples)]

    def _completion(self, row: Row, number: int, sample: Sample) -> Completion:
        if sample.error is not None:
            return Completion.failed(sample.error, len(row.ids), self.spec.version)
        request = row.ticket.request if row.ticket is not None else None
        ids: Sequence[int] = sample.token_ids
        if request is not None and sample.finish_reason == "stop" and ids and ids[-1] in request.stop_ids:
            ids = ids[:-1]
        watcher = row.watchers[number] if row.watchers else None
        text = watcher.cut if watcher is not None and watcher.cut is not None else self.tokenizer.decode(ids)
        return Completion(
            text,
            sample.token_ids,
            sample.finish_reason,
            len(row.ids),
            len(sample.token_ids),
            sample.logprobs,
            model_version=self.spec.version,
        )


def _close_at_exit(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    close = method()
    if close is not None:
        close()


def _least_tokens(request: Request) -> int:
    """How many tokens a request is sure to generate."""
    params = request.params
    return params.max_tokens if params.ignore_eos and not params.stop else params.min_tokens
