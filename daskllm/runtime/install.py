"""daskllm on a running cluster: what each of its processes has, and sending them this process's.

What runs in a process that may have no daskllm comes to it by value: this module's functions and classes are
pickled with their code, so that they use the standard library and Dask alone. It owns the message when
versions differ. It refuses to know what is in the package (`source`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import logging
import os
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import cloudpickle
from distributed import Client, WorkerPlugin
from packaging.requirements import InvalidRequirement, Requirement

from daskllm.runtime import source

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["SourcePlugin", "check_versions", "install"]

logger = logging.getLogger(__name__)

_SCHEDULER = "the scheduler"

cloudpickle.register_pickle_by_value(sys.modules[__name__])


class SourcePlugin(WorkerPlugin):
    """Makes a copy of daskllm importable on every worker, those that join later too.

    Args:
        digest: tells it from other copies.
        archive: as `source.zipped` makes one.
    """

    name = "daskllm-source"

    def __init__(self, digest: str, archive: bytes) -> None:
        self._digest, self._archive = digest, archive

    # Synchronous, so that it is done before a worker that joins unpickles the plugins registered after it.
    def setup(self, worker: Worker) -> None:
        _put(self._digest, self._archive)


def install(client: Client) -> None:
    """Put this process's daskllm on the client's scheduler and workers, those that join later included.

    For trying things out, and for a change that is not in the cluster's image yet; an image or environment
    that has it needs no call. It lies in the user's cache directory on each machine, before whatever is
    installed there. A scheduler that is started again has to be told again.

    Args:
        client: a synchronous client.

    Raises:
        RuntimeError: a process has another daskllm in use already, or lacks a package that daskllm needs;
            the message says which, and what to do.

    Example:
        >>> from distributed import Client
        >>> with Client(processes=False, n_workers=1, dashboard_address=None) as client:
        ...     install(client)  # it has this daskllm already: nothing is sent
    """
    here = source.version(), source.digest()
    there = _found_on(client)
    others = {who: has for who, has in there.items() if has is not None and has[2] and has[:2] != here}
    if others:
        raise RuntimeError(
            f"{_listed(others)} in use already, and this process has {_named(here)}: a process cannot "
            "change its daskllm; start them again (for workers with a nanny client.restart() does) and call "
            "install again"
        )
    lacking = {who: missing for who, missing in _on_all(client, _missing, _needed()).items() if missing}
    if lacking:
        which = "; ".join(f"{who}: {', '.join(missing)}" for who, missing in lacking.items())
        every = sorted({line for missing in lacking.values() for line in missing})
        raise RuntimeError(
            f"daskllm needs packages that are not there ({which}): install them, for instance by "
            f"client.register_plugin(distributed.PipInstall({every}))"
        )
    archive = source.zipped()
    client.run_on_scheduler(_put, here[1], archive)
    client.register_plugin(SourcePlugin(here[1], archive))
    check_versions(client)


def check_versions(client: Client) -> None:
    """See that the scheduler and all workers have this process's daskllm.

    Another code of the same version, as of a checkout that was edited meanwhile, is a warning in the log.

    Raises:
        RuntimeError: one has another version or none; the message says what each has, and what to do.
    """
    here = source.version(), source.digest()
    there = _found_on(client)
    if edited := {who: has for who, has in there.items() if has is not None and has[:2] != here}:
        logger.warning("%s, and this process %s", _listed(edited), _named(here))
    if others := {who: has for who, has in there.items() if has is None or has[0] != here[0]}:
        raise RuntimeError(
            f"daskllm must be the same everywhere: this process has {_named(here)}, and {_listed(others)}. "
            "Install one version on all and start them again, or send them this one: daskllm.install(client)"
        )


def _found_on(client: Client) -> dict[str, tuple[str, str, bool] | None]:
    return _on_all(client, _found)


def _on_all(client: Client, function: Any, *arguments: Any) -> dict[str, Any]:
    """What a function of this module returns on the scheduler and on each worker."""
    scheduler = client.run_on_scheduler(function, *arguments)
    return {_SCHEDULER: scheduler, **client.run(function, *arguments)}


def _needed() -> list[str]:
    """What daskllm requires, as far as this process's copy was installed and not only put on the path."""
    try:
        lines = importlib.metadata.requires("daskllm") or ()
    except importlib.metadata.PackageNotFoundError:
        lines = ()
    return [line for line in lines if "extra ==" not in line]


def _named(version: Sequence[Any] | None) -> str:
    if version is None:
        return "none"
    return f"{version[0]} (code {version[1]})" if version[1] else str(version[0])


def _listed(found: Mapping[str, Sequence[Any] | None]) -> str:
    """Who has what, those with the same together.

    >>> _listed({"the scheduler": None, "tcp://a": ("0.1.0", "0f", True), "tcp://b": ("0.1.0", "0f", False)})
    'the scheduler has none; tcp://a, tcp://b have 0.1.0 (code 0f)'
    """
    having: defaultdict[str, list[str]] = defaultdict(list)
    for who, has in found.items():
        having[_named(has)].append(who)
    return "; ".join(
        f"{', '.join(some)} {'has' if len(some) == 1 else 'have'} {has}" for has, some in having.items()
    )


# --- what runs elsewhere, by value ------------------------------------------------------------------------


def _found() -> tuple[str, str, bool] | None:
    """Version and digest of this process's daskllm, and whether it was in use before; None: there is none."""
    used = "daskllm" in sys.modules
    try:
        version = importlib.import_module("daskllm").__version__
    except ImportError:
        return None
    try:
        return version, importlib.import_module("daskllm.runtime.source").digest(), used
    except ImportError:
        return version, "", used


def _missing(needed: Sequence[str]) -> list[str]:
    """Of these requirements, those that are not met here."""
    missing = []
    for line in needed:
        try:
            requirement = Requirement(line)
            there = importlib.metadata.version(requirement.name)
            if not requirement.specifier.contains(there, prereleases=True):
                missing.append(line)
        except importlib.metadata.PackageNotFoundError:
            missing.append(line)
        except InvalidRequirement:
            continue
    return missing


def _put(digest: str, archive: bytes) -> None:
    """Make a copy of daskllm importable here, before others."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    place = os.path.join(cache, "daskllm", "source", digest)
    if not os.path.isdir(place):
        try:
            os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
            fresh = tempfile.mkdtemp(dir=os.path.dirname(place))
        except OSError:  # no home to write to
            place = fresh = tempfile.mkdtemp(prefix="daskllm-")
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            files.extractall(fresh)
        if fresh != place:
            try:
                os.rename(fresh, place)
            except OSError:  # another process of this machine was first
                place = place if os.path.isdir(place) else fresh
    if place not in sys.path:
        sys.path.insert(0, place)
        importlib.invalidate_caches()
