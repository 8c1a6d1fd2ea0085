"""What the corpus shares: a tiny model, open once, and the command with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import daskllm
from daskllm.cli import answer, main
from tests.tiny import make_model

Command = Callable[..., Result]


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny random Llama with a context of 256 tokens, a byte each."""
    return make_model("llama-gqa", tmp_path_factory.mktemp("corpus") / "model")


@pytest.fixture(scope="package")
def llm(model: Path) -> Iterator[daskllm.LLM]:
    """The model, open in this process."""
    llm = daskllm.load(model)
    yield llm
    llm.close()


@pytest.fixture
def generate(model: Path, llm: daskllm.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``daskllm generate`` from ``tmp_path`` into ``out`` there, with the model that is open."""
    monkeypatch.setattr(answer, "load", lambda *arguments, **options: llm)
    monkeypatch.chdir(tmp_path)

    def run(*options: object, inputs: str = "in*", prompt: str = "text", output: str = "out") -> Result:
        command = ["generate", "--model", model, "--input", inputs, "--prompt", prompt, "--output", output]
        return CliRunner().invoke(
            main, [str(one) for one in [*command, "--max-tokens", 2, "--json", *options]]
        )

    return run


def refused(result: Result, *words: str) -> None:
    """The command ended with status 2 and one line that has these words in it, and no traceback."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.startswith("daskllm: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0]
