"""What the scheduler's metadata say has become of a model."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

from daskllm.runtime.record import heir_keys, latest, version_keys
from daskllm.types import ModelSpec, StageSpec


class Metadata(dict[tuple[str, ...], Any]):
    def get_metadata(self, keys: list[str], default: Any) -> Any:
        return self.get(tuple(keys), default)


def test_the_present_version_is_where_its_stages_went_last() -> None:
    handle = ModelSpec(path="m", stages=(StageSpec("a", ("embed", "head")),))
    newer = replace(handle, path="n", version=1)
    moved = newer.with_chains([[StageSpec("b", ("embed", "head"))]])
    again = newer.with_chains([[StageSpec("c", ("embed", "head"))]])
    scheduler = Metadata()
    assert latest(scheduler, handle) == handle  # type: ignore[arg-type]
    scheduler[tuple(version_keys(handle))] = pickle.dumps((newer, (handle,)))
    scheduler[tuple(heir_keys(newer))] = pickle.dumps(moved)
    scheduler[tuple(heir_keys(moved))] = pickle.dumps(again)
    assert latest(scheduler, handle) == again  # type: ignore[arg-type]
