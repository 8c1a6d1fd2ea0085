"""What makes a job the same job: its questions, its model, and the table that it asks them of.

A part is as good as a new one exactly when all of these are the same, so they must be told without a row
being read and without a model being loaded. It owns the names of these facts; `daskllm.jobs.manifest`
compares them.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from dask._expr import Expr
from dask.dataframe.dask_expr.io.parquet import ReadParquet
from dask.tokenize import TokenizationError, tokenize

from daskllm.runtime.call import Call

if TYPE_CHECKING:
    from daskllm.types import ModelSpec

__all__ = ["Input", "calls_in", "facts_of", "inputs_of", "stat_input", "table_token", "with_calls"]

Input = tuple[str, int, int]
"""A file that rows come from: its path, its bytes, and when it was changed, in nanoseconds."""

# Of a specification: where the model is and how it is spread, which no answer depends on. Whatever else it
# may say one day counts until it is named here.
_WHERE = frozenset(
    {"path", "revision", "kv_memory", "identity", "content", "version", "copy", "stages", "replicas"}
)
# Of a node of Dask's: what it found out, and how its files were named.
_NOT_THE_TABLE = frozenset({"path", "_dataset_info_cache"})


def calls_in(expr: Expr) -> list[Call]:
    """The calls of an expression, those of inner tables first."""
    found: dict[int, Call] = {}
    for node in expr.walk():
        found |= {id(operand): operand for operand in node.operands if isinstance(operand, Call)}
    return list(found.values())[::-1]


def with_calls(expr: Expr, change: Callable[[Call], Call]) -> Expr:
    """The expression with its calls changed."""
    done: dict[str, Expr] = {}

    def changed(operand: Any) -> Any:
        if isinstance(operand, Call):
            return change(operand)
        if not isinstance(operand, Expr):
            return operand
        if operand._name not in done:
            operands = [changed(one) for one in operand.operands]
            same = all(a is b for a, b in zip(operands, operand.operands, strict=True))
            done[operand._name] = operand if same else type(operand)(*operands)
        return done[operand._name]

    return changed(expr)


def facts_of(call: Call) -> dict[str, Any]:
    """What a call asks of each row and which model, as JSON has it; but for its job's seed."""
    facts: dict[str, Any] = {
        "daskllm": sys.modules["daskllm"].__version__,  # its root imports the rooms, so that no room may
        "kind": call.kind,
        "prompt": _source(call),
        "system": call.system,
        "examples": [list(pair) for pair in call.examples],
        "output": call.output,
        "model": _model_facts(call.spec),
    }
    if call.generates:
        facts["sampling"] = {f.name: _plain(getattr(call.params, f.name)) for f in fields(call.params)}
        facts["model_version"] = call.model_version
    if call.kind == "embed":
        facts |= {"pooling": call.pooling, "normalize": call.normalize}
    return facts


def _source(call: Call) -> str:
    """The prompt as a user writes it, a column as a field."""
    if call.template is None:
        return "".join(f"{{{label}}}" for label in call.labels)
    parts = [part.replace("{", "{{").replace("}", "}}") for part in call.template.parts]
    parts[1::2] = [f"{{{name}}}" for name in call.template.parts[1::2]]
    return "".join(parts)


def _model_facts(spec: ModelSpec) -> dict[str, Any]:
    chosen = {f.name: _plain(getattr(spec, f.name)) for f in fields(spec) if f.name not in _WHERE}
    return {"content": _content_of(spec)} | chosen


@functools.lru_cache(64)
def _content_of(spec: ModelSpec) -> str:
    if spec.content:
        return spec.content
    # ``import daskllm`` imports this module and must not import torch for it.
    from daskllm.runtime.loading import files_of

    return files_of(spec).content()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def table_token(expr: Expr) -> str:
    """A name for a table, the same for the same rows in the same partitions.

    Its calls are left out, whose facts are compared one by one, and files are told by path, size and time of
    change, as `inputs_of` has them.

    Raises:
        ValueError: a part of it has no name that another process would give it too.
    """
    known: dict[str, str] = {}

    def named(operand: Any) -> Any:
        if isinstance(operand, Call):
            return "a call"
        if not isinstance(operand, Expr):
            return operand
        if operand._name not in known:
            known[operand._name] = _node_token(operand, named)
        return known[operand._name]

    return str(named(expr))[:32]


def _node_token(node: Expr, named: Callable[[Any], Any]) -> str:
    names = node._parameters + [""] * (len(node.operands) - len(node._parameters))
    operands = [
        named(operand)
        for name, operand in zip(names, node.operands, strict=True)
        if not (isinstance(node, ReadParquet) and name in _NOT_THE_TABLE)
    ]
    read = [list(one) for one in _inputs_of_node(node)]
    try:
        return str(tokenize(type(node).__name__, read, operands, ensure_deterministic=True))
    except TokenizationError as error:
        raise ValueError(
            f"a job can be resumed only where another process would give its table the same name, and "
            f"{type(node).__name__} has none: {error}"
        ) from error


def inputs_of(expr: Expr) -> list[Input]:
    """The files that a table is read from, each once, as far as its expression tells."""
    found = {one[0]: one for node in expr.walk() for one in _inputs_of_node(node)}
    return list(found.values())


def _inputs_of_node(node: Expr) -> Iterator[Input]:
    if isinstance(node, ReadParquet):
        yield from _parquet_files(node._dataset_info)
    elif "iterables" in node._parameters:  # Dask's from_map, which may well be over paths
        for paths in node.operand("iterables"):
            yield from _files_among(paths)


def _parquet_files(info: Mapping[str, Any]) -> Iterator[Input]:
    if "all_files" in info:
        yield from ((f.path, f.size, f.mtime_ns or 0) for f in info["all_files"])
        return
    for path in info["ds"].files:
        try:
            yield stat_input(path)
        except OSError:  # elsewhere than on a disk of this machine
            yield path, int(info["fs"].info(path).get("size") or 0), _number(info["fs"].checksum(path))


def _files_among(values: Iterable[Any]) -> Iterator[Input]:
    for value in values:
        if isinstance(value, (str, os.PathLike)):
            try:
                yield stat_input(value)
            except (OSError, ValueError):
                continue


def stat_input(path: str | os.PathLike[str]) -> Input:
    """A local file as it is now.

    Raises:
        OSError: it is not there.

    Example:
        >>> from daskllm import demo
        >>> path, size, modified = stat_input(demo.model_path() / "config.json")
        >>> path.endswith("config.json") and size > 0
        True
    """
    stat = os.stat(path)
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


def _number(checksum: Any) -> int:
    return int(hashlib.blake2b(str(checksum).encode(), digest_size=6).hexdigest(), 16)
