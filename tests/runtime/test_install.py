"""daskllm on a cluster that has none, or another."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client

import daskllm
from daskllm import demo
from daskllm.engine.kernels.cpu.compiled import kept
from daskllm.llm import LLM
from daskllm.runtime import source
from daskllm.runtime.install import _missing, _needed, check_versions
from daskllm.runtime.loading import specify
from daskllm.runtime.stages import NAME, StagePlugin
from tests.cluster_files.running import free_port

Start = Callable[..., AbstractContextManager[None]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Runs a ``dask`` command that has all packages but daskllm, in a home of its own."""
    home = tmp_path_factory.mktemp("home")
    venv.create(home / "venv", with_pip=False)
    python = home / "venv" / "bin" / "python"
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # A path that a .pth names is not asked for further .pth files, by which daskllm may be installed here.
    theirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(packages, "all.pth").write_text("\n".join(theirs))
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    kernels = kept()
    if kernels is not None and kernels.exists():  # to compile them takes half a minute
        shutil.copytree(kernels, home / "cache" / "daskllm" / "kernels" / kernels.name)

    @contextmanager
    def started(*arguments: str, **more: str) -> Iterator[None]:
        command = [python, "-m", "dask", *arguments]
        process = subprocess.Popen(
            command, cwd=home, env={**environ, **more}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)

    return started


@pytest.mark.cluster
def test_a_cluster_without_daskllm_is_told_so_and_gets_it_with_one_call(start: Start) -> None:
    address = f"tcp://127.0.0.1:{(port := free_port())}"
    worker = ("worker", address, "--nworkers", "1", "--memory-limit", "0", "--no-dashboard")
    with ExitStack() as stack:
        stack.enter_context(start("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"))
        stack.enter_context(start(*worker))
        client = stack.enter_context(Client(address, timeout="30s"))
        client.wait_for_workers(1, timeout=60)
        (first,) = client.nthreads()
        with pytest.raises(RuntimeError) as refused:
            daskllm.load(demo.model_path(), client=client)
        here = f"{daskllm.__version__} (code {source.digest()})"
        assert f"this process has {here}, and the scheduler, {first} have none" in str(refused.value)
        assert "daskllm.install(client)" in str(refused.value)

        daskllm.install(client)
        daskllm.install(client)  # a second time changes nothing
        # One that comes later has it too, before the plugins that need it.
        client.register_plugin(StagePlugin())
        stack.enter_context(start(*worker))
        client.wait_for_workers(2, timeout=60)
        check_versions(client)
        places = client.run(lambda: str(sys.modules["daskllm"].__file__))
        assert len(places) == 2
        assert len(set(places.values())) == 1
        assert source.digest() in places[first]
        # It works there, the files that come with it included.
        spec, config = specify(demo.model_path())
        plugged = client.run(lambda dask_worker: NAME in dask_worker.extensions)
        assert list(plugged.values()) == [True, True]
        words = LLM(spec, client, config).tokenizer.encode("A cat.")
        assert client.submit(lambda there: there.tokenizer.encode("A cat."), LLM(spec)).result() == words


@pytest.mark.cluster
def test_a_table_is_answered_and_written_by_workers_that_were_sent_daskllm(
    start: Start, tmp_path: Path
) -> None:
    address = f"tcp://127.0.0.1:{(port := free_port())}"
    worker = ("worker", address, "--nworkers", "1", "--memory-limit", "0", "--no-dashboard")
    with ExitStack() as stack:
        stack.enter_context(start("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"))
        for _ in range(2):
            stack.enter_context(start(*worker))
        client = stack.enter_context(Client(address, timeout="30s"))
        client.wait_for_workers(2, timeout=60)
        assert set(client.run(importlib.util.find_spec, "daskllm").values()) == {None}
        daskllm.install(client)
        (code,) = set(client.run(lambda: str(sys.modules["daskllm"].__file__)).values())
        assert Path(code).parent != source.PACKAGE
        llm = daskllm.load(demo.model_path(), client=client)
        table = dd.from_pandas(demo.table().head(24), npartitions=4)
        answered = table.llm.chat(llm, "prompt", max_tokens=64)
        assert answered.llm.to_parquet(tmp_path / "out").rows == 24
        written = pd.read_parquet(tmp_path / "out")
        assert written.index.tolist() == list(range(24))
        assert written["generated_error"].isna().all()
        assert demo.share_right(written) >= 0.9
        assert set(daskllm.loaded(client)["worker"]) == set(client.nthreads())
        # A job in the background is coordinated by one of them.
        job = answered.llm.submit(str(tmp_path / "again"), name="sent")
        assert job.result(timeout=120).rows == 24
        assert pd.read_parquet(tmp_path / "again")["generated"].equals(written["generated"])


@pytest.mark.cluster
def test_another_version_is_named_and_not_replaced(start: Start, tmp_path: Path) -> None:
    (tmp_path / "daskllm").mkdir()
    (tmp_path / "daskllm" / "__init__.py").write_text('__version__ = "0.0.9"\n')
    address = f"tcp://127.0.0.1:{(port := free_port())}"
    with ExitStack() as stack:
        stack.enter_context(start("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"))
        old = ("worker", address, "--nworkers", "1", "--no-dashboard")
        stack.enter_context(start(*old, PYTHONPATH=str(tmp_path)))
        client = stack.enter_context(Client(address, timeout="30s"))
        client.wait_for_workers(1, timeout=60)
        (worker,) = client.nthreads()
        with pytest.raises(RuntimeError, match=f"the scheduler has none; {worker} has 0.0.9. Install one"):
            daskllm.load(demo.model_path(), client=client)
        # It was imported to ask it.
        with pytest.raises(RuntimeError, match=f"{worker} has 0.0.9 in use already"):
            daskllm.install(client)


def test_what_is_missing_is_named() -> None:
    assert _missing(["numpy>=2.0", "numpy>=999", "no-such-package>=1"]) == [
        "numpy>=999",
        "no-such-package>=1",
    ]
    assert all(_missing([line]) == [] for line in _needed())
