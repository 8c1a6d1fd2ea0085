"""Blocks found by content, without a model: a fake memory holds for each slot the tokens that made it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from daskllm.engine.batcher import Batcher, Step
from daskllm.engine.kvcache import BlockPool, block_key
from daskllm.engine.sequence import Request, SequenceState
from daskllm.engine.sizes import BLOCK_SIZE
from daskllm.types import SamplingParams

Kind = Literal["generate", "score", "embed"]


def row(prompt: Sequence[int], out: int = 1, kind: Kind = "generate", n: int = 1) -> SequenceState:
    params = SamplingParams(max_tokens=out, n=n, temperature=float(n > 1))
    return SequenceState.of(Request(list(prompt), params, kind=kind), 0)


def block(number: int) -> list[int]:
    return [number] * BLOCK_SIZE


class Watched(BlockPool):
    """Knows how often each block was given out."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.times = [0] * size

    def take(self) -> int:
        taken = super().take()
        self.times[taken] += 1
        return taken


class Machine:
    """Runs steps in the order in which they were made, as stages do, and checks their reads and writes."""

    def __init__(self, blocks: int, width: int, budget: int, flights: int = 1, reuse: bool = True) -> None:
        self.pool = Watched(blocks)
        self.batcher = Batcher(self.pool, width, budget, flights, reuse)
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.writers: dict[tuple[int, int], SequenceState] = {}
        self.copies: list[tuple[int, int]] = []
        self.under: deque[tuple[Step, list[tuple[int, int]], list[list[int]]]] = deque()
        self.computed = 0
        self.ended: list[SequenceState] = []
        self.failed: list[SequenceState] = []

    def add(self, *sequences: SequenceState) -> None:
        for sequence in sequences:
            self.batcher.add(sequence)

    def depart(self) -> bool:
        step = self.batcher.schedule()
        self.failed += [sequence for sequence, _ in step.failed]
        assert sum(chunk.count for chunk in step.chunks) <= self.batcher.max_tokens
        assert len({id(chunk.sequence) for chunk in step.chunks}) == len(step.chunks)
        held = {b for s in self.batcher.running for b in s.blocks}
        assert self.pool.used == len(held)
        for chunk in step.chunks:
            first, end = chunk.sequence.computed, chunk.sequence.computed + chunk.count
            assert chunk.count >= 1
            for number in range(first // BLOCK_SIZE, (end - 1) // BLOCK_SIZE + 1):
                written = chunk.sequence.blocks[number]
                writer = self.writers.setdefault((written, self.pool.times[written]), chunk.sequence)
                assert writer is chunk.sequence, "a block has one writer for as long as anybody holds it"
        if step.chunks:
            self.under.append((step, self.copies, [list(c.sequence.blocks) for c in step.chunks]))
            self.copies = []
        return bool(step.chunks or step.failed)

    def land(self) -> None:
        step, copies, tables = self.under.popleft()
        for source, target in copies:
            for i in range(BLOCK_SIZE):
                self.memory[target, i] = self.memory.get((source, i), ())
        for chunk, table in zip(step.chunks, tables, strict=True):
            tokens, start = chunk.sequence.tokens, chunk.sequence.computed
            assert chunk.sequence.blocks == table, "what a step holds, nobody touches"
            for p in range(start, start + chunk.count):
                self.memory[table[p // BLOCK_SIZE], p % BLOCK_SIZE] = tuple(tokens[: p + 1])
            self.computed += chunk.count
        for chunk, table in zip(step.chunks, tables, strict=True):
            tokens = chunk.sequence.tokens
            for p in range(chunk.sequence.computed + chunk.count):
                assert self.memory[table[p // BLOCK_SIZE], p % BLOCK_SIZE] == tuple(tokens[: p + 1])
        complete = [c.sequence for c in step.chunks if c.completes and not c.sequence.dropped]
        self.batcher.advance(step)
        for sequence in complete:
            self.go_on(sequence)

    def go_on(self, sequence: SequenceState) -> None:
        request = sequence.request
        siblings = range(1, request.params.n) if not sequence.sample and not sequence.produced else ()
        for sample in siblings:
            child = SequenceState.of(request, sample)
            child.tokens.append(100 + sample)
            if request.params.max_tokens == 1:
                self.ended.append(child)
            elif (copy := self.batcher.fork(sequence, child)) is not None:
                self.copies.append(copy)
        sequence.tokens.append(100 + sequence.sample)
        if request.kind != "generate" or sequence.produced >= request.params.max_tokens:
            self.batcher.finish(sequence)
            self.ended.append(sequence)

    def drive(self) -> None:
        for _ in range(100_000):
            if not (len(self.under) < self.batcher.flights and self.depart()):
                if not self.under:
                    break
                self.land()
        assert not self.batcher.waiting
        assert not self.batcher.running
        assert self.pool.used == 0


# Few different blocks, so that rows have much in common, and tails that end anywhere.
prompts = st.builds(
    lambda numbers, tail: [t for n in numbers for t in block(n)] + [9] * tail,
    st.lists(st.integers(1, 2), max_size=4),
    st.sampled_from([1, 7, 32, 40]),
)
kinds = st.sampled_from(["generate"] * 4 + ["score", "embed"])
rows = st.builds(row, prompts, st.integers(1, 40), kinds, st.integers(1, 3))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), reuse=st.booleans())
def test_every_read_is_what_the_row_s_own_tokens_make(data: st.DataObject, reuse: bool) -> None:
    """Rows that come, end, fork, give way and are dropped while steps are under way."""
    machine = Machine(
        data.draw(st.integers(4, 40)),
        data.draw(st.integers(1, 12)),
        data.draw(st.integers(1, 150)),
        data.draw(st.integers(1, 3)),
        reuse,
    )
    asked: list[SequenceState] = []
    for action in data.draw(st.lists(st.sampled_from("aaaaasssslllx!"), min_size=8, max_size=60)):
        if action == "a":
            asked.append(data.draw(rows))
            machine.add(asked[-1])
        elif action == "s" and len(machine.under) < machine.batcher.flights:
            machine.depart()
        elif action == "l" and machine.under:
            machine.land()
        elif action == "x" and asked:
            doomed = data.draw(st.sampled_from(asked)).request
            machine.batcher.abort(lambda s, doomed=doomed: s.request is doomed)
        elif action == "!":  # a step broke
            machine.under.clear()
            machine.copies.clear()
            machine.batcher.clear()
            machine.memory.clear()
            for sequence in asked:
                sequence.dropped = True
            assert machine.pool.used == 0
    machine.drive()
    ended = {id(s) for s in (*machine.ended, *machine.failed)}
    assert all(s.dropped or id(s) in ended for s in asked)
    assert reuse or machine.batcher.reused_tokens == 0


PREFIX = [t for n in range(8) for t in block(n + 10)]


def test_rows_that_come_together_compute_their_prefix_once() -> None:
    machine = Machine(2000, 64, 512)
    machine.add(*(row([*PREFIX, *[i] * 40], 5) for i in range(256)))
    machine.drive()
    # Every row its own 40 tokens and four that it generates; the prefix once.
    assert machine.computed == len(PREFIX) + 256 * (40 + 4)
    assert machine.batcher.reused_tokens == 255 * len(PREFIX)


def test_a_prefix_longer_than_a_step_is_computed_once_by_all_who_run() -> None:
    for flights in (1, 2, 3):
        machine = Machine(2000, 64, 96, flights)
        machine.add(*(row([*PREFIX, *[i] * 40], 5) for i in range(30)))
        machine.drive()
        assert machine.computed == len(PREFIX) + 30 * (40 + 4)


def test_the_last_token_of_a_prompt_that_is_there_runs_in_a_block_of_its_own() -> None:
    machine = Machine(20, 4, 512)
    first, second = row(PREFIX[:64], 3), row(PREFIX[:64], 3)
    machine.add(first)
    machine.depart()
    machine.land()
    machine.add(second)
    machine.depart()
    assert second.blocks[0] == first.blocks[0]
    assert second.blocks[1] != first.blocks[1]
    assert machine.batcher.reused_tokens == 32
    machine.drive()


def test_a_preempted_row_finds_its_own_blocks_again() -> None:
    machine = Machine(12, 8, 512)
    old, new = row([1] * 31, 200), row([2] * 250, 40)
    machine.add(old, new)
    machine.drive()
    assert machine.batcher.preemptions >= 1
    assert machine.batcher.reused_tokens >= 100


def test_what_is_read_whole_finds_nothing_and_is_found() -> None:
    machine = Machine(60, 8, 512)
    machine.add(row(PREFIX, kind="score"))
    machine.drive()
    machine.add(row(PREFIX, kind="embed"), row(PREFIX, kind="score"))
    machine.drive()
    assert machine.computed == 3 * len(PREFIX)
    machine.add(row(PREFIX))
    machine.drive()
    assert machine.computed == 3 * len(PREFIX) + BLOCK_SIZE


def test_blocks_that_are_kept_never_keep_a_row_waiting() -> None:
    machine = Machine(10, 8, 1000)
    for number in range(5):
        machine.add(row([number] * 319))
        machine.depart()
        assert len(machine.under) == 1
        machine.land()
    assert machine.batcher.preemptions == 0
    assert machine.pool.free == 10
    # A prefix that a running row holds takes no room a second time.
    machine.add(row([7] * 193, 20), row([7] * 193, 20), row([7] * 193, 20))
    machine.depart()
    assert len(machine.batcher.running) == 3


def test_the_longest_unused_goes_first_and_of_a_chain_its_end() -> None:
    pool = BlockPool(4)
    keys = [b"", *(bytes([i]) for i in range(1, 9))]
    chain = [pool.take() for _ in range(3)]
    for taken, key in zip(chain, keys[1:4], strict=True):
        pool.publish(taken, key)
    pool.release(chain)
    other = pool.take()
    pool.publish(other, keys[4])
    pool.release([other])
    assert (pool.free, pool.used) == (4, 0)
    pool.share([chain[0]])
    assert pool.held(chain) == 1
    assert [pool.take(), pool.take(), pool.take()] == [chain[2], chain[1], other]
    assert [pool.find(key) for key in keys[1:5]] == [chain[0], None, None, None]


def test_a_key_has_one_block_and_dies_with_it() -> None:
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    assert pool.find(b"a") == first
    pool.release([first])
    pool.release([second])
    assert pool.take() == second, "what cannot be found goes before what can"
    assert pool.take() == first
    assert pool.find(b"a") is None
    pool.publish(first, b"b")
    pool.release([first])
    pool.forget()
    assert pool.find(b"b") is None
    assert pool.free == 1


def test_no_new_memory_is_touched_for_what_nobody_asks_for_again() -> None:
    machine = Machine(4000, 64, 512)
    for number in range(300):
        machine.add(row([number] * 320))
        machine.drive()
    assert sum(time > 0 for time in machine.pool.times) <= 256 + 10


def test_keys_tell_order_and_place_apart() -> None:
    one, two = block_key(b"", block(1)), block_key(b"", block(2))
    assert len({one, two, block_key(one, block(2)), block_key(two, block(1)), block_key(one, block(1))}) == 5
