"""A directory looked at before anything is read, loaded or started: what a job would find there.

It owns the answer "all of it is there already", and the refusals that need no table. `daskllm.jobs.job`
compares the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd

from daskllm.jobs.directory import Directory
from daskllm.jobs.formats import Format
from daskllm.jobs.identity import Input
from daskllm.jobs.job import call_facts
from daskllm.jobs.limits import OnError
from daskllm.jobs.manifest import Manifest
from daskllm.jobs.parts import Recipe
from daskllm.jobs.place import check_same, manifest_of, whole_parts
from daskllm.runtime.call import Call

__all__ = ["look"]


def look(
    path: str | os.PathLike[str],
    inputs: Sequence[Input] | None,
    asked: Callable[[pd.Index], Call],
    *,
    resume: bool = True,
    overwrite: bool = False,
    on_error: OnError = "keep",
) -> Manifest | None:
    """The job that a directory holds, if it is the one meant; None where the directory is free.

    The directory is made, so that one that cannot be is refused before any work. Only the table is not
    compared: its files are, and what is asked of it.

    Args:
        path: a directory or an fsspec URL.
        inputs: the table's files; None takes those that the job had.
        asked: the call over a table with these columns.
        resume, overwrite, on_error: as for `daskllm.jobs.job.prepare`.

    Returns:
        The manifest, with the parts that are there and whole; ``finished`` only where these are all of them.

    Raises:
        ValueError: the directory holds something else, or another job; the message says what differs.
        OSError: it cannot be made, read or written.

    Example:
        >>> import tempfile, daskllm
        >>> with tempfile.TemporaryDirectory() as path:
        ...     look(f"{path}/new", None, lambda columns: None) is None  # nothing is there yet
        True
    """
    directory = Directory(path)
    entries = directory.entries()
    there = manifest_of(directory, entries, resume=resume, overwrite=overwrite)
    directory.make()
    if there is None:
        return None
    was = there.description
    form = Format("parquet", was.types)
    facts = call_facts([asked(pd.Index(was.asked))], form, on_error)
    facts |= {name: was.facts.get(name) for name in ("columns", "table")}
    now = replace(was, facts=facts, inputs=was.inputs if inputs is None else tuple(inputs))
    check_same(directory, was, now)
    recipe = Recipe("", was.key, was.parts, directory, form, {}, (), (), ())
    done = whole_parts(there, entries, recipe)
    return replace(there, done=done, finished=there.finished and len(done) == was.parts)
