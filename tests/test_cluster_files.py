"""The files under ``cluster/`` say what works: their commands run here, without Docker."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import Client
from packaging.requirements import Requirement

import daskllm
from daskllm import demo

ROOT = Path(__file__).resolve().parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "cluster/compose.yaml").read_text())["services"]
CONSTRAINTS = (ROOT / "cluster/constraints.txt").read_text()


@contextmanager
def running(command: list[str], cwd: Path) -> Iterator[None]:
    process = subprocess.Popen(command, cwd=cwd, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def here(service: str, port: int) -> list[str]:
    """A service's own command, on the loopback address and free ports."""
    command = COMPOSE[service]["command"]
    assert "8786" in command
    for theirs, ours in (
        ("--host 0.0.0.0", "--host 127.0.0.1"),
        ("tcp://scheduler:", "tcp://127.0.0.1:"),
        ("8786", str(port)),
        (":8787", "127.0.0.1:0"),
    ):
        command = command.replace(theirs, ours)
    program, *arguments = shlex.split(command)
    return [str(Path(sys.executable).with_name(program)), *arguments]


@pytest.mark.cluster
def test_the_compose_file_s_commands_make_a_cluster_that_answers(tmp_path: Path) -> None:
    port = free_port()
    with ExitStack() as stack:
        stack.enter_context(running(here("scheduler", port), tmp_path))
        for _ in range(2):
            stack.enter_context(running(here("worker", port), tmp_path))
        client = stack.enter_context(Client(f"tcp://127.0.0.1:{port}", timeout="30s"))
        client.wait_for_workers(2, timeout=60)
        assert sum(client.nthreads().values()) == 4
        llm = daskllm.load(str(demo.model_path()), client=client)
        answered = demo.table().head(40).llm.chat(llm, "prompt", max_tokens=64)
        assert demo.share_right(answered) >= 0.9
        llm.close()


def test_scheduler_and_workers_share_one_image_with_a_known_dockerfile() -> None:
    assert COMPOSE["scheduler"]["build"] == {"context": "..", "dockerfile": "cluster/Dockerfile"}
    assert COMPOSE["worker"]["image"] == COMPOSE["scheduler"]["image"]
    assert COMPOSE["worker"]["depends_on"] == ["scheduler"]


def test_ports_are_published_on_the_loopback_address_only() -> None:
    published = [port for service in COMPOSE.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_workers_see_models_and_tables_under_the_paths_of_the_host_and_have_limits() -> None:
    mounts = [re.sub(r":\?[^}]*", "", volume) for volume in COMPOSE["worker"]["volumes"]]
    assert mounts == ["${MODELS}:${MODELS}:ro", "${DATA}:${DATA}"]
    assert {"cpus", "mem_limit"} <= set(COMPOSE["worker"])


def test_torch_from_an_index_of_its_own_comes_alone() -> None:
    for name in ("Makefile", "cluster/Dockerfile"):
        (line,) = [one for one in (ROOT / name).read_text().splitlines() if "--index-url" in one]
        assert "--no-deps" in line


def test_what_the_dockerfile_copies_is_there() -> None:
    text = (ROOT / "cluster/Dockerfile").read_text()
    sources = [name for line in re.findall(r"^COPY (.+)$", text, re.M) for name in line.split()[:-1]]
    assert "daskllm" in sources
    assert [name for name in sources if not (ROOT / name).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not set(sources) & set(ignored)


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    pins = dict(line.split("==") for line in CONSTRAINTS.splitlines() if line and not line.startswith("#"))
    normal = {re.sub(r"[-_.]+", "-", name).lower(): pin for name, pin in pins.items()}
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    groups = [setup["options"]["install_requires"]]
    groups += [text for extra, text in setup["options.extras_require"].items() if extra != "gpu"]
    wanted = [
        Requirement(line)
        for text in groups
        for line in text.splitlines()
        if line and not line.startswith("#")
    ]
    assert len(wanted) > 20
    for requirement in wanted:
        pin = normal[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(pin), f"{requirement} excludes the tested {pin}"


def test_constraints_name_no_place() -> None:
    assert re.findall(r"://|@|^-", CONSTRAINTS, re.M) == []
