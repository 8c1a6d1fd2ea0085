"""A model by an asynchronous client."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from dask.dataframe import from_pandas
from distributed import Client, LocalCluster

import daskllm
from daskllm import demo


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


PROMPT = "What is the order number? Dear team, my order #79728 has not arrived yet."


@pytest.mark.cluster
def test_every_call_by_an_asynchronous_client(two_processes_cluster: LocalCluster, tmp_path: Path) -> None:
    address = two_processes_cluster.scheduler_address

    async def check() -> None:
        async with Client(address, asynchronous=True) as client:
            with pytest.raises(ValueError, match="await daskllm.load_async"):
                daskllm.load(demo.model_path(), client=client)
            async with await daskllm.load_async(demo.model_path(), client=client) as llm:
                assert (await llm.chat(PROMPT, max_tokens=16)).text == "#79728"
                several = await asyncio.gather(*(llm.chat([PROMPT] * 3, max_tokens=16) for _ in range(3)))
                assert [[one.text for one in some] for some in several] == [["#79728"] * 3] * 3
                pieces = [piece async for piece in llm.stream(PROMPT, max_tokens=4)]
                assert "".join(pieces) == (await llm.generate(PROMPT, max_tokens=4)).text
                assert (await llm.score(["A cat."])).shape == (1,)
                assert (await llm.embed(["A cat."])).shape[0] == 1
                table = demo.table().head(40)
                lazy = from_pandas(table, npartitions=2).llm.chat(llm, "prompt", max_tokens=64)
                assert demo.share_right(await client.compute(lazy)) >= 0.9
                assert demo.share_right(await llm.run(table.llm.chat, llm, "prompt", max_tokens=64)) >= 0.9
                done = await llm.run(lazy.llm.to_parquet, str(tmp_path / "out"))
                assert done.rows == 40
                assert len(pd.read_parquet(tmp_path / "out")) == 40
            assert llm.client is not None
            assert llm.client.status == "closed"
            assert client.status == "running"

    run(check())


def test_without_a_client_and_with_what_is_none() -> None:
    async def check() -> None:
        async with await daskllm.load_async(demo.model_path()) as llm:
            assert (await llm.chat(PROMPT, max_tokens=16)).text == "#79728"
        with pytest.raises(TypeError, match="asynchronous distributed.Client or None, not 'somewhere'"):
            await daskllm.load_async(demo.model_path(), client="somewhere")  # type: ignore[arg-type]

    run(check())


def test_a_stream_that_is_left_is_closed() -> None:
    async def check() -> None:
        async with await daskllm.load_async(demo.model_path()) as llm:
            pieces = llm.stream("A", max_tokens=50, ignore_eos=True)
            assert await anext(pieces) != ""
            await pieces.aclose()  # type: ignore[attr-defined]

    run(check())
