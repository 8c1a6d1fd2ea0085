"""The shell scripts: a linter, and a cluster under TLS started by them, with others refused."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client
from distributed.comm import CommClosedError
from distributed.security import Security

import daskllm
from daskllm import demo
from tests.cluster_files.running import BIN, CLUSTER, free_port, running

SCRIPTS = sorted(CLUSTER.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=str(BIN)) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not here: make setup")
    found = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")
    assert os.access(script, os.X_OK)


def certificates(directory: Path, *names: str) -> list[str]:
    made = subprocess.run(
        [CLUSTER / "certificates.sh", directory, *names], check=True, capture_output=True, text=True
    )
    return made.stdout.split()


def identity(directory: Path, name: str) -> Security:
    cert, key = str(directory / f"{name}.pem"), str(directory / f"{name}-key.pem")
    return Security(
        tls_ca_file=str(directory / "ca.pem"),
        tls_client_cert=cert,
        tls_client_key=key,
        require_encryption=True,
    )


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here")
    directory = tmp_path_factory.mktemp("certificates")
    certificates(directory, "127.0.0.1", "localhost")
    return directory


def test_a_later_call_adds_names_and_leaves_the_others(certified: Path) -> None:
    before = {file.name: file.read_bytes() for file in certified.glob("*.pem")}
    assert certificates(certified, "127.0.0.1", "alice") == [f"{certified}/alice.pem"]
    after = {file.name: file.read_bytes() for file in certified.glob("*.pem")}
    assert before.items() <= after.items()
    assert set(after) - set(before) == {"alice.pem", "alice-key.pem"}
    for name in ("127.0.0.1", "alice"):
        check = ["openssl", "verify", "-CAfile", certified / "ca.pem", certified / f"{name}.pem"]
        assert subprocess.run(check, capture_output=True).returncode == 0
        assert (certified / f"{name}-key.pem").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_a_script_called_wrongly_says_how(script: Path) -> None:
    found = subprocess.run([script, "one"], capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("usage: ")


@pytest.fixture(scope="module")
def tls(certified: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address and the log of a cluster that ssh.sh started, by an ``ssh`` that runs everything here."""
    here = tmp_path_factory.mktemp("tls")
    (here / "bin").mkdir()
    ssh = here / "bin" / "ssh"
    ssh.write_text('#!/bin/sh\nshift 2\nexec sh -c "exec $*"\n')
    ssh.chmod(0o755)
    port = str(free_port())
    settings = {
        "PATH": os.pathsep.join([str(ssh.parent), str(BIN), os.environ["PATH"]]),
        "TLS": str(certified),
        "PORT": port,
    }
    command = [str(CLUSTER / "ssh.sh"), "127.0.0.1", "127.0.0.1", "localhost"]
    with running(command, here, **settings):
        yield f"tls://127.0.0.1:{port}", here / "log"


@pytest.mark.cluster
def test_a_cluster_under_tls_answers_who_has_a_certificate(certified: Path, tls: tuple[str, Path]) -> None:
    certificates(certified, "alice")
    with Client(tls[0], security=identity(certified, "alice"), timeout="60s") as client:
        client.wait_for_workers(2, timeout=60)
        assert all(address.startswith("tls://") for address in client.nthreads())
        llm = daskllm.load(str(demo.model_path()), client=client)
        answered = demo.table().head(40).llm.chat(llm, "prompt", max_tokens=64)
        assert demo.share_right(answered) >= 0.9
        llm.close()


def refused(kind: type[Exception], says: str, address: str, security: Security | None = None) -> str:
    """Check that a client is refused; what its error says of the cause.

    Dask closes a client that has failed to start when it is collected, and waits for that. So it is collected
    here, and not in the thread in which the next one's event loop starts.
    """
    with pytest.raises(kind, match=says) as found:
        Client(address, security=security, timeout="5s")
    cause = str(found.value.__cause__)
    del found
    gc.collect()
    return cause


@pytest.mark.cluster
def test_others_are_refused(certified: Path, tls: tuple[str, Path], tmp_path: Path) -> None:
    address, log = tls
    with Client(address, security=identity(certified, "127.0.0.1"), timeout="60s") as client:
        client.wait_for_workers(1, timeout=60)
    certificates(tmp_path, "mallory")
    plain = address.replace("tls://", "tcp://")
    # Of another authority: each finds that it does not know the other's.
    mallory = identity(tmp_path, "mallory")
    cause = refused(CommClosedError, "TLS certificate does not match", address, mallory)
    assert "certificate verify failed" in cause
    # One who takes this authority's word and has a certificate of another: the scheduler hangs up.
    trusting = identity(tmp_path, "mallory")
    trusting.tls_ca_file = str(certified / "ca.pem")
    refused(CommClosedError, "TLS .closed.", address, trusting)
    # None at all: there is no TLS without one, and plain TCP is hung up on.
    refused(TypeError, "TLS expects a `ssl_context`", address)
    refused(CommClosedError, "TCP .closed.", plain)
    refused(
        RuntimeError, "encryption required by Dask configuration", plain, identity(certified, "127.0.0.1")
    )
    # The scheduler's log has a line for each.
    said = log.read_text()
    for why in ("unknown ca", "unable to get local issuer certificate", "wrong version number"):
        assert why in said
