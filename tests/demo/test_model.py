"""The shipped model: small, complete, and right on text that it has never seen."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

import daskllm
from daskllm import demo
from daskllm.demo import tasks

LIMIT = 8_000_000  # bytes of safetensors
ROWS = 600


def test_the_weights_are_small() -> None:
    assert 0 < sum(path.stat().st_size for path in demo.model_path().glob("*.safetensors")) <= LIMIT


def test_the_directory_is_complete_and_nothing_else() -> None:
    assert {path.name for path in demo.model_path().iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_tokenizer_is_as_transformers_has_it() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.model_path())
    config = json.loads((demo.model_path() / "generation_config.json").read_text(encoding="utf-8"))
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.bos_token_id == config["bos_token_id"]
    messages = [{"role": "system", "content": "请简短回答。"}, {"role": "user", "content": "猫在哪里？🐈"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>请简短回答。<|end|><|user|>猫在哪里？🐈<|end|><|assistant|>"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == text
    for row in tasks.sample(60, 5, of_held_out=True):
        assert tokenizer.decode(tokenizer.encode(row.prompt), skip_special_tokens=True) == row.prompt


def _shares(rows: list[tasks.Row], texts: list[str | None]) -> dict[tuple[str, str], float]:
    right = defaultdict(list)
    for row, text in zip(rows, texts, strict=True):
        right[row.task, row.language].append(text == row.answer)
    return {kind: sum(marks) / len(marks) for kind, marks in right.items()}


def test_held_out_rows_are_answered_exactly() -> None:
    rows = tasks.sample(ROWS, seed=11, of_held_out=True)
    llm = daskllm.load(demo.model_path())
    try:
        answers = llm.chat([[{"role": "user", "content": row.prompt}] for row in rows], max_tokens=32)
    finally:
        llm.close()
    texts = [answer.text for answer in answers]
    overall = sum(text == row.answer for row, text in zip(rows, texts, strict=True)) / ROWS
    shares = _shares(rows, texts)
    assert overall >= 0.95, shares
    assert set(shares) == set(tasks.KINDS)
    assert min(shares.values()) >= 0.90, shares


def test_the_sample_table_is_answered_as_plain_text_too() -> None:
    table = demo.table()
    llm = daskllm.load(demo.model_path())
    try:
        answers = llm.generate(list(table["prompt"]), max_tokens=32)
    finally:
        llm.close()
    frame = table.assign(generated=[answer.text for answer in answers])
    assert demo.share_right(frame) >= 0.95
