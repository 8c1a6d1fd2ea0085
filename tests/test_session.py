"""A model open in this process: text in, completions out, and what bad rows get."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from daskllm import session as session_module
from daskllm.blocks.store import STORE
from daskllm.session import Progress, Session
from daskllm.text.watch import TextWatcher
from daskllm.types import Completion, Message, ModelError, ModelSpec, Prompt, RowError, SamplingParams
from tests import tiny

STORIES = Path(__file__).parents[2] / "shared/models/stories260K"
PUBLISHED = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she \
saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to \
play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." Her mom said, \
"Don't worry, Lily. We can help you"""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    path = tiny.make_model("llama-gqa", tmp_path_factory.mktemp("model"))
    opened = Session.open(ModelSpec(path=str(path)))
    yield opened
    opened.close()


def one(session: Session, prompt: Prompt, **sampling: Any) -> Completion:
    return session.generate([prompt], SamplingParams(**sampling))[0][0]


@pytest.mark.skipif(not STORIES.is_dir(), reason="the published model is not beside this checkout")
def test_published_text_to_the_letter() -> None:
    stories = Session.open(ModelSpec(path=str(STORIES)))
    try:
        answer = one(stories, [1], max_tokens=255)
        assert answer.text == PUBLISHED
        assert answer.completion_tokens == 255
        assert "".join(stories.stream([1], SamplingParams(max_tokens=255))) == PUBLISHED
    finally:
        stories.close()


def test_completion_counts(session: Session) -> None:
    answer = one(session, "xyz", max_tokens=5, ignore_eos=True)
    assert answer.prompt_tokens == 1 + len("xyz")  # the beginning token
    assert answer.completion_tokens == len(answer.token_ids) == 5
    assert (answer.finish_reason, answer.error, answer.logprobs) == ("length", None, None)


def test_end_token_is_in_the_ids_and_not_in_the_text(session: Session) -> None:
    free = one(session, "hello", max_tokens=6, ignore_eos=True)
    end = free.token_ids[3]
    first = free.token_ids.index(end)
    stopped = one(session, "hello", max_tokens=6, ignore_eos=True, stop_token_ids=end)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.text == session.tokenizer.decode(free.token_ids[:first])


def test_stop_string_cuts_the_text(session: Session) -> None:
    free = one(session, "stop", max_tokens=60, ignore_eos=True)
    assert free.text is not None
    for start in range(len(free.text) - 3):
        stop = free.text[start : start + 2]
        answer = one(session, "stop", max_tokens=60, ignore_eos=True, stop=[stop, "never there"])
        assert answer.text == free.text[: free.text.index(stop)]
        assert answer.finish_reason == "stop"
        pieces = list(
            session.stream("stop", SamplingParams(max_tokens=60, ignore_eos=True, stop=[stop, "never there"]))
        )
        assert "".join(pieces) == answer.text


def test_min_tokens_lets_a_stop_string_pass(session: Session) -> None:
    free = one(session, "stop", max_tokens=40, ignore_eos=True)
    assert free.text is not None
    stop = session.tokenizer.decode(free.token_ids[:2])[:1]
    answer = one(session, "stop", max_tokens=40, ignore_eos=True, stop=stop, min_tokens=20)
    assert answer.completion_tokens >= 20
    assert answer.token_ids == free.token_ids[: answer.completion_tokens]


def test_samples_differ_and_repeat_with_the_seed(session: Session) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=4, n=3, ignore_eos=True)
    [first] = session.generate(["abc"], params)
    assert len({answer.token_ids for answer in first}) == 3
    again = session.generate(["other row", "abc", "abc"], params, job_seed=99)
    assert again[1] == again[2] == first
    single = session.generate(["abc"], dataclasses.replace(params, n=1))
    assert single[0][0] == first[0]


def test_without_a_seed_rows_draw_by_place(session: Session) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)
    rows = session.generate(["abc"] * 4, params, job_seed=1)
    assert len({row[0].token_ids for row in rows}) == 4
    moved = session.generate(["abc"], params, job_seed=1, places=[(2,)])
    assert moved[0] == rows[2]
    other = session.generate(["abc"] * 4, params, job_seed=2)
    assert not {row[0].token_ids for row in other} & {row[0].token_ids for row in rows}


def test_each_row_can_have_its_own_params(session: Session) -> None:
    each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 9, 4)]
    rows = session.generate(["a", "b", "c"], each)
    assert [row[0].completion_tokens for row in rows] == [1, 9, 4]


def test_messages_go_through_the_template(session: Session) -> None:
    chat: list[Message] = [{"role": "user", "content": "hi"}]
    by_chat = one(session, chat, max_tokens=5)
    assert by_chat == one(session, session.tokenizer.encode_chat(chat), max_tokens=5)


BAD_ROWS: list[tuple[Prompt, str]] = [
    (RowError("column 'x' is null"), "null"),
    ("", "empty"),
    ([], "empty"),
    ("x" * 300, "context"),
    ("bad \ud800 text", "surrogate"),
    ([1, 2, 99999], "vocabulary"),
    ([1, "two"], "not an integer"),  # type: ignore[list-item]
    ([{"role": "user"}], "content"),
]


def test_a_bad_row_keeps_its_error_and_its_neighbours_do_not_change(session: Session) -> None:
    good: list[Prompt] = ["first", "second row", "third one here"]
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.8, seed=3)
    expected = session.generate(good, params)
    mixed: list[Prompt] = []
    for i, (prompt, _) in enumerate(BAD_ROWS):
        mixed += [good[i % 3], prompt]
    found = session.generate(mixed, params)
    for i, (_, words) in enumerate(BAD_ROWS):
        assert found[2 * i] == expected[i % 3]
        [bad] = found[2 * i + 1]
        assert (bad.text, bad.finish_reason, bad.token_ids) == (None, "error", ())
        assert bad.error is not None
        assert words in bad.error


def test_special_tokens_spelled_in_text_are_text(session: Session) -> None:
    ids = session.tokenizer.encode("a</s>b<|im_end|>")
    assert tiny.EOS not in ids
    assert session.generate(["a</s>b"], SamplingParams(max_tokens=3))[0][0].prompt_tokens == 1 + len("a</s>b")


def test_truncate_left_keeps_the_newest_tokens(session: Session) -> None:
    ids = [i % 250 for i in range(400)]
    answer = one(session, ids, max_tokens=20, ignore_eos=True, truncate="left")
    kept = session.context - 20
    assert answer.prompt_tokens == kept
    assert answer.token_ids == one(session, ids[-kept:], max_tokens=20, ignore_eos=True).token_ids


def test_generation_ends_at_the_context(session: Session) -> None:
    answer = one(session, [7] * (session.context - 3), max_tokens=50, ignore_eos=True)
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 3)


def test_score_of_bad_rows(session: Session) -> None:
    good, empty, long = session.score(["some text", "", "x" * 400])
    assert good.error is None
    assert good.tokens == len(good.token_logprobs) + 1
    assert empty.error == "prompt is empty"
    assert long.error is not None
    assert long.logprob != long.logprob


def test_progress_adds_up(session: Session) -> None:
    seen: list[Progress] = []
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    session.generate(["a", "", "bc"], params, progress=seen.append)
    assert sum(p.rows for p in seen) == 3
    assert sum(p.errors for p in seen) == 1
    assert sum(p.output_tokens for p in seen) == 12
    assert sum(p.prompt_tokens for p in seen) == 2 + 3


def test_cancelled_rows_stop(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_POLL_SECONDS", 0.0)
    with pytest.raises(InterruptedError):
        session.generate(["a"] * 8, SamplingParams(max_tokens=240, ignore_eos=True), cancelled=lambda: True)
    assert one(session, "a", max_tokens=2, ignore_eos=True).completion_tokens == 2
    assert session.engine.batcher.pool.used == 0


def test_an_interrupt_stops_the_rows(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session.engine, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.generate(["a"] * 4, SamplingParams(max_tokens=240, ignore_eos=True))
    assert one(session, "a", max_tokens=2, ignore_eos=True).completion_tokens == 2
    assert session.engine.batcher.pool.used == 0


def test_two_callers_share_the_batch(session: Session) -> None:
    threads = [
        threading.Thread(
            target=session.generate,
            args=(["a b c"] * 4, SamplingParams(max_tokens=200, ignore_eos=True)),
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(step.callers for step in session.engine.metrics.history) == 2


def test_leaving_a_stream_stops_it(session: Session) -> None:
    stream = session.stream("a", SamplingParams(max_tokens=240, ignore_eos=True))
    next(stream)
    stream.close()
    one(session, "a", max_tokens=1, ignore_eos=True)
    assert session.engine.batcher.pool.used == 0
    with pytest.raises(RowError, match="empty"):
        next(session.stream("", SamplingParams()))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_dtypes(stored: str, dtype: str, tmp_path: Path) -> None:
    path = tiny.make_model("qwen2", tmp_path / "model", dtype=stored)
    oracle = tiny.oracle(path, stored)
    opened = Session.open(ModelSpec(path=str(path), dtype=dtype))
    try:
        ids = list(range(20))
        [score] = opened.score([ids])
        expected = oracle.float()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        each = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        exact = "bfloat16" not in (stored if dtype == "auto" else dtype)
        assert score.token_logprobs == pytest.approx(each, abs=1e-3 if exact else 0.5)
    finally:
        opened.close()


def test_nothing_stays_after_a_failed_open(tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = STORE.nbytes()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        Session.open(ModelSpec(path=str(path)))
    assert STORE.nbytes() == before


def test_kv_memory_must_hold_a_block(tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    with pytest.raises(ValueError, match="kv_memory"):
        Session.open(ModelSpec(path=str(path), kv_memory=10))


def test_two_sessions_of_one_directory_do_not_touch_each_others_weights(tmp_path: Path) -> None:
    path = tiny.make_model("gpt2", tmp_path / "model")
    first, second = (Session.open(ModelSpec(path=str(path), kv_memory=m)) for m in (None, 10**7))
    expected = one(first, "abc", max_tokens=8, ignore_eos=True)
    first.close()
    assert one(second, "abc", max_tokens=8, ignore_eos=True) == expected
    second.close()


def test_a_row_that_is_too_long_says_how_long(session: Session) -> None:
    assert one(session, [5] * 300).prompt_tokens == 300
    [score] = session.score([[5] * 300])
    assert score.error is not None
    assert "answer" not in score.error


def test_a_short_stop_string_before_min_tokens_stays_passed() -> None:
    class Letters:
        special_ids = frozenset[int]()

        def piece(self, id_: int, *, first: bool) -> bytes:
            return bytes([id_])

    stop = ("a", "0123456789")
    watcher = TextWatcher(Letters(), stop, 5, frozenset(), None)  # type: ignore[arg-type]
    text = b"xxaxbyaz"
    ended = [watcher.push(list(text[: i + 1])) for i in range(len(text))]
    assert ended.index(True) == 6
    assert watcher.cut == "xxaxby"


def test_urgent_rows_go_before_those_that_wait(session: Session) -> None:
    """A call beside a job of far more rows than run together: it is back when most of them still wait."""
    done: list[int] = []
    given_up = threading.Event()
    began = threading.Event()

    def job() -> None:
        def count(progress: Progress) -> None:
            done.append(progress.rows)

        def unwanted() -> bool:
            began.set()
            return given_up.is_set()

        params = SamplingParams(max_tokens=100, ignore_eos=True)
        with pytest.raises(InterruptedError):
            session.generate(["job"] * 4000, params, progress=count, cancelled=unwanted)

    thread = threading.Thread(target=job)
    thread.start()
    try:
        assert began.wait(30)
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        [[answer]] = session.generate(["call"], params, priority=1)
        assert answer.completion_tokens == 2
        assert sum(done) < 2000
    finally:
        given_up.set()
        thread.join()
