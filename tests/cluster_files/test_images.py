"""The Dockerfiles, the conda environment and the tested versions that they install."""

from __future__ import annotations

import re
import shutil
import subprocess
from configparser import ConfigParser

import pytest
import yaml
from packaging.requirements import Requirement

from tests.cluster_files.running import BIN, CLUSTER, ROOT

DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")
CONSTRAINTS = (CLUSTER / "constraints.txt").read_text()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


PINS = {
    normal(name): pin
    for name, pin in (line.split("==") for line in CONSTRAINTS.splitlines() if not line.startswith("#"))
}


def requirements(without: tuple[str, ...] = ("gpu",)) -> list[Requirement]:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    groups = [setup["options"]["install_requires"]]
    groups += [text for extra, text in setup["options.extras_require"].items() if extra not in without]
    lines = [line for text in groups for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    hadolint = shutil.which("hadolint", path=str(BIN)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not here: make setup")
    found = subprocess.run([hadolint, "--no-color", CLUSTER / name], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_a_dockerfile_copies_is_there(name: str) -> None:
    text = (CLUSTER / name).read_text()
    sources = [name for line in re.findall(r"^COPY (.+)$", text, re.M) for name in line.split()[:-1]]
    assert {"daskllm", "cluster/dask.yaml", "cluster/constraints.txt"} <= set(sources)
    assert [name for name in sources if not (ROOT / name).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not set(sources) & set(ignored)


def test_torch_from_an_index_of_its_own_comes_alone() -> None:
    for name in ("Makefile", "cluster/Dockerfile"):
        (line,) = [one for one in (ROOT / name).read_text().splitlines() if "--index-url" in one]
        assert "--no-deps" in line


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    wanted = requirements()
    assert len(wanted) > 20
    for requirement in wanted:
        pin = PINS[normal(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} excludes the tested {pin}"


def test_constraints_name_no_place() -> None:
    assert re.findall(r"://|@|^-", CONSTRAINTS, re.M) == []


def test_the_conda_environment_has_every_requirement_in_its_tested_version() -> None:
    environment = yaml.safe_load((CLUSTER / "environment.yaml").read_text())
    there = dict(line.partition("=")[::2] for line in environment["dependencies"] if "=" in line)
    assert there.pop("python") == "3.12"
    known = {normal("torch" if name == "pytorch" else name): pin for name, pin in there.items()}
    assert known == {name: PINS[name] for name in known}
    needed = {normal(one.name) for one in requirements(without=("gpu", "test", "dev"))}
    assert set(known) == needed
