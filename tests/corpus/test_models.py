"""Model directories that cannot be loaded, through the command: one line that names file or field."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from daskllm.cli import main
from tests.corpus.conftest import refused

Harm = Callable[[Path], Any]


@dataclass(frozen=True)
class Model:
    """What is done to a whole model directory, and words of the refusal."""

    name: str
    harm: Harm
    words: tuple[str, ...]


def config(**changes: Any) -> Harm:
    """Fields of config.json changed, or, where None, taken away."""

    def harm(path: Path) -> None:
        told = json.loads((path / "config.json").read_text()) | changes
        kept = {name: value for name, value in told.items() if value is not None}
        (path / "config.json").write_text(json.dumps(kept))

    return harm


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Harm:
    def harm(path: Path) -> None:
        held = load_file(path / "model.safetensors")
        change(held)
        save_file(held, path / "model.safetensors")

    return harm


def without(name: str) -> Harm:
    return lambda path: (path / name).unlink()


def cut(name: str, size: int) -> Harm:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:size])


def pickled(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def sharded(path: Path) -> None:
    """An index that names a shard that is not there."""
    names = dict.fromkeys(load_file(path / "model.safetensors"), "model-00002-of-00002.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (path / "model.safetensors").unlink()


NORM = "model.norm.weight"
MODELS = [
    Model("no directory", lambda path: shutil.rmtree(path), ("model",)),
    Model("an empty directory", lambda path: [file.unlink() for file in path.iterdir()], ("config.json",)),
    Model("no config", without("config.json"), ("config.json",)),
    Model("a config that is none", cut("config.json", 20), ("config.json",)),
    Model("a config without layers", config(num_hidden_layers=None), ("num_hidden_layers",)),
    Model("a config whose layers are text", config(num_hidden_layers="two"), ("num_hidden_layers",)),
    Model("a negative size", config(hidden_size=-64), ("hidden_size",)),
    Model("an unknown family", config(model_type="parrot"), ("parrot",)),
    Model("an unknown activation", config(hidden_act="snore"), ("snore",)),
    Model("remote code", config(model_type="parrot", auto_map={"AutoModel": "x.y"}), ("parrot",)),
    Model("no weights", without("model.safetensors"), ("safetensors",)),
    Model("pickled weights", pickled, ("pytorch_model.bin",)),
    Model("a shard that is missing", sharded, ("model-00002-of-00002.safetensors",)),
    Model("weights cut off", cut("model.safetensors", 4000), ("model.safetensors",)),
    Model("weights of no bytes", cut("model.safetensors", 0), ("model.safetensors",)),
    Model("a tensor that is missing", tensors(lambda held: held.pop(NORM)), (NORM,)),
    Model(
        "a tensor of another shape", tensors(lambda held: held.update({NORM: torch.ones(63)})), (NORM, "63")
    ),
    Model(
        "a tensor of whole numbers",
        tensors(lambda held: held.update({NORM: torch.ones(64, dtype=torch.int32)})),
        (NORM,),
    ),
    Model("no tokenizer", without("tokenizer.json"), ("tokenizer.json",)),
    Model("a tokenizer that is none", cut("tokenizer.json", 30), ("tokenizer.json",)),
]


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_a_model_that_cannot_be_loaded(model: Path, tmp_path: Path, case: Model) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    case.harm(broken)
    (tmp_path / "in.csv").write_text("text\na\n")
    command = ["generate", "--model", broken, "--input", tmp_path / "in.csv", "--prompt", "text"]
    done = CliRunner().invoke(main, [str(one) for one in [*command, "--output", tmp_path / "out"]])
    refused(done, *case.words)
    assert list(tmp_path.rglob("part.*")) == []
