"""The engine against transformers: same logits, same greedy tokens, for every family and option."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from daskllm.engine.batch import Batch, Chunk
from daskllm.engine.kvcache import blocks_for
from daskllm.session import Session
from daskllm.types import ModelSpec, SamplingParams
from tests import tiny

NEW_TOKENS = 64
LENGTHS = (1, 3, 31, 32, 33, 64, 90, 150)


def prompts(vocab: int) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(vocab) for _ in range(length)] for length in LENGTHS]


def all_logits(session: Session, ids: list[int]) -> torch.Tensor:
    """Logits at every position of one sequence, in one prefill."""
    blocks = list(range(blocks_for(len(ids))))
    runner = session.engine.runner
    return runner.logits(runner.run(Batch.of([Chunk(ids, 0, blocks, range(len(ids)))])))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    path = tiny.make_model(name, tmp_path / name)
    oracle = tiny.oracle(path)
    session = Session.open(ModelSpec(path=str(path)))
    try:
        rows = prompts(session.config.vocab_size)
        answers = session.generate(rows, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
        scores = session.score(rows)
        for ids, [answer], score in zip(rows, answers, scores, strict=True):
            whole = [*ids, *answer.token_ids]
            with torch.inference_mode():
                expected = oracle(torch.tensor([whole])).logits[0]
            found = all_logits(session, whole)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
            # Greedy at every step: the oracle's choice after each prefix is the next token.
            assert expected[len(ids) - 1 : -1].argmax(-1).tolist() == list(answer.token_ids)
            assert len(answer.token_ids) == NEW_TOKENS
            logprobs = expected[: len(ids) - 1].log_softmax(-1)
            each = logprobs.gather(1, torch.tensor(ids[1:], dtype=torch.int64)[:, None])[:, 0]
            assert score.token_logprobs == pytest.approx(each.tolist(), abs=1e-4)
            assert score.logprob == pytest.approx(each.double().sum().item(), abs=1e-3)
    finally:
        session.close()
