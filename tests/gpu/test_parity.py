"""On a GPU the same tokens and logits as transformers gives there; needs CUDA, and no Dask (`make gpu`)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from daskllm.blocks import array
from daskllm.blocks.store import STORE
from daskllm.engine.kvcache import blocks_for, bytes_per_block
from daskllm.session import Session
from daskllm.types import ModelSpec, SamplingParams
from tests.tiny import CONFIGS, make_model, oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
# TF32 would round the oracle's float32 products, and ours, to ten bits.
torch.backends.cuda.matmul.allow_tf32 = False

PROMPTS = [
    [256, 72, 101, 108, 108, 111],
    [9],
    list(range(5, 75)),
    [40, 41, 42, 43] * 8,
    [100, 3, 77],
    list(range(200, 120, -1)),
    [12, 250, 12, 250, 12],
    [65] * 17,
]
NEW = 32


@contextmanager
def opened(path: Path, dtype: str = "float32", kv_memory: int | None = None) -> Iterator[Session]:
    session = Session.open(ModelSpec(path=str(path), dtype=dtype, device="cuda", kv_memory=kv_memory))
    try:
        yield session
    finally:
        session.close()


def greedy(session: Session, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    return [answers[0].token_ids for answers in session.generate(prompts, params)]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_transformers(name: str, tmp_path: Path) -> None:
    path = make_model(name, tmp_path / "model")
    model = oracle(path).to("cuda")
    model.generation_config.eos_token_id = None  # an end token is a token like any other here
    with opened(path) as session:
        vocab = session.config.vocab_size
        prompts = [[token % vocab for token in prompt] for prompt in PROMPTS]
        answers = greedy(session, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW,
                pad_token_id=0,
            )
        assert answer == tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_transformers_log_probabilities(name: str, tmp_path: Path) -> None:
    path = make_model(name, tmp_path / "model")
    model = oracle(path).to("cuda")
    with opened(path) as session:
        vocab = session.config.vocab_size
        prompts = [[token % vocab for token in prompt] for prompt in PROMPTS if len(prompt) > 1]
        scores = session.score(prompts)
    for prompt, score in zip(prompts, scores, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        with torch.inference_mode():
            logprobs = model(ids).logits[0].double().log_softmax(-1)
        expected = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(score.token_logprobs, dtype=torch.float64), expected.cpu(), atol=1e-4, rtol=0
        )


def test_blocks_are_cupy_arrays_that_torch_sees_without_a_copy(tmp_path: Path) -> None:
    cupy = pytest.importorskip("cupy")
    with opened(make_model("llama-gqa", tmp_path / "model")):
        keys = STORE.keys()
        assert keys
        for key in keys:
            block = STORE.get(key)
            assert isinstance(block, cupy.ndarray)
            assert array.to_torch(block, "float32").data_ptr() == block.data.ptr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_row_alone_is_the_row_in_a_batch(dtype: str, tmp_path: Path) -> None:
    """Where a batch changes the last bits of a product, tokens may still not change in float32."""
    with opened(make_model("llama-gqa", tmp_path / "model", dtype=dtype), dtype) as session:
        together = greedy(session, PROMPTS)
        alone = [greedy(session, [prompt])[0] for prompt in PROMPTS]
    assert [len(answer) for answer in together] == [NEW] * len(PROMPTS)
    if dtype == "float32":
        assert together == alone


def test_so_little_kv_memory_that_rows_are_preempted(tmp_path: Path) -> None:
    path = make_model("llama-gqa", tmp_path / "model")
    with opened(path) as session:
        expected = greedy(session, PROMPTS)
        config = session.config
    block = bytes_per_block(config.num_layers, config.num_kv_heads, config.head_dim, itemsize=4)
    longest = max(map(len, PROMPTS)) + NEW
    with opened(path, kv_memory=2 * blocks_for(longest) * block) as session:
        assert greedy(session, PROMPTS) == expected
        assert session.engine.metrics.preemptions > 0


def test_closing_gives_the_memory_back(tmp_path: Path) -> None:
    path = make_model("llama-gqa", tmp_path / "model")
    with opened(path) as session:
        greedy(session, PROMPTS[:1])
        held = torch.cuda.memory_allocated()
        assert held > 0
    del session
    gc.collect()
    assert STORE.keys() == []
    assert torch.cuda.memory_allocated() < held
