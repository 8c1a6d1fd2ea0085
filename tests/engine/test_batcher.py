"""The state machine without a model: a fake engine runs its steps and checks what must always hold."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from daskllm.engine.batcher import Batcher, Step
from daskllm.engine.kvcache import BlockPool, blocks_for
from daskllm.engine.sequence import Request, SequenceState
from daskllm.engine.sizes import BLOCK_SIZE
from daskllm.types import SamplingParams


def sequence(prompt: int, out: int = 1, priority: int = 0) -> SequenceState:
    return SequenceState.of(Request([1] * prompt, SamplingParams(max_tokens=out), priority=priority), 0)


def counts(step: Step) -> list[int]:
    return [chunk.count for chunk in step.chunks]


def check(batcher: Batcher, step: Step) -> None:
    """What holds after every decision."""
    held = Counter(block for s in batcher.running for block in s.blocks)
    assert batcher.pool.used == len(held)
    assert sum(counts(step)) <= batcher.max_tokens
    assert len(batcher.running) <= batcher.max_sequences
    assert not any(s.blocks or s.computed for s in batcher.waiting)
    for rows in (batcher.waiting, batcher.running):
        priorities = [s.request.priority for s in rows]
        assert priorities == sorted(priorities, reverse=True)
    for chunk in step.chunks:
        assert chunk.sequence in batcher.running
        assert 1 <= chunk.count <= chunk.sequence.remaining
        assert len(chunk.sequence.blocks) >= blocks_for(chunk.sequence.computed + chunk.count)


def drive(batcher: Batcher, limit: int = 10_000) -> list[SequenceState]:
    """Run until nothing is left; the sequences in the order in which they ended."""
    done = []
    for _ in range(limit):
        step = batcher.schedule()
        check(batcher, step)
        done += [s for s, _ in step.failed]
        if not step.chunks and not step.failed:
            break
        complete = [c.sequence for c in step.chunks if c.completes]
        batcher.advance(step)
        for s in complete:
            s.tokens.append(0)
            if s.produced >= s.request.params.max_tokens:
                batcher.finish(s)
                done.append(s)
    assert not batcher.waiting
    assert not batcher.running
    assert batcher.pool.used == 0
    return done


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 150), st.integers(1, 90), st.integers(0, 2)), min_size=1, max_size=25
    ),
    blocks=st.integers(1, 24),
    width=st.integers(1, 8),
    budget=st.integers(1, 200),
)
def test_every_row_ends_and_nothing_leaks(
    rows: list[tuple[int, int, int]], blocks: int, width: int, budget: int
) -> None:
    batcher = Batcher(BlockPool(blocks), width, budget)
    wanted = [sequence(*row) for row in rows]
    for s in wanted:
        batcher.add(s)
    done = drive(batcher)
    assert Counter(map(id, done)) == Counter(map(id, wanted))
    for s in wanted:
        prompt, out = len(s.request.prompt), s.request.params.max_tokens
        # The last token's own key and value are never needed.
        fits = blocks_for(prompt + out - 1) <= blocks
        assert (s.produced == out) == fits


def test_prompts_are_cut_to_the_budget_and_decode_goes_first() -> None:
    batcher = Batcher(BlockPool(100), 8, 64)
    first, second = sequence(10, 50), sequence(150)
    batcher.add(first)
    step = batcher.schedule()
    assert counts(step) == [10]
    batcher.advance(step)
    first.tokens.append(7)
    batcher.add(second)
    step = batcher.schedule()
    assert [c.sequence for c in step.chunks] == [first, second]
    assert counts(step) == [1, 63]
    batcher.advance(step)
    first.tokens.append(7)
    assert counts(batcher.schedule()) == [1, 63]


def test_the_last_comer_gives_way() -> None:
    batcher = Batcher(BlockPool(5), 8, 512)
    old, new = sequence(BLOCK_SIZE - 1, 200), sequence(2 * BLOCK_SIZE, 200)
    for s in (old, new):
        batcher.add(s)
    while batcher.preemptions == 0:
        step = batcher.schedule()
        check(batcher, step)
        complete = [c.sequence for c in step.chunks if c.completes]
        batcher.advance(step)
        for s in complete:
            s.tokens.append(0)
    assert batcher.running == [old]
    assert list(batcher.waiting) == [new]
    assert new.produced > 0, "it keeps the tokens that it has"


def test_an_urgent_row_goes_before_those_that_wait_and_behind_its_like() -> None:
    batcher = Batcher(BlockPool(100), 2, 512)
    job = [sequence(4, 50) for _ in range(5)]
    first, second = sequence(4, 50, priority=1), sequence(4, 50, priority=1)
    for s in (*job, first, second):
        batcher.add(s)
    assert list(batcher.waiting) == [first, second, *job]
    batcher.waiting.clear()
    for s in job:
        batcher.add(s)
    batcher.advance(batcher.schedule())
    batcher.add(first)
    batcher.add(second)
    batcher.finish(job[1])
    step = batcher.schedule()
    assert {c.sequence for c in step.chunks} == {job[0], first}
    assert list(batcher.waiting) == [second, *job[2:]]


def test_an_urgent_row_keeps_its_blocks_longest() -> None:
    batcher = Batcher(BlockPool(5), 8, 512)
    old, urgent = sequence(BLOCK_SIZE - 1, 200), sequence(2 * BLOCK_SIZE, 200, priority=1)
    batcher.add(old)
    batcher.advance(batcher.schedule())
    old.tokens.append(0)
    batcher.add(urgent)
    while batcher.preemptions == 0:
        step = batcher.schedule()
        check(batcher, step)
        complete = [c.sequence for c in step.chunks if c.completes]
        batcher.advance(step)
        for s in complete:
            s.tokens.append(0)
    assert batcher.running == [urgent]
    assert list(batcher.waiting) == [old]


def test_a_row_that_can_never_fit_fails_and_the_next_runs() -> None:
    batcher = Batcher(BlockPool(2), 8, 512)
    long, short = sequence(3 * BLOCK_SIZE), sequence(4)
    batcher.add(long)
    batcher.add(short)
    step = batcher.schedule()
    assert [c.sequence for c in step.chunks] == [short]
    [(failed, why)] = step.failed
    assert failed is long
    assert "kv_memory" in why


def test_siblings_share_whole_blocks_and_copy_the_last() -> None:
    batcher = Batcher(BlockPool(10), 8, 512)
    parent = sequence(BLOCK_SIZE + 5, 9)
    batcher.add(parent)
    batcher.advance(batcher.schedule())
    child = SequenceState.of(parent.request, 1)
    copy = batcher.fork(parent, child)
    assert child.blocks[0] == parent.blocks[0]
    assert copy == (parent.blocks[1], child.blocks[1])
    assert child.computed == parent.computed
    batcher.finish(parent)
    assert batcher.pool.used == 2
    batcher.finish(child)
    assert batcher.pool.used == 0


def test_abort_frees_what_was_held() -> None:
    batcher = Batcher(BlockPool(10), 1, 512)
    running, waiting, other = sequence(40), sequence(40), sequence(40)
    for s in (running, waiting, other):
        batcher.add(s)
    step = batcher.schedule()
    assert batcher.abort(lambda s: s is not other) == 2
    assert batcher.pool.used == 2  # a step under way reads and writes them
    batcher.advance(step)
    assert batcher.pool.used == 0
    assert list(batcher.waiting) == [other]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_several_steps_under_way_share_the_blocks(data: st.DataObject) -> None:
    """Steps land in the order in which they left; none touches what another holds; all rows end."""
    flights, blocks = data.draw(st.integers(2, 4)), data.draw(st.integers(2, 12))
    batcher = Batcher(BlockPool(blocks), 64, data.draw(st.integers(1, 80)), flights)
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=12))
    rows = [sequence(*length) for length in lengths]
    for row in rows:
        batcher.add(row)
    under: list[tuple[Step, list[list[int]]]] = []
    ended: set[int] = set()
    for _ in range(20_000):
        step = batcher.schedule() if len(under) < flights else Step(())
        ended |= {id(s) for s, _ in step.failed}
        assert not {id(c.sequence) for c in step.chunks} & {
            id(c.sequence) for u, _ in under for c in u.chunks
        }
        if step.chunks:
            check(batcher, step)
            under.append((step, [list(c.sequence.blocks) for c in step.chunks]))
        elif not under and not step.failed:
            break
        elif under:
            landed, held = under.pop(0)
            assert [c.sequence.blocks for c in landed.chunks] == held
            complete = [c.sequence for c in landed.chunks if c.completes]
            batcher.advance(landed)
            for row in complete:
                row.tokens.append(0)
                if row.produced >= row.request.params.max_tokens:
                    batcher.finish(row)
                    ended.add(id(row))
    assert ended == set(map(id, rows))
    assert batcher.pool.used == 0


def test_rows_spread_over_the_steps_under_way() -> None:
    batcher = Batcher(BlockPool(100), 64, 512, flights=2)
    for _ in range(10):
        batcher.add(sequence(10, 50))
    first, second = batcher.schedule(), batcher.schedule()
    assert (len(first.chunks), len(second.chunks)) == (5, 5)
    batcher.advance(first)
    for chunk in first.chunks[:4]:
        batcher.finish(chunk.sequence)
    # Of six rows that are left, five are under way: the step after theirs takes no more than its half.
    assert len(batcher.schedule().chunks) == 1
    batcher.advance(second)
    assert len(batcher.schedule().chunks) == 3
