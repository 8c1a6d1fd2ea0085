"""Dask's settings: each is one that Dask knows, and differs from its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.config
import distributed
import yaml
from dask.utils import parse_timedelta

from tests.cluster_files.running import CLUSTER

SETTINGS: dict[str, Any] = yaml.safe_load((CLUSTER / "dask.yaml").read_text())


def flat(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return found


def test_dask_knows_every_setting_and_has_it_otherwise() -> None:
    theirs = flat(yaml.safe_load((Path(distributed.__file__).parent / "distributed.yaml").read_text()))
    for name, value in flat(SETTINGS).items():
        assert theirs[name] != value
    assert len(flat(SETTINGS)) == 6


def test_times_are_times() -> None:
    settings = flat(SETTINGS)
    for name in ("distributed.deploy.lost-worker-timeout", "distributed.adaptive.target-duration"):
        assert parse_timedelta(settings[name]) > parse_timedelta("15s")


def test_a_directory_of_settings_is_read(tmp_path: Path) -> None:
    (tmp_path / "daskllm.yaml").write_text((CLUSTER / "dask.yaml").read_text())
    (read,) = dask.config.collect_yaml([str(tmp_path)])
    assert read == SETTINGS
