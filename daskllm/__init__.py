"""daskllm: a table of prompts in, a table of answers out, on Dask.

    import daskllm

    llm = daskllm.load("path/to/model")
    answered = df.llm.generate(llm, "Translate: {text}", max_tokens=32)

Importing this gives pandas and Dask tables their ``llm``. Everything that needs a model, and with it torch,
is imported when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import daskllm.frame  # noqa: F401  (registers ``df.llm``)
from daskllm.machine import uncollected
from daskllm.types import Completion, DaskLLMError, JobError, ModelError, RowError, SamplingParams

if TYPE_CHECKING:
    from daskllm.aio import AsyncLLM, load_async
    from daskllm.llm import LLM, load
    from daskllm.runtime.deploy import local_cluster
    from daskllm.runtime.install import install
    from daskllm.runtime.leases import loaded
    from daskllm.texts import generate_text, parallel_generate_text

# libgomp reads it when torch is first imported. Its threads stay awake for some 3 ms after each operation,
# and on cores that others use too a step then takes ten times as long; this many turns, some 10 µs, are
# what it grants where there are more threads than cores, and as fast on idle ones.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "Completion",
    "DaskLLMError",
    "JobError",
    "ModelError",
    "RowError",
    "SamplingParams",
    "__version__",
    "generate_text",
    "install",
    "load",
    "load_async",
    "loaded",
    "local_cluster",
    "parallel_generate_text",
]

_LATE = {
    "LLM": "daskllm.llm",
    "AsyncLLM": "daskllm.aio",
    "generate_text": "daskllm.texts",
    "install": "daskllm.runtime.install",
    "load": "daskllm.llm",
    "load_async": "daskllm.aio",
    "loaded": "daskllm.runtime.leases",
    "local_cluster": "daskllm.runtime.deploy",
    "parallel_generate_text": "daskllm.texts",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        with uncollected():
            module = importlib.import_module(_LATE[name])
        # Found here from now on: later uses neither look for it again nor hold up the collector.
        found = globals()[name] = getattr(module, name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
