"""What a directory of parts says of its job: which job it is, from what, and which parts are done.

It is one file, ``_daskllm.json``, which readers of Parquet pass over. It owns that file, and the comparison
of the job that it tells of with another. It refuses to know how a part comes about.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from daskllm.jobs.directory import Directory
from daskllm.jobs.identity import Input

__all__ = ["MANIFEST", "Description", "Manifest", "Part", "differences", "total"]

MANIFEST = "_daskllm.json"
_FORMAT = 1  # counts up when the same file would mean something else
_SHOWN = 5
_LONGEST = 60


@dataclass(frozen=True, slots=True)
class Part:
    """A finished part.

    Attributes:
        number: of its partition.
        name: of its file.
        size, stamp, digest: of that file; its bytes, a text that changes when it is written again, and a
        hash.
        rows: in the file.
        errors: rows that failed, dropped ones included.
        prompt_tokens, out_tokens: read and generated.
        why: what the first of its failed rows says.

    Example:
        >>> part = Part(0, "part.00000-1a2b.parquet", 2048, "", "", 100, 1, 4000, 700, why="prompt is empty")
        >>> part.rows - part.errors
        99
    """

    number: int
    name: str
    size: int
    stamp: str
    digest: str
    rows: int
    errors: int
    prompt_tokens: int
    out_tokens: int
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """Which job it is.

    Attributes:
        facts: what it does to the rows of which table, as JSON has it.
        inputs: the files that the rows come from.
        seeds: of its calls, where unseeded draws start.
        parts: how many there are.
        partitions: of the table, before its parts were planned.
        asked: the columns of the table that the first call asks.
        types: the columns of the parts; None where values tell.
        rows: of the table, where that was known beforehand.
    """

    facts: dict[str, Any]
    inputs: tuple[Input, ...]
    seeds: tuple[int, ...]
    parts: int
    partitions: int
    asked: tuple[str, ...] = ()
    types: tuple[tuple[str, pa.DataType | None], ...] = ()
    rows: int | None = None

    @property
    def key(self) -> str:
        """A hash of all that makes a part this job's: 16 hexadecimal digits."""
        whole = [_FORMAT, self.facts, self.inputs, self.seeds, self.parts]
        text = json.dumps(whole, sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@dataclass(slots=True)
class Manifest:
    """A job and how far it is.

    Attributes:
        description: which job.
        finished: whether all of its parts were done.
        seconds: that were spent on it.
        done: its finished parts by number.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     Manifest.read(Directory(path)) is None  # no job has begun there
        True
    """

    description: Description
    finished: bool = False
    seconds: float = 0.0
    done: dict[int, Part] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Directory) -> Manifest | None:
        """The manifest in a directory, None where there is none.

        Raises:
            ValueError: it is none that this version reads.
        """
        try:
            told = json.loads(directory.read(MANIFEST))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(_unreadable(directory, f"it is no JSON: {error}")) from error
        try:
            if told["format"] != _FORMAT:
                raise ValueError(f"it has the format {told['format']}, this version reads {_FORMAT}")
            return cls._of(told)
        except (LookupError, TypeError, ValueError, pa.ArrowException) as error:
            raise ValueError(_unreadable(directory, str(error))) from error

    @classmethod
    def _of(cls, told: Mapping[str, Any]) -> Manifest:
        types = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(told["schema"])))
        description = Description(
            facts=dict(told["facts"]),
            inputs=tuple((str(path), int(size), int(time)) for path, size, time in told["inputs"]),
            seeds=tuple(told["seeds"]),
            parts=int(told["parts"]),
            partitions=int(told["partitions"]),
            asked=tuple(told["asked"]),
            rows=told["rows_in"],
            types=tuple((f.name, None if pa.types.is_null(f.type) else f.type) for f in types),
        )
        done = (Part(**part) for part in told["done"])
        return cls(description, told["state"] == "finished", told["seconds"], {p.number: p for p in done})

    def write(self, directory: Directory) -> None:
        """Write it whole, over the one that is there.

        Raises:
            OSError: that cannot be done.
        """
        what = self.description
        types = pa.schema([(name, pa.null() if kind is None else kind) for name, kind in what.types])
        told = {
            "format": _FORMAT,
            "job": what.key,
            "state": "finished" if self.finished else "unfinished",
            **self.totals(),
            "seconds": round(self.seconds, 3),
            "parts": what.parts,
            "partitions": what.partitions,
            "rows_in": what.rows,
            "asked": list(what.asked),
            "facts": what.facts,
            "seeds": list(what.seeds),
            "inputs": [list(one) for one in what.inputs],
            "schema": base64.b64encode(types.serialize().to_pybytes()).decode(),
        }
        # A line for each part, so that people can read it and a large one is written in no time.
        lines = ",\n  ".join(json.dumps(asdict(self.done[n]), ensure_ascii=False) for n in sorted(self.done))
        head = json.dumps(told, indent=1, ensure_ascii=False).removesuffix("\n}")
        text = f'{head},\n "done": [\n  {lines}\n ]\n}}\n'
        directory.write(MANIFEST, text.encode("utf-8", "backslashreplace"))

    def totals(self) -> dict[str, int]:
        """Rows, errors and tokens of the parts that are done."""
        return total(self.done.values())


def total(parts: Any) -> dict[str, int]:
    """The sums over some parts.

    >>> total([])
    {'rows': 0, 'errors': 0, 'prompt_tokens': 0, 'out_tokens': 0}
    """
    names = ("rows", "errors", "prompt_tokens", "out_tokens")
    sums = dict.fromkeys(names, 0)
    for part in parts:
        for name in names:
            sums[name] += getattr(part, name)
    return sums


def _unreadable(directory: Directory, why: str) -> str:
    return (
        f"{directory.where}/{MANIFEST} cannot be read ({why}): take another directory, or overwrite=True "
        "for the job to begin again"
    )


def differences(there: Description, now: Description) -> list[str]:
    """What is not the same in two jobs, a line for each; none where they are the same.

    >>> differences(Description({"a": {"b": 1}}, (), (), 2, 2), Description({"a": {"b": 5}}, (), (), 2, 2))
    ['a.b: 1 there, 5 now']
    """
    found = _differing("", there.facts, now.facts)
    found += _differing_inputs(there.inputs, now.inputs)
    if there.parts != now.parts:
        found.append(f"parts: {there.parts} there, {now.parts} now")
    if not found and there.seeds != now.seeds:
        found.append(f"seeds: {list(there.seeds)} there, {list(now.seeds)} now")
    return found


def _differing(name: str, there: Any, now: Any) -> list[str]:
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        names = [*there, *(one for one in now if one not in there)]
        start = f"{name}." if name else ""
        return [line for n in names for line in _differing(start + n, there.get(n), now.get(n))]
    if _are_lists_of_mappings(there, now):
        pairs = enumerate(zip(there, now, strict=True))
        several = len(there) > 1
        return [line for i, (a, b) in pairs for line in _differing(f"{name}[{i}]" if several else name, a, b)]
    return [] if there == now else [f"{name}: {_shown(there)} there, {_shown(now)} now"]


def _are_lists_of_mappings(there: Any, now: Any) -> bool:
    return (
        isinstance(there, list)
        and isinstance(now, list)
        and len(there) == len(now)
        and all(isinstance(one, Mapping) for one in (*there, *now))
    )


def _differing_inputs(there: Sequence[Input], now: Sequence[Input]) -> list[str]:
    was, is_ = ({path: rest for path, *rest in inputs} for inputs in (there, now))
    lines = [f"input {path}: was not there" for path in is_ if path not in was]
    lines += [f"input {path}: is not there now" for path in was if path not in is_]
    for path in was:
        if path in is_ and was[path] != is_[path]:
            what = "size" if was[path][0] != is_[path][0] else "time of change"
            lines.append(f"input {path}: has another {what}")
    rest = len(lines) - _SHOWN
    return lines if rest <= 0 else [*lines[:_SHOWN], f"and {rest} more inputs"]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
