"""The compose file: what it promises in its comments, and its commands, run without Docker."""

from __future__ import annotations

import re
import shlex
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dask.config
import pytest
import yaml
from distributed import Client

import daskllm
from daskllm import demo
from tests.cluster_files.running import CLUSTER, free_port, here, running

COMPOSE: dict[str, Any] = yaml.safe_load((CLUSTER / "compose.yaml").read_text())["services"]


@pytest.mark.cluster
def test_the_commands_make_a_cluster_that_answers(tmp_path: Path) -> None:
    port, dashboard = str(free_port()), str(free_port())
    scheduler = here(
        shlex.split(COMPOSE["scheduler"]["command"]),
        {"0.0.0.0": "127.0.0.1", "8786": port, ":8787": f"127.0.0.1:{dashboard}"},
    )
    worker = here(
        shlex.split(COMPOSE["worker"]["command"]), {"tcp://scheduler:8786": f"tcp://127.0.0.1:{port}"}
    )
    with ExitStack() as stack:
        for command in (scheduler, worker, worker):
            stack.enter_context(running(command, tmp_path))
        address = COMPOSE["notebook"]["environment"]["DASK_SCHEDULER_ADDRESS"]
        with dask.config.set(scheduler_address=address.replace("scheduler:8786", f"127.0.0.1:{port}")):
            client = stack.enter_context(Client(timeout="30s"))
        client.wait_for_workers(2, timeout=60)
        assert sum(client.nthreads().values()) == 4
        # The image's settings have arrived where they count.
        paused = client.run(lambda dask_worker: dask_worker.memory_manager.memory_pause_fraction)
        assert set(paused.values()) == {False}
        check = re.search(r"http://\S+/health", COMPOSE["scheduler"]["healthcheck"]["test"])
        assert check is not None
        with urllib.request.urlopen(check[0].replace("8787", dashboard), timeout=10) as reply:
            assert reply.status == 200
        llm = daskllm.load(str(demo.model_path()), client=client)
        answered = demo.table().head(40).llm.chat(llm, "prompt", max_tokens=64)
        assert demo.share_right(answered) >= 0.9
        llm.close()


def test_all_share_one_image_with_a_known_dockerfile() -> None:
    for name in ("scheduler", "notebook"):
        build = COMPOSE[name]["build"]
        assert (build["context"], build["dockerfile"]) == ("..", "cluster/Dockerfile")
    assert COMPOSE["worker"]["image"] == COMPOSE["scheduler"]["image"] != COMPOSE["notebook"]["image"]
    arguments = re.findall(r"^ARG (\w+)", (CLUSTER / "Dockerfile").read_text(), re.M)
    assert set(COMPOSE["notebook"]["build"]["args"]) <= set(arguments)


def test_who_needs_the_scheduler_waits_until_it_is_well() -> None:
    for name in ("worker", "notebook"):
        assert COMPOSE[name]["depends_on"] == {"scheduler": {"condition": "service_healthy"}}


def test_ports_are_published_on_the_loopback_address_only() -> None:
    published = [port for service in COMPOSE.values() for port in service.get("ports", [])]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_models_and_tables_are_seen_under_the_paths_of_the_host_and_workers_have_limits() -> None:
    for name, wanted in (
        ("worker", ["${MODELS}:${MODELS}:ro", "${DATA}:${DATA}", "cache:/home/daskllm/.cache"]),
        ("notebook", ["${MODELS}:${MODELS}:ro", "${DATA}:${DATA}"]),
    ):
        mounts = [re.sub(r":\?[^}]*", "", volume) for volume in COMPOSE[name]["volumes"]]
        assert mounts == wanted
    assert {"cpus", "mem_limit"} <= set(COMPOSE["worker"])
    assert "/home/daskllm/.cache" in (CLUSTER / "Dockerfile").read_text()
