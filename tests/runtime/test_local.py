from __future__ import annotations

import os
import signal
import threading
from typing import Any

import dask.dataframe as dd
import pandas as pd
import pytest

from daskllm.runtime.process import session_for
from tests.fake_session import FakeLLM


def _broken(part: pd.DataFrame, spec: Any) -> pd.DataFrame:
    while not session_for(spec).running:  # type: ignore[attr-defined]
        pass
    raise OSError("the disk is gone")


def test_an_error_elsewhere_in_a_run_stops_the_rows(gated: FakeLLM) -> None:
    table = pd.DataFrame({"text": ["a", "b"]})
    answered = dd.from_pandas(table, npartitions=1).llm.generate(gated, "text")
    broken = dd.from_pandas(table, npartitions=1).map_partitions(_broken, gated.spec, meta=table)
    with pytest.raises(OSError, match="disk"):
        dd.concat([answered, broken]).compute(scheduler="threads", num_workers=2)
    assert gated.session().interrupted.wait(30)


def test_an_interrupt_stops_the_rows(gated: FakeLLM) -> None:
    out = dd.from_pandas(pd.DataFrame({"text": list("abcd")}), npartitions=2).llm.generate(gated, "text")
    session = gated.session()

    def interrupt() -> None:
        while session.running < 2:
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        out.compute(scheduler="threads", num_workers=2)
    assert session.interrupted.wait(30)
