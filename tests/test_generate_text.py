"""The two plain functions, on Chinese prompts and a model of GPT-2's shape with a byte-level vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import daskllm
from daskllm.types import RowError
from tests import tiny

PROMPTS = ["今天天气很好", "明天我要去旅行", "我喜欢吃苹果"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model("gpt2", tmp_path_factory.mktemp("gpt2"))


def test_many_are_each_alone_in_order(path: Path) -> None:
    llm = daskllm.load(path)
    try:
        together = daskllm.parallel_generate_text(PROMPTS, llm, num_workers=4, max_length=50)
        alone = [daskllm.generate_text(prompt, llm, max_length=50) for prompt in PROMPTS]
        assert together == alone
        assert all(isinstance(text, str) and text.encode("utf-8") for text in together)
        assert daskllm.parallel_generate_text(PROMPTS[::-1], llm, num_workers=2) == together[::-1]
        for prompt, text in zip(PROMPTS, together, strict=True):
            ids = llm.tokenizer.encode(prompt)
            with torch.inference_mode():
                whole = tiny.oracle(path).generate(
                    torch.tensor([ids]), max_new_tokens=50, do_sample=False, pad_token_id=0
                )
            new = whole[0, len(ids) :].tolist()
            assert text == llm.tokenizer.decode(new[:-1] if new[-1] == tiny.EOS else new)
    finally:
        llm.close()


def test_a_path_will_do(path: Path) -> None:
    texts = daskllm.parallel_generate_text(PROMPTS, path, max_length=5)
    assert texts == [daskllm.generate_text(prompt, str(path), max_length=5) for prompt in PROMPTS]


def test_a_bad_prompt_is_an_error(path: Path) -> None:
    with pytest.raises(RowError, match="empty"):
        daskllm.generate_text("", path)
    with pytest.raises(ValueError, match="num_workers"):
        daskllm.parallel_generate_text(PROMPTS, path, num_workers=0)
