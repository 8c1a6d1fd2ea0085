"""A cluster of Slurm jobs, by dask-jobqueue: the scheduler in this process, each worker a job of its own.

    pip install dask-jobqueue
    python cluster/slurm.py MODEL TABLE.parquet OUT

Run it where jobs are submitted from and where they can reach back to, such as a login node or a small job;
``job_script()`` shows what is submitted. Workers and scheduler are under TLS with credentials of this run.
"""

from __future__ import annotations

import sys

import dask.dataframe as dd
from dask_jobqueue import SLURMCluster
from distributed import Client

import daskllm


def cluster(**options: object) -> SLURMCluster:
    """The cluster, without workers yet; ``options`` for `SLURMCluster` go before what is here."""
    given: dict[str, object] = {
        # One process with all cores of its job: it holds the model once.
        "cores": 2,  # Dask threads: two partitions in flight keep the batch full at a partition's end
        "processes": 1,
        "job_cpu": 16,  # cores that Slurm gives the job, which the engine takes
        "memory": "32 GB",  # that Slurm gives the job
        "walltime": "04:00:00",
        # Later options win: no memory limit of Dask's own, daskllm sizes weights and KV cache. A worker
        # ends a little before Slurm would end it, and what it has finished is handed over.
        "worker_extra_args": ["--memory-limit", "0", "--lifetime", "235m", "--lifetime-stagger", "4m"],
        "job_extra_directives": ["--exclusive=user"],  # add "--gres=gpu:1" for a GPU
        "security": True,
        "shared_temp_directory": ".",  # where jobs find their credentials: a directory that all hosts see
        "scheduler_options": {"dashboard_address": "127.0.0.1:8787"},
    }
    return SLURMCluster(**{**given, **options})


def main(model: str, table: str, out: str) -> None:
    """Answer the column "text" of a table by chat."""
    with cluster() as jobs, Client(jobs) as client:
        # Jobs come when the queue lets them; the work begins with the first, and others join it.
        jobs.adapt(minimum=1, maximum=8)
        client.wait_for_workers(1)
        llm = daskllm.load(model, client=client)
        answered = dd.read_parquet(table).llm.chat(llm, "{text}", max_tokens=64)
        print(answered.llm.to_parquet(out))


if __name__ == "__main__":
    main(*sys.argv[1:4])
