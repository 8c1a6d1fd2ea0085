"""A cluster of two workers that hold the bundled model."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import Any

import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client, LocalCluster

import daskllm
from daskllm import demo


@pytest.fixture(scope="package")
def cluster() -> Iterator[LocalCluster]:
    with daskllm.local_cluster(2) as cluster:
        yield cluster


@pytest.fixture(scope="package")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster, set_as_default=False) as client:
        yield client


@pytest.fixture(scope="package")
def llm(client: Client) -> daskllm.LLM:
    return daskllm.load(demo.model_path(), client=client, dtype="float32", answers=None)


def rows(number: int) -> pd.DataFrame:
    """Prompts no two of which are equal."""
    return pd.DataFrame({"text": [f"What is {i} plus 1?" for i in range(number)]})


def asked(llm: Any, table: pd.DataFrame, partitions: int = 2, tokens: int = 16) -> Any:
    """Answers of so many tokens each."""
    frame = dd.from_pandas(table, npartitions=partitions)
    return frame.llm.generate(llm, "text", max_tokens=tokens, ignore_eos=True)


def got(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def page(cluster: LocalCluster, path: str) -> str:
    """What a scheduler's dashboard has there."""
    return got(address(cluster) + path)


def address(cluster: LocalCluster) -> str:
    return str(cluster.dashboard_link).removesuffix("/status")
