"""A model of a real shape with random weights, and a work file of skewed lengths: inputs of the benchmarks.

Speed does not depend on what the weights are, so nothing has to be downloaded.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
from pathlib import Path
from random import Random
from typing import Any

INPUTS = Path(__file__).resolve().parents[2] / "build" / "bench"
VOCABULARY = 49152
# 135M and 0.5B have the sizes of SmolLM2-135M and Qwen2.5-0.5B, with this vocabulary.
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}


def make_model(path: Path, shape: str = "135M", dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Write a Llama of random weights with a byte-level tokenizer, unless it is there already."""
    if (path / "tokenizer.json").exists():
        return path
    # Late, as they take seconds and most benchmarks make no model.
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPES[shape],
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<|end|>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|end|>", "eos_token": "<|end|>"}))
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def make_work(path: Path, rows: int = 64, seed: int = 0, prefix: int = 0, out: int | None = None) -> Path:
    """Write `rows` random prompts; lengths are log-normal, so that a few rows are far longer than the rest.

    Medians: 100 tokens in (16 to 512), 40 out (4 to 256) or `out` for each. All begin with the same `prefix`
    tokens, which come on top.
    """
    draw = Random(seed)
    of_prefix = Random(seed + 1)
    beginning = [of_prefix.randrange(1, VOCABULARY) for _ in range(prefix)]

    def length(median: float, spread: float, least: int, most: int) -> int:
        return round(min(most, max(least, math.exp(draw.gauss(math.log(median), spread)))))

    work = []
    for _ in range(rows):
        prompt = [draw.randrange(1, VOCABULARY) for _ in range(length(100, 0.6, 16, 512))]
        drawn = length(40, 0.9, 4, 256)
        work.append({"prompt": beginning + prompt, "out": out or drawn})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(work))
    return path


def last_line(command: list[str]) -> dict[str, Any]:
    """Run a command; the JSON on its last line."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
