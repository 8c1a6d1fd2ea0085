"""A table with answers and the directory that it goes to, made ready: `prepare` checks all that can be
checked.

Nothing is computed here and no model is loaded. It owns which parts of a directory are this job's and whole;
`daskllm.jobs.run` makes the others.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import dask.dataframe as dd
import pyarrow as pa
from dask._expr import Expr
from dask.dataframe.dask_expr.io.parquet import ReadParquet
from pandas.api.types import is_integer_dtype

from daskllm.jobs.directory import Directory
from daskllm.jobs.formats import EncryptionKey, FileKind, Format, schema_of
from daskllm.jobs.identity import calls_in, facts_of, inputs_of, table_token, with_calls
from daskllm.jobs.limits import Limit, OnError, check_on_error
from daskllm.jobs.manifest import Description, Manifest
from daskllm.jobs.parts import Recipe
from daskllm.jobs.place import check_same, manifest_of, stale_files, whole_parts
from daskllm.jobs.retry import check_retry
from daskllm.runtime.call import Call
from daskllm.runtime.columns import names
from daskllm.runtime.slices import PLACE

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Job", "call_facts", "prepare"]


@dataclass(frozen=True, slots=True)
class Job:
    """What `daskllm.jobs.run.run` runs.

    Attributes:
        expr: the table, its calls bound to a version of their model and to the job's seeds.
        manifest: the job, and its parts that are there and whole.
        recipe: how the others are written.
        limit: the most rows that may fail.
        retry: ask the failed rows of finished parts again.
        stale: files in the directory that are to go: another job's parts.

    Example: `prepare` makes one, `run` takes it; ``left`` are the parts between.
        >>> sorted(name for name in vars(Job) if name in ("left", "failed"))
        ['failed', 'left']
    """

    expr: Expr
    manifest: Manifest
    recipe: Recipe
    limit: Limit
    retry: bool
    stale: tuple[str, ...]

    @property
    def left(self) -> list[int]:
        """The parts that are still to be made."""
        done = self.manifest.done
        return [number for number in range(self.recipe.parts) if number not in done]

    @property
    def failed(self) -> list[int]:
        """The finished parts of which rows are to be asked again."""
        return [n for n, part in sorted(self.manifest.done.items()) if part.errors] if self.retry else []


def prepare(
    table: dd.DataFrame,
    path: str | os.PathLike[str],
    *,
    client: Client | None,
    kind: FileKind = "parquet",
    resume: bool = True,
    overwrite: bool = False,
    on_error: OnError = "keep",
    max_errors: float | None = None,
    retry_errors: bool = False,
    encryption_key: bytes | None = None,
    compression: str = "snappy",
    write_index: bool | None = None,
    types: Mapping[str, pa.DataType] | None = None,
    rows: int | None = None,
) -> Job:
    """A job, checked: it reads the directory's manifest, the files' names, and parts that were touched.

    Args:
        table: a Dask frame with answers.
        path: a directory or an fsspec URL.
        client: whose cluster will run it, for the model's present version there.
        kind: of the files.
        resume: go on with the same job where the directory has it begun, else refuse one that is not empty.
        overwrite: begin again, whatever job the directory holds.
        on_error: what a row that failed does: end the job ("raise"), stay ("keep"), or be left out ("drop").
        max_errors: see `Limit`.
        retry_errors: ask the failed rows of finished parts again.
        encryption_key: of Parquet.
        compression: of Parquet.
        write_index: None: where it has a name, or is no numbering.
        types: of columns, where Dask does not know them.
        rows: of the table, where that is known.

    Raises:
        ValueError: the directory holds something else, or another job; the message says what differs.
        TypeError, ValueError: an argument that is none, or a table without answers.
        OSError: the directory cannot be read.

    Example:
        >>> import daskllm
        >>> from daskllm import demo
        >>> llm = daskllm.load(demo.model_path())
        >>> import tempfile, dask.dataframe as dd
        >>> out = dd.from_pandas(demo.table(), npartitions=3).llm.chat(llm, "prompt", max_tokens=64)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     prepare(out, path, client=None).left  # the parts to be made; `run` makes them
        [0, 1, 2]
    """
    check_on_error(on_error)
    limit = Limit(max_errors)
    directory = Directory(path)
    calls = calls_in(table.expr)
    if not calls:
        raise ValueError(
            "the table has no answers: to_parquet and its like are for what df.llm.generate gives"
        )
    entries = directory.entries()
    there = manifest_of(directory, entries, resume=resume, overwrite=overwrite)
    seeds = (
        there.description.seeds if there is not None and len(there.description.seeds) == len(calls) else ()
    )
    bound = _bound(calls, client, seeds)
    expr = with_calls(table.expr, lambda call: bound[id(call)])
    form = _format(table, kind, encryption_key, compression, write_index, types)
    counted = _counted(list(bound.values()), table, on_error, max_errors)
    now = replace(_describe(expr, list(bound.values()), form, on_error), rows=rows)
    if there is not None:
        check_same(directory, there.description, now)
    recipe = Recipe(
        uuid.uuid4().hex, now.key, now.parts, directory, form, now.facts, *counted, on_error=on_error
    )
    if retry_errors:
        check_retry(expr, recipe, there)
    done = {} if there is None else whole_parts(there, entries, recipe)
    finished = there is not None and there.finished and len(done) == now.parts
    manifest = Manifest(now, finished, 0.0 if there is None else there.seconds, done)
    return Job(expr, manifest, recipe, limit, retry_errors, stale_files(entries, recipe))


def _bound(calls: list[Call], client: Client | None, seeds: tuple[int, ...]) -> dict[int, Call]:
    """The calls for the present version of their model, with the seeds that the job has."""
    # ``import daskllm`` imports this module and must not import torch for it.
    from daskllm.runtime.update import present_at

    pairs = zip(calls, seeds or [call.job_seed for call in calls], strict=True)
    return {
        id(call): replace(call, spec=present_at(client, call.spec), job_seed=seed if call.by_place else 0)
        for call, seed in pairs
    }


def _format(
    table: dd.DataFrame,
    kind: FileKind,
    key: bytes | None,
    compression: str,
    write_index: bool | None,
    types: Mapping[str, pa.DataType] | None,
) -> Format:
    meta = table._meta
    index = meta.index.name is not None or not is_integer_dtype(meta.index.dtype)
    if write_index is not None:
        index = write_index
    known = {**_types_in_files(table.expr), **_answer_types(calls_in(table.expr))}
    known = {
        name: kind for name, kind in known.items() if name in meta.columns and meta[name].dtype == object
    }
    columns = schema_of(meta, table._meta_nonempty, index, known | dict(types or {}))
    encryption = None if key is None else EncryptionKey(key)
    return Format(kind, columns, index, compression, encryption)


def _types_in_files(expr: Expr) -> dict[str, pa.DataType]:
    """What Parquet files say of columns that pandas holds as objects."""
    schemas = (node._dataset_info["schema"] for node in expr.walk() if isinstance(node, ReadParquet))
    return {field.name: field.type for schema in schemas for field in schema}


def _answer_types(calls: list[Call]) -> dict[str, pa.DataType]:
    """Of the columns of answers that hold lists."""
    found: dict[str, pa.DataType] = {}
    for call in calls:
        if call.kind == "embed":
            found[call.output] = pa.list_(pa.float32())
        if not call.generates:
            continue
        several = call.params.n > 1
        if several:
            found |= {name: pa.list_(pa.string()) for name in names(call)[:2]}
        if call.params.logprobs is not None:
            one = pa.list_(pa.float64())
            found[f"{call.output}_logprobs"] = pa.list_(one) if several else one
    return found


def _counted(
    calls: list[Call], table: dd.DataFrame, on_error: str, max_errors: float | None
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The columns that say why a row failed, and those that count tokens read and generated."""
    ends = {"_error": [], "_prompt_tokens": [], "_completion_tokens": []}  # type: dict[str, list[str]]
    for call in calls:
        ends["_error"].append(f"{call.output}_error")
        ends["_prompt_tokens"].append(f"{call.output}{'_prompt' if call.generates else ''}_tokens")
        ends["_completion_tokens"].append(f"{call.output}_completion_tokens")
    there = [tuple(name for name in found if name in table.columns) for found in ends.values()]
    if not there[0] and (on_error != "keep" or max_errors is not None):
        raise ValueError(
            f"on_error and max_errors need the column {ends['_error'][0]!r}, which is not in the table now"
        )
    return there[0], there[1], there[2]


def call_facts(calls: list[Call], form: Format, on_error: str) -> dict[str, Any]:
    """What is known of a job without its table."""
    asked = [facts_of(call) for call in calls]
    facts: dict[str, Any] = {"files": form.kind, "failed_rows": "dropped" if on_error == "drop" else "kept"}
    if form.key is not None:
        key = form.key.key
        # What is encrypted in the parts is not to be read beside them.
        asked = [one | {n: _hidden(one[n], key) for n in ("prompt", "system", "examples")} for one in asked]
        facts["encrypted_with"] = _hidden("key", key)
    return facts | {"calls": asked}


def _hidden(value: Any, key: bytes) -> str:
    return hashlib.blake2b(repr(value).encode(), key=key, digest_size=8).hexdigest()


def _describe(expr: Expr, calls: list[Call], form: Format, on_error: str) -> Description:
    facts = call_facts(calls, form, on_error)
    facts["columns"] = {name: "as its values" if kind is None else str(kind) for name, kind in form.types}
    facts["table"] = table_token(expr)
    return Description(
        facts=facts,
        inputs=tuple(inputs_of(expr)),
        seeds=tuple(call.job_seed for call in calls),
        parts=expr.optimize(fuse=False).npartitions,
        partitions=expr.npartitions,
        asked=_asked_columns(expr),
        types=form.types,
    )


def _asked_columns(expr: Expr) -> tuple[str, ...]:
    """Of the table that the first call asks."""
    first = [node for node in expr.walk() if any(isinstance(one, Call) for one in node.operands)][-1]
    return tuple(str(name) for name in first.frame.columns if name != PLACE)
