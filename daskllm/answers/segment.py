"""The format of a file of answers: an Arrow IPC file of keys and of the completions kept under each.

A file is written once and never changed. It knows bytes and completions only; files and their names are
`store`'s business.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from daskllm.types import Completion, TokenLogprob

__all__ = ["KEY_BYTES", "Keys", "decode", "encode", "keys_in", "merge", "read", "weight"]

KEY_BYTES = 16
Keys = np.ndarray[Any, np.dtype[np.uint64]]
"""Keys as a uint64 array [keys, 2]: the first half of each, and the second."""

_TOP = pa.list_(pa.struct([("token_id", pa.int32()), ("logprob", pa.float64())]))
_LOGPROB = pa.struct([("token_id", pa.int32()), ("logprob", pa.float64()), ("top", _TOP)])
_SAMPLE = pa.struct(
    [
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("logprobs", pa.list_(_LOGPROB)),
        ("model_version", pa.int64()),
    ]
)
_SCHEMA = pa.schema([("key", pa.binary(KEY_BYTES)), ("samples", pa.list_(_SAMPLE))])


def weight(samples: Iterable[Completion]) -> int:
    """About how many bytes a row's answers take in a file."""
    size = KEY_BYTES
    for sample in samples:
        size += 40 + len(sample.text or "") + 4 * len(sample.token_ids)
        if sample.logprobs:
            size += len(sample.logprobs) * (16 + 12 * len(sample.logprobs[0].top))
    return size


def encode(entries: Mapping[bytes, Sequence[Completion]]) -> pa.Buffer:
    """A file's bytes; the same for the same entries."""
    keys = sorted(entries)
    rows = [entries[key] for key in keys]
    flat = [sample for row in rows for sample in row]
    samples = pa.ListArray.from_arrays(_offsets(map(len, rows)), _samples(flat))
    return _written(pa.record_batch([pa.array(keys, pa.binary(KEY_BYTES)), samples], schema=_SCHEMA))


def read(data: pa.Buffer) -> pa.RecordBatch:
    """A file's rows, views into ``data``.

    Raises:
        ValueError, OSError: the bytes are no such file.
    """
    return _batch(pa.ipc.open_file(pa.BufferReader(data)), _SCHEMA)


def keys_in(file: Any) -> Keys:
    """A file's keys in its order; no other column is read.

    Args:
        file: a file that is open for reading, or a `pyarrow.NativeFile`.

    Raises:
        ValueError, OSError: it is no such file.
    """
    options = pa.ipc.IpcReadOptions(included_fields=[0])
    batch = _batch(pa.ipc.open_file(file, options=options), pa.schema([_SCHEMA.field(0)]))
    return _keys(batch.column(0))


def decode(batch: pa.RecordBatch, rows: Sequence[int]) -> list[list[Completion]]:
    """The completions of some rows of a file."""
    taken = batch.column(1).take(pa.array(rows, pa.int64()))
    flat = taken.values
    texts, reasons = flat.field("text").to_pylist(), flat.field("finish_reason").to_pylist()
    counts = (flat.field(name).to_numpy().tolist() for name in ("prompt_tokens", "completion_tokens"))
    ids = _lists(flat.field("token_ids"))
    versions = flat.field("model_version").to_numpy().tolist()
    none: list[None] = [None] * len(texts)  # no row that failed is kept
    columns = (texts, ids, reasons, *counts, _logprobs(flat.field("logprobs")), none, versions)
    samples = [Completion(*values) for values in zip(*columns, strict=True)]
    bounds = taken.offsets.to_pylist()
    return [samples[start:end] for start, end in itertools.pairwise(bounds)]


def merge(batches: Sequence[pa.RecordBatch]) -> pa.Buffer:
    """One file of the rows of several, each key once; the same bytes for the same rows."""
    (whole,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
    pairs = _keys(whole.column(0))
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    ordered = pairs[order]
    first = np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)][: len(ordered)]
    return _written(whole.take(pa.array(order[first])))


def _written(batch: pa.RecordBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _batch(reader: Any, schema: pa.Schema) -> pa.RecordBatch:
    if reader.schema != schema or reader.num_record_batches != 1:
        raise ValueError(f"it holds {reader.num_record_batches} batches of {reader.schema.names}")
    return reader.get_batch(0)


def _keys(column: pa.FixedSizeBinaryArray) -> Keys:
    data = np.frombuffer(column.buffers()[1], np.uint64, 2 * len(column), 16 * column.offset)
    return data.reshape(-1, 2)


def _offsets(lengths: Iterable[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *lengths]), pa.int32())


def _samples(samples: Sequence[Completion]) -> pa.StructArray:
    logprobs = [sample.logprobs for sample in samples]
    tokens = [token for one in logprobs if one is not None for token in one]
    none = pa.array([one is None for one in logprobs], pa.bool_())
    ids = [i for sample in samples for i in sample.token_ids]
    columns = [
        pa.array([sample.text for sample in samples], pa.string()),
        pa.ListArray.from_arrays(_offsets(len(s.token_ids) for s in samples), pa.array(ids, pa.int32())),
        pa.array([sample.finish_reason for sample in samples], pa.string()),
        pa.array([sample.prompt_tokens for sample in samples], pa.int64()),
        pa.array([sample.completion_tokens for sample in samples], pa.int64()),
        pa.ListArray.from_arrays(_offsets(len(one or ()) for one in logprobs), _tokens(tokens), mask=none),
        pa.array([sample.model_version for sample in samples], pa.int64()),
    ]
    return pa.StructArray.from_arrays(columns, fields=list(_SAMPLE))


def _tokens(tokens: Sequence[TokenLogprob]) -> pa.StructArray:
    top = [pair for token in tokens for pair in token.top.items()]
    pairs = pa.StructArray.from_arrays(
        [pa.array([i for i, _ in top], pa.int32()), pa.array([value for _, value in top], pa.float64())],
        fields=list(_TOP.value_type),
    )
    columns = [
        pa.array([token.token_id for token in tokens], pa.int32()),
        pa.array([token.logprob for token in tokens], pa.float64()),
        pa.ListArray.from_arrays(_offsets(len(token.top) for token in tokens), pairs),
    ]
    return pa.StructArray.from_arrays(columns, fields=list(_LOGPROB))


def _lists(column: pa.ListArray) -> list[tuple[Any, ...]]:
    """A list column as tuples of numbers; as `pyarrow` itself would, ten times faster."""
    return _cut(column, column.values.to_numpy(zero_copy_only=False).tolist())


def _cut(column: pa.ListArray, values: Sequence[Any]) -> list[tuple[Any, ...]]:
    bounds = column.offsets.to_pylist()
    return [tuple(values[start:end]) for start, end in itertools.pairwise(bounds)]


def _logprobs(column: pa.ListArray) -> list[tuple[TokenLogprob, ...] | None]:
    if column.null_count == len(column):
        return [None] * len(column)
    flat = column.values
    top = flat.field("top")
    pairs = (top.values.field(i).to_numpy().tolist() for i in range(2))
    tops = _cut(top, list(zip(*pairs, strict=True)))
    ids, values = (flat.field(i).to_numpy().tolist() for i in range(2))
    tokens = [TokenLogprob(i, v, dict(t)) for i, v, t in zip(ids, values, tops, strict=True)]
    there = column.is_valid().to_pylist()
    return [one if known else None for one, known in zip(_cut(column, tokens), there, strict=True)]
