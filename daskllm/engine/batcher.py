"""Who runs in the next step: continuous batching as a state machine without I/O.

Events go in (`add`, `abort`, `advance`), decisions come out (`schedule`). It knows neither tensors nor
threads, so that its tests need no model. One step holds a decode token of every running sequence and, up
to a token budget, chunks of prompts (Yu et al. 2022, Orca; Agrawal et al. 2023, chunked prefill).

Queue and batch are in the order of priority and, within it, of arrival. When blocks run out, the last of the
batch gives all of its own back and waits at the head of its priority's queue; it keeps its tokens and runs
them again as a prompt. A sequence is admitted only while the blocks of its whole prompt are free beyond what
the running ones need for their next token, so that admission does not itself cause the next preemption.

A sequence starts behind the longest run of whole blocks that the pool has of its tokens, and looks again
before each further chunk of its prompt. A block can be found from the moment that its tokens are in a step:
steps pass through a layer one after another, and within one all keys and values are stored before any row
attends. So rows with one prefix that come together compute it once, the first of them, in the same step;
where one step does not hold the prefix, whoever runs next goes on with it and the others find that too.
Nobody waits for a block, and nobody writes to one that others read: the last token of a prompt always runs,
and a block that it shares with the whole prompt is its sequence's own. Scores and embeddings need every
token's hidden state: they find nothing and are found.

Where a model's layers are spread over several processes, several steps are under way at once. Each takes its
share of the sequences that are in none; what a step holds, nobody touches until it has landed. So rows even
out between steps by themselves, and one pool of blocks serves all.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from daskllm.engine.batch import Chunk
from daskllm.engine.kvcache import BlockPool, blocks_for
from daskllm.engine.sequence import SequenceState
from daskllm.engine.sizes import BLOCK_SIZE

__all__ = ["Batcher", "ScheduledChunk", "Step"]

_FEW = 8
"""Sequences in a step: with more, guesses pay so rarely that they are not even looked for."""


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """``count`` tokens of a sequence from its first uncomputed one on; ``drafts`` are guesses behind them."""

    sequence: SequenceState
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be chosen after this chunk."""
        return self.count == self.sequence.remaining

    @property
    def wanted(self) -> range:
        """Which of its rows' last hidden states somebody waits for."""
        request, count, completes = self.sequence.request, self.count, self.completes
        if request.kind == "score":  # nothing comes after the last token that could be scored
            return range(count - completes)
        if request.kind == "embed" and request.pooling == "mean":
            return range(count)
        return range(count - completes, count + len(self.drafts))

    def laid_out(self) -> Chunk:
        """What a step reads of it."""
        sequence, start = self.sequence, self.sequence.computed
        tokens = sequence.tokens[start : start + self.count]
        return Chunk([*tokens, *self.drafts], start, sequence.blocks, self.wanted)


@dataclass(frozen=True, slots=True)
class Step:
    """What to run now.

    Attributes:
        chunks: tokens to run, decode rows first.
        failed: sequences that can never run, with the reason.
    """

    chunks: tuple[ScheduledChunk, ...]
    failed: tuple[tuple[SequenceState, str], ...] = ()


@dataclass(slots=True)
class Batcher:
    """The queue and the running batch.

    Args:
        pool: the blocks there are.
        max_sequences: at most so many run together.
        max_tokens: at most so many tokens in one step.
        flights: at most so many steps under way at once; they run in the order in which they were made.
        reuse: whether sequences start on blocks that others computed.
        draft: guesses tokens behind a sequence's last one, as `daskllm.engine.speculation.Speculation.draft`.

    Example:
        >>> from daskllm.engine.sequence import Request
        >>> from daskllm.types import SamplingParams
        >>> batcher = Batcher(BlockPool(8), max_sequences=4, max_tokens=64)
        >>> batcher.add(SequenceState.of(Request([1, 2, 3], SamplingParams()), 0))
        >>> [chunk.count for chunk in batcher.schedule().chunks]
        [3]
    """

    pool: BlockPool
    max_sequences: int
    max_tokens: int
    flights: int = 1
    reuse: bool = True
    draft: Callable[[SequenceState, int, int], Sequence[int]] | None = None
    waiting: deque[SequenceState] = field(default_factory=deque)
    running: list[SequenceState] = field(default_factory=list)
    preemptions: int = 0
    reused_tokens: int = 0

    def add(self, sequence: SequenceState) -> None:
        """Queue a sequence, behind all that have its priority."""
        if not self.waiting or _rank(self.waiting[-1]) <= _rank(sequence):
            self.waiting.append(sequence)  # as nearly always
        else:
            bisect.insort(self.waiting, sequence, key=_rank)

    def abort(self, doomed: Callable[[SequenceState], bool]) -> int:
        """Drop every sequence that ``doomed`` picks, wherever it is; how many there were.

        One whose step is under way keeps its blocks until that has landed.
        """
        gone = [s for s in (*self.waiting, *self.running) if doomed(s) and not s.dropped]
        for sequence in gone:
            sequence.dropped = True
            if not sequence.flying:
                self._release(sequence)
        self.waiting = deque(s for s in self.waiting if not s.dropped)
        self.running = [s for s in self.running if s.flying or not s.dropped]
        return len(gone)

    def clear(self) -> None:
        """Drop everything, the steps under way included: what they were to compute is not there."""
        for sequence in (*self.waiting, *self.running):
            self.finish(sequence)
        self.pool.forget()

    def finish(self, sequence: SequenceState) -> None:
        """Take a sequence out and free its blocks."""
        self._release(sequence)
        queue = self.running if sequence in self.running else self.waiting
        if sequence in queue:
            queue.remove(sequence)

    def fork(self, parent: SequenceState, child: SequenceState) -> tuple[int, int] | None:
        """Start a sample of ``parent``'s prompt on its blocks; a block copy (from, to) the step after needs.

        Whole blocks are shared; the last, partly filled one is copied, since both will write to it. Where no
        block is free for the copy the child waits and runs the prompt again.
        """
        whole, rest = divmod(parent.computed, BLOCK_SIZE)
        if len(self.running) >= self.max_sequences or (rest and not self.pool.free):
            self._add_again(child)
            return None
        shared = parent.blocks[:whole]
        self.pool.share(shared)
        child.blocks, child.computed = list(shared), parent.computed
        child.keys = parent.keys[:whole]
        bisect.insort(self.running, child, key=_rank)
        if not rest:
            return None
        child.blocks.append(self.pool.take())
        return parent.blocks[whole], child.blocks[whole]

    def schedule(self) -> Step:
        """Decide the next step, taking the blocks that it writes to; `advance` lands it."""
        chunks: list[ScheduledChunk] = []
        failed: list[tuple[SequenceState, str]] = []
        budget = self.max_tokens
        share = math.ceil((len(self.running) + len(self.waiting)) / self.flights)
        idle = [s for s in self.running if not s.flying]
        few = self.draft is not None and len(idle) <= _FEW
        # Decode rows first: they are one token each and every one of them delays a whole row.
        for sequence in sorted(idle, key=lambda s: s.remaining > 1):
            if budget == 0 or len(chunks) == share:
                break
            if sequence not in self.running:  # preempted by one before it
                continue
            if sequence.remaining > 1:
                self._adopt(sequence, self._found(sequence))
            count = min(sequence.remaining, budget)
            if not self._make_room(sequence, count, (chunk.sequence for chunk in chunks)):
                if blocks_for(sequence.computed + count) > self.pool.size:
                    failed.append((sequence, self._too_long(sequence)))
                    self.finish(sequence)
                else:
                    self._preempt(sequence)
                continue
            drafts: tuple[int, ...] = ()
            if few and sequence.remaining == 1 and sequence.produced:
                drafts = self._drafts(sequence, len(idle), budget - 1)
            chunks.append(ScheduledChunk(sequence, count, drafts))
            budget -= count + len(drafts)
            if (sequence.computed + count) % BLOCK_SIZE < count:
                self._publish(sequence, count)
        while budget and len(chunks) < share and self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            need = blocks_for(len(sequence.tokens))
            if need > self.pool.size:
                self.waiting.popleft()
                failed.append((sequence, self._too_long(sequence)))
                continue
            # Room for its own next token as well, unless it is alone and may never need any.
            more = blocks_for(len(sequence.tokens) + 1) - need if self.running else 0
            found = self._found(sequence)
            if need + more - self.pool.held(found) > self.pool.free - self._growth():
                break
            self.waiting.popleft()
            bisect.insort(self.running, sequence, key=_rank)
            self._adopt(sequence, found)
            # The whole prompt's blocks at once: a chunked prompt can then always be finished.
            self._grow(sequence, len(sequence.tokens))
            count = min(sequence.remaining, budget)
            chunks.append(ScheduledChunk(sequence, count))
            budget -= count
            self._publish(sequence, count)
        for chunk in chunks:
            chunk.sequence.flying = True
        return Step(tuple(chunks), tuple(failed))

    def advance(self, step: Step) -> None:
        """Note that a step has run; those that were dropped meanwhile go."""
        for chunk in step.chunks:
            chunk.sequence.computed += chunk.count
            chunk.sequence.flying = False
            if chunk.sequence.dropped:
                self.finish(chunk.sequence)

    def accept(self, sequence: SequenceState, count: int) -> None:
        """Note that so many of the drafts that ran behind its last token are its tokens now."""
        self._publish(sequence, count)
        sequence.computed += count

    def _drafts(self, sequence: SequenceState, running: int, budget: int) -> tuple[int, ...]:
        """Guessed tokens to run behind its last one, with blocks for them; nobody gives way for a guess."""
        assert self.draft is not None
        room = len(sequence.blocks) * BLOCK_SIZE - sequence.computed - 1
        if self.pool.free > self._growth():
            room += BLOCK_SIZE
        drafts = tuple(self.draft(sequence, running, min(room, budget)))
        self._grow(sequence, sequence.computed + 1 + len(drafts))
        return drafts

    def _found(self, sequence: SequenceState) -> list[int]:
        """Blocks of its next tokens that the pool has, as many as leave it a token to run."""
        found: list[int] = []
        if not self.reuse or sequence.request.kind != "generate":
            return found
        for number in range(sequence.computed // BLOCK_SIZE, (len(sequence.tokens) - 1) // BLOCK_SIZE):
            block = self.pool.find(sequence.key(number))
            if block is None:
                break
            found.append(block)
        return found

    def _adopt(self, sequence: SequenceState, found: list[int]) -> None:
        """Go on behind these blocks, in the place of its own for those tokens."""
        if not found:
            return
        first, own = sequence.computed // BLOCK_SIZE, sequence.blocks
        self.pool.share(found)
        self.pool.release(own[first : first + len(found)])
        own[first : first + len(found)] = found
        behind = (first + len(found)) * BLOCK_SIZE
        self.reused_tokens += behind - sequence.computed
        sequence.reused += behind - sequence.computed
        sequence.computed = behind

    def _publish(self, sequence: SequenceState, count: int) -> None:
        """Let the blocks be found that its next tokens fill, which are in a step now."""
        if self.reuse:
            begin, end = sequence.computed, sequence.computed + count
            for number in range(begin // BLOCK_SIZE, end // BLOCK_SIZE):
                self.pool.publish(sequence.blocks[number], sequence.key(number))

    def _growth(self) -> int:
        """Blocks that the running sequences may take for their next token."""
        return sum(len(s.tokens) % BLOCK_SIZE == 0 for s in self.running)

    def _make_room(self, sequence: SequenceState, count: int, scheduled: Iterable[SequenceState]) -> bool:
        """Take the blocks for ``count`` more tokens, preempting later comers if need be."""
        need = blocks_for(sequence.computed + count) - len(sequence.blocks)
        if need > self.pool.free:
            kept = set(map(id, scheduled)) | {id(sequence)}
            for victim in reversed(self.running[self.running.index(sequence) + 1 :]):
                if id(victim) not in kept and not victim.flying:
                    self._preempt(victim)
                if need <= self.pool.free:
                    break
        if need > self.pool.free:
            return False
        self._grow(sequence, sequence.computed + count)
        return True

    def _grow(self, sequence: SequenceState, tokens: int) -> None:
        while len(sequence.blocks) < blocks_for(tokens):
            sequence.blocks.append(self.pool.take())

    def _preempt(self, sequence: SequenceState) -> None:
        self._release(sequence)
        sequence.rewind()
        self.running.remove(sequence)
        self._add_again(sequence)
        self.preemptions += 1

    def _add_again(self, sequence: SequenceState) -> None:
        """Queue a sequence that was admitted before, ahead of all that have its priority."""
        place = bisect.bisect_left(self.waiting, _rank(sequence), key=_rank)
        self.waiting.insert(place, sequence)

    def _release(self, sequence: SequenceState) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0

    def _too_long(self, sequence: SequenceState) -> str:
        return (
            f"{len(sequence.tokens)} tokens do not fit the KV cache, which holds "
            f"{self.pool.size * BLOCK_SIZE}; give load() a larger kv_memory"
        )


def _rank(sequence: SequenceState) -> int:
    return -sequence.request.priority
