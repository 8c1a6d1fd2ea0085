"""A worker for each NVIDIA GPU of this machine, by dask-cuda.

pip install 'daskllm[gpu]' dask-cuda
python cluster/gpu.py MODEL TABLE.parquet OUT
"""

from __future__ import annotations

import sys

import dask.dataframe as dd
from dask_cuda import LocalCUDACluster
from distributed import Client

import daskllm

OPTIONS: dict[str, object] = {
    "threads_per_worker": 2,  # two partitions in flight keep the batch full at a partition's end
    # daskllm sizes weights and KV cache itself, on the host and on the GPU.
    "memory_limit": 0,
    "device_memory_limit": 0,
    "dashboard_address": "127.0.0.1:8787",
}


def main(model: str, table: str, out: str) -> None:
    """Answer the column "text" of a table by chat."""
    with LocalCUDACluster(**OPTIONS) as gpus, Client(gpus) as client:
        llm = daskllm.load(model, client=client)
        answered = dd.read_parquet(table).llm.chat(llm, "{text}", max_tokens=64)
        print(answered.llm.to_parquet(out))


if __name__ == "__main__":
    main(*sys.argv[1:4])
