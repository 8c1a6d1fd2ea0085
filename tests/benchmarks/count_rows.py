"""What a worker of these benchmarks runs first (``dask worker --preload``): it is known, and counts its rows.

In the directory ``DASKLLM_PLACE`` it leaves a file named by its process under ``pids``, and under ``rows`` a
line ``ROWS TOKENS`` for what its engine has finished, so that a kill loses no count.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from daskllm.session import Session


def dask_setup(worker: Any) -> None:
    """Count, and say that the worker is up."""
    place, pid = Path(os.environ["DASKLLM_PLACE"]), str(os.getpid())
    generate = Session.generate

    def counted(self: Session, prompts: Any, params: Any, **options: Any) -> Any:
        told = options.pop("finished", None)

        def finished(done: Any) -> None:
            with (place / "rows" / pid).open("a") as log:
                log.write(f"{len(done)} {sum(c.completion_tokens for _, samples in done for c in samples)}\n")
            if told is not None:
                told(done)

        return generate(self, prompts, params, finished=finished, **options)

    Session.generate = counted  # type: ignore[method-assign]
    (place / "pids" / pid).touch()
