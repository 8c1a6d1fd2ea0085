"""What a job finds in its directory: nothing, itself begun or done, another job, or what is none.

It owns which files are a job's, and the refusals. It refuses to know what a job does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from daskllm.jobs.directory import Directory, Entry
from daskllm.jobs.manifest import MANIFEST, Description, Manifest, Part, differences
from daskllm.jobs.parts import Recipe, read_part

__all__ = ["check_same", "manifest_of", "stale_files", "whole_parts"]

_OURS = re.compile(r"_?part\.\d{5,}-[0-9a-f]{16}\.(parquet|jsonl|csv)(\.json)?")
_SHOWN = 5


def manifest_of(
    directory: Directory, entries: Mapping[str, Entry], *, resume: bool, overwrite: bool
) -> Manifest | None:
    """The manifest to go on from, None where the job begins.

    Args:
        entries: the directory's files.
        resume, overwrite: as for `daskllm.jobs.job.prepare`.

    Raises:
        ValueError: the directory holds what is not to be touched.
    """
    foreign = [
        n
        for n in sorted(entries)
        if n != MANIFEST and not _OURS.fullmatch(n) and not Directory.is_unfinished(n)
    ]
    if overwrite:
        if foreign:
            raise ValueError(
                f"{directory.where} holds {foreign[0]!r}, which no job has written: take another directory, "
                "or remove it yourself"
            )
        return None
    if MANIFEST not in entries:
        if any(not Directory.is_unfinished(name) for name in entries):
            raise ValueError(
                f"output directory {directory.where} is not empty: name a new one, or remove what it holds"
            )
        return None
    if not resume:
        raise ValueError(
            f"{directory.where} is not empty, it holds a job already: resume=True goes on with it, "
            "overwrite=True begins again"
        )
    return Manifest.read(directory)


def check_same(directory: Directory, there: Description, now: Description) -> None:
    """Refuse another job than the one that is there.

    Raises:
        ValueError: the message says what differs.
    """
    lines = differences(there, now)
    if lines:
        shown = "; ".join(lines[:_SHOWN]) + ("; ..." if len(lines) > _SHOWN else "")
        raise ValueError(
            f"{directory.where} holds another job. What differs: {shown}. Take another directory, or "
            "overwrite=True to begin again"
        )


def whole_parts(there: Manifest, entries: Mapping[str, Entry], recipe: Recipe) -> dict[int, Part]:
    """The parts that are there and what was written, by number; those that were not touched are not read."""
    done = {}
    for number in range(recipe.parts):
        entry = entries.get(recipe.name(number))
        part = None if entry is None else read_part(number, there.done.get(number), entry, recipe)
        if part is not None:
            done[number] = part
    return done


def stale_files(entries: Mapping[str, Entry], recipe: Recipe) -> tuple[str, ...]:
    """The files of other jobs."""
    current = {recipe.name(number) for number in range(recipe.parts)}
    ours = (name for name in entries if _OURS.fullmatch(name))
    return tuple(n for n in ours if n.removeprefix("_").removesuffix(".json") not in current)
