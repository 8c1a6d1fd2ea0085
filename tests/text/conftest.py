"""Model directories of the sample tokenizers, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from daskllm.text import Tokenizer
from tests.text import samples


class Directory:
    """One directory, read by daskllm (``ours``) and by transformers (``theirs``)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ours = Tokenizer.from_directory(path)
        self.theirs: Any = AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Directory]:
    """Every kind of tokenizer, with its family's chat template where it has one."""
    root = tmp_path_factory.mktemp("tokenizers")
    chats = {"llama3": "llama3", "qwen": "qwen3", "mistral": "mistral", "mistral-first": "mistral"}
    found = {}
    for kind, (make, config) in samples.KINDS.items():
        files = {"chat_template.jinja": samples.template(chats[kind])} if kind in chats else {}
        found[kind] = Directory(samples.write(root / kind, make(), config, files))
    return found


@pytest.fixture(params=list(samples.KINDS))
def directory(request: pytest.FixtureRequest, directories: dict[str, Directory]) -> Directory:
    """Each kind in turn."""
    return directories[request.param]
