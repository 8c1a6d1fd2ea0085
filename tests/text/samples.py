"""Small tokenizers of every kind, and model directories made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEMPLATES = Path(__file__).parent / "templates"

CORPUS = [
    "Once upon a time there was a little girl who liked to read the news in the park.",
    "The order number is 4711, please send it back by the 3rd of May; it's broken.",
    "system user assistant tool ipython think tools name arguments parameters",
    "今天天气很好，我们一起去公园散步吧。",
    "这家餐厅的菜很好吃，服务也不错，下次还会再来。",
    "Caf\u00e9 na\u00efve 👩‍👩‍👧 🎉 end.",
] * 4

LLAMA3_SPECIAL = [
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_PLAIN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
MISTRAL_SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]


def byte_level(
    special: Sequence[str] = (), plain: Sequence[str] = (), *, in_vocab: Sequence[str] = ()
) -> tokenizers.Tokenizer:
    """A byte-level BPE such as GPT-2's; ``in_vocab`` are special tokens that its vocabulary holds too."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=list(in_vocab),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return tokenizer


def byte_fallback(
    special: Sequence[str] = MISTRAL_SPECIAL, plain: Sequence[str] = (), *, scheme: str = "prepend"
) -> tokenizers.Tokenizer:
    """A sentencepiece-like BPE such as Llama 2's, whose special tokens sit in the model's vocabulary."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    english = [line for line in CORPUS if line.isascii()]
    trained.train_from_iterator(
        english,
        trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *byte_tokens], show_progress=False),
    )
    saved = json.loads(trained.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in special]
    saved["model"]["fuse_unk"] = True
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(saved))
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = decoders.Strip(content=" ", left=1, right=0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", pair="<s>:0 $A:0 <s>:1 $B:1", special_tokens=[("<s>", bos)]
    )
    tokenizer.add_tokens([AddedToken(token, special=False) for token in plain])
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """A WordPiece whose words are split at spaces alone, so that "[CLS]" is a word of its vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    special = ["[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    return tokenizer


def word_level() -> tokenizers.Tokenizer:
    """A WordLevel with special tokens and a plain added one in its vocabulary."""
    words = ["<unk>", "<s>", "<think>", "hello", "world", "a", "e"]
    model = models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    """A Unigram with metaspace, whose special tokens would win any segmentation."""
    letters = [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyzOT<>/s|."]
    special = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces = [*special, ("▁", -2.0), ("▁the", -3.0), ("▁a", -3.0), *letters]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def template(name: str) -> str:
    """A chat template in the structure of a well-known family's."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def write(
    path: Path,
    tokenizer: tokenizers.Tokenizer,
    config: dict[str, Any] | None = None,
    files: dict[str, str] | None = None,
) -> Path:
    """A model directory with a tokenizer, its config, and further files by name."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | (config or {})
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, text in (files or {}).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")
    return path


KINDS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], dict[str, Any]]] = {
    "llama3": (
        lambda: byte_level(LLAMA3_SPECIAL),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "qwen": (lambda: byte_level(QWEN_SPECIAL, QWEN_PLAIN), {"eos_token": "<|im_end|>"}),
    "gpt2": (lambda: byte_level(in_vocab=["<|endoftext|>"]), {"eos_token": "<|endoftext|>"}),
    "mistral": (byte_fallback, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "mistral-first": (lambda: byte_fallback(plain=["<think>"], scheme="first"), {"bos_token": "<s>"}),
    "word-piece": (word_piece, {"unk_token": "[UNK]"}),
    "word-level": (word_level, {"bos_token": "<s>"}),
    "unigram": (unigram, {"bos_token": "<s>", "eos_token": "</s>"}),
}
"""Name → (a tokenizer, what its tokenizer_config.json says)."""
