"""Model directories, good and bad, and Hub ids against a cache laid out by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from daskllm.checkpoint import open_checkpoint
from daskllm.types import ModelError
from tests.tiny import make_model

NAME = "llama-llama3"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(NAME, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(NAME, tmp_path_factory.mktemp("shards"), dtype="bfloat16", max_shard_size="40KB")


@pytest.fixture
def single(whole: Path, tmp_path: Path) -> Path:
    """A directory to break."""
    return Path(shutil.copytree(whole, tmp_path / "single"))


@pytest.fixture
def sharded(whole_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_shards, tmp_path / "sharded"))


def _edit_index(path: Path, **placed: str) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= placed
    file.write_text(json.dumps(index))


def test_single_file(whole: Path) -> None:
    checkpoint = open_checkpoint(str(whole))
    tensors = load_file(whole / "model.safetensors")
    assert checkpoint.names == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == "float32"
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.path == whole


def test_shards(whole_shards: Path) -> None:
    files = sorted(whole_shards.glob("model-*.safetensors"))
    assert len(files) > 2
    checkpoint = open_checkpoint(whole_shards)
    for file in files:
        for name, tensor in load_file(file).items():
            assert checkpoint.dtype(name) == "bfloat16"
            assert checkpoint.file(name) == file
            assert torch.equal(checkpoint.tensor(name), tensor)


def test_a_tensor_is_a_view_of_the_mapped_file(whole: Path) -> None:
    checkpoint = open_checkpoint(whole)
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = checkpoint.tensor(name)
    assert tensor.data_ptr() == checkpoint.tensor(name).data_ptr()
    if sys.platform == "linux":
        spans = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(whole) in line]
        bounds = [[int(end, 16) for end in line.split()[0].split("-")] for line in spans]
        assert any(low <= tensor.data_ptr() < high for low, high in bounds)
    before = tensor.clone()
    checkpoint.close()
    assert torch.equal(tensor, before)
    with pytest.raises(ValueError, match="closed"):
        checkpoint.tensor(name)


def test_generation_config_is_optional(single: Path) -> None:
    (single / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert open_checkpoint(single).generation_config == {"eos_token_id": [1, 2]}
    (single / "generation_config.json").unlink()
    assert open_checkpoint(single).generation_config == {}


def test_identity_changes_with_the_files_alone(single: Path) -> None:
    first = open_checkpoint(single).identity
    assert open_checkpoint(single).identity == first
    (single / "notes.md").write_text("mine")
    assert open_checkpoint(single).identity == first
    os.utime(single / "model.safetensors", ns=(1, 1))
    second = open_checkpoint(single).identity
    (single / "config.json").write_text((single / "config.json").read_text() + "\n")
    third = open_checkpoint(single).identity
    moved = open_checkpoint(single.rename(single.parent / "moved")).identity
    assert len({first, second, third, moved}) == 4


def test_content_is_that_of_a_copy_and_of_no_other_weights(sharded: Path, whole_shards: Path) -> None:
    first = open_checkpoint(whole_shards)
    os.utime(sharded / "config.json", ns=(1, 1))
    assert open_checkpoint(sharded).identity != first.identity
    assert open_checkpoint(sharded).content() == first.content()
    shard = min(sharded.glob("model-*.safetensors"))
    held = load_file(shard)
    name = max(held, key=lambda one: held[one].numel())
    changed = held[name] * 1.01
    save_file(held | {name: changed.to(held[name].dtype)}, shard, {"format": "pt"})
    assert shard.stat().st_size == (whole_shards / shard.name).stat().st_size
    second = open_checkpoint(sharded).content()
    (sharded / "config.json").write_text((sharded / "config.json").read_text() + "\n")
    assert len({first.content(), second, open_checkpoint(sharded).content()}) == 3


def test_a_span_is_where_a_tensor_is(whole_shards: Path) -> None:
    checkpoint = open_checkpoint(whole_shards)
    for name in checkpoint.names:
        file, start, stop = checkpoint.span(name)
        content = bytearray(file.read_bytes()[start:stop])
        tensor = torch.frombuffer(content, dtype=torch.bfloat16).reshape(checkpoint.shape(name))
        assert torch.equal(tensor, checkpoint.tensor(name))


def test_an_unknown_tensor_is_named(whole: Path) -> None:
    with pytest.raises(ModelError, match=r"no tensor 'nothing\.weight'"):
        open_checkpoint(whole).tensor("nothing.weight")


def test_no_config(single: Path) -> None:
    (single / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_checkpoint(single)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "\udc80"])
def test_broken_json(single: Path, file: str, content: str) -> None:
    (single / file).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError, match=file):
        open_checkpoint(single)


def test_broken_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ModelError, match=r"index\.json has no weight_map"):
        open_checkpoint(sharded)


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=rf"{shard.name} is missing; it holds 'model\."):
        open_checkpoint(sharded)


def test_index_that_names_an_absent_tensor(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[0].name
    _edit_index(sharded, **{"model.layers.9.ghost.weight": shard})
    with pytest.raises(
        ModelError, match=rf"tensor 'model\.layers\.9\.ghost\.weight' in {shard}, which lacks it"
    ):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("shard", "message"), [("../model.safetensors", "own directory"), ("model-9.bin", "only .safetensors")]
)
def test_index_that_points_elsewhere(sharded: Path, shard: str, message: str) -> None:
    _edit_index(sharded, **{"model.extra.weight": shard})
    with pytest.raises(ModelError, match=message):
        open_checkpoint(sharded)


@pytest.mark.parametrize("left", [0, 5, 300, -1])
def test_truncated_file(single: Path, left: int) -> None:
    file = single / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, left if left >= 0 else size + left)
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read: it is cut short") as error:
        open_checkpoint(single)
    if left < 0:
        assert f"the file has {size - 1}" in str(error.value)
        assert "tensor 'model." in str(error.value)


def test_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(ModelError, match=f"{shard.name} cannot be read: it is cut short: tensor 'model"):
        open_checkpoint(sharded)


def test_a_file_that_is_not_safetensors(single: Path) -> None:
    (single / "model.safetensors").write_bytes(b"\x80\x02}q\x00." * 99)
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        open_checkpoint(single)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickles_are_refused_by_name(single: Path, pickle: str) -> None:
    (single / "model.safetensors").rename(single / pickle)
    with pytest.raises(ModelError, match=f"{pickle} is a pickle, which can run any code"):
        open_checkpoint(single)


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_checkpoint(single)


def test_paths_that_are_no_directory(single: Path) -> None:
    with pytest.raises(ModelError, match="is a file; give the directory"):
        open_checkpoint(single / "model.safetensors")
    for absent in (single / "absent", str(single / "absent"), "absent", "a/b/c"):
        with pytest.raises(ModelError, match="there is no directory"):
            open_checkpoint(absent)
    with pytest.raises(ValueError, match="revision='main' belongs to a Hub id"):
        open_checkpoint(single, revision="main")


def _in_offline_process(cache: Path, code: str) -> str:
    """What a fresh Python prints whose Hub cache is this and whose network is off."""
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _into_cache(cache: Path, model: Path, commit: str, *refs: str) -> Path:
    """Lay a directory out as the Hub's client keeps it: blobs, and links to them in a snapshot."""
    repo = cache / "models--some--tiny"
    snapshot = repo / "snapshots" / commit
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        blob = repo / "blobs" / f"{commit}-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    for ref in refs:
        (repo / "refs" / ref).write_text(commit)
    return snapshot


def test_hub_id_from_the_local_cache(whole: Path, whole_shards: Path, tmp_path: Path) -> None:
    latest = _into_cache(tmp_path, whole, "a" * 40, "main")
    tagged = _into_cache(tmp_path, whole_shards, "b" * 40, "v1")
    code = (
        "from daskllm.checkpoint import open_checkpoint as o\n"
        "for r in (None, 'main', 'v1', 'b' * 40):\n"
        "    c = o('some/tiny', r); n = min(c.names)\n"
        "    print(c.path, c.dtype(n), len(c.names), float(c.tensor(n).float().sum()))"
    )
    lines = [line.split() for line in _in_offline_process(tmp_path, code).splitlines()]
    assert [Path(line[0]) for line in lines] == [latest, latest, tagged, tagged]
    assert [line[1] for line in lines] == ["float32", "float32", "bfloat16", "bfloat16"]
    assert lines[0][2] == lines[2][2]


def test_hub_id_that_is_not_in_the_cache(whole: Path, tmp_path: Path) -> None:
    _into_cache(tmp_path, whole, "a" * 40, "main")
    code = (
        "from daskllm.checkpoint import open_checkpoint as o\n"
        "from daskllm.types import ModelError\n"
        "for args in (('some/other',), ('some/tiny', 'v9')):\n"
        "    try: o(*args)\n"
        "    except ModelError as error: print(error)"
    )
    first, second = (
        line for line in _in_offline_process(tmp_path, code).splitlines() if line.startswith("'")
    )
    assert first.startswith("'some/other' is not a directory here")
    assert second.startswith("'some/tiny' is not a directory here, and as a Hub id at revision 'v9'")


def test_what_a_download_asks_for(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Safetensors of the root, JSON and templates; never a pickle, nor the other formats' copies."""
    from fnmatch import fnmatch

    asked = {}

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(whole)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_checkpoint("some/tiny", "v2").path == whole
    assert (asked["repo"], asked["revision"]) == ("some/tiny", "v2")

    def wanted(file: str) -> bool:
        return any(fnmatch(file, pattern) for pattern in asked["patterns"])

    for file in ("model.safetensors", "model-00002-of-00004.safetensors", "model.safetensors.index.json"):
        assert wanted(file)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert wanted(file)
    for file in ("pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth", "code.py"):
        assert not wanted(file)


def test_other_types_are_reported(single: Path) -> None:
    held = load_file(single / "model.safetensors")
    name = "model.norm.weight"
    for kind, reported in (
        (torch.int8, "int8"),
        (torch.float64, "float64"),
        (torch.float8_e4m3fn, "F8_E4M3"),
    ):
        save_file(held | {name: held[name].to(kind)}, single / "model.safetensors")
        assert open_checkpoint(single).dtype(name) == reported


@pytest.mark.parametrize("change", ["replaced", "gone"])
def test_a_file_that_is_another_by_the_first_tensor_is_refused(single: Path, change: str) -> None:
    checkpoint = open_checkpoint(str(single))
    name, file = sorted(checkpoint.names)[0], single / "model.safetensors"
    before = checkpoint.tensor(name).clone()
    checkpoint._views.clear()  # as where torch came after the files were opened
    assert torch.equal(checkpoint.tensor(name), before)
    checkpoint._views.clear()
    other = single / "other"
    save_file({n: t + 1 for n, t in load_file(file).items()}, other)
    os.replace(other, file) if change == "replaced" else file.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors (is not what it was|cannot be read any more)"):
        checkpoint.tensor(name)
