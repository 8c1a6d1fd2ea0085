"""The Slurm recipe: the job that it would submit, and its worker run here."""

from __future__ import annotations

import gc
import importlib.util
import shlex
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from tests.cluster_files.running import CLUSTER, running


def recipe() -> Any:
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        pytest.importorskip("dask_jobqueue", reason="make setup")
    finally:  # dask-jobqueue has one of its own as soon as it is imported
        signal.signal(signal.SIGINT, interrupt)
    spec = importlib.util.spec_from_file_location("slurm_recipe", CLUSTER / "slurm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_files_left_open() -> Iterator[None]:
    """Collect the files that dask-jobqueue leaves open here, where the warning is known for what it is."""
    yield
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()


@pytest.mark.cluster
def test_the_job_s_own_command_joins_and_works(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    options = {"shared_temp_directory": str(tmp_path), "scheduler_options": {"host": "127.0.0.1"}}
    with recipe().cluster(**options) as jobs:
        script = jobs.job_script()
        lines = script.splitlines()
        assert "#SBATCH --cpus-per-task=16" in lines
        assert "#SBATCH --mem=30G" in lines
        assert "#SBATCH -t 04:00:00" in lines
        (command,) = [line for line in lines if "distributed.cli.dask_worker" in line]
        with running(shlex.split(command), tmp_path), Client(jobs) as client:
            client.wait_for_workers(1, timeout=60)
            (known,) = client.scheduler_info()["workers"].values()
            assert (known["nthreads"], known["memory_limit"]) == (2, 0)
            assert jobs.scheduler_address.startswith("tls://")
            assert client.submit(sum, [1, 2]).result() == 3
