"""A partition as the bytes of a file: Parquet, JSON lines or CSV, and what such a file says of itself.

It owns how tables become files. It refuses to know where files lie and what is in a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any, Literal, TypeAlias, get_args

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from pandas.api.types import is_object_dtype

__all__ = ["EncryptionKey", "FileKind", "Format", "as_arrow", "encode", "schema_of", "told_by"]

FileKind: TypeAlias = Literal["parquet", "jsonl", "csv"]
_METADATA = b"daskllm"


@dataclass(frozen=True, slots=True, repr=False)
class EncryptionKey:
    """A key for Parquet's own encryption, 16, 24 or 32 bytes; its repr does not show it.

    Raises:
        TypeError: no bytes.
        ValueError: another length.
    """

    key: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.key, bytes):
            raise TypeError(f"encryption_key must be bytes, not {type(self.key).__name__}")
        if len(self.key) not in (16, 24, 32):
            raise ValueError(f"encryption_key must be 16, 24 or 32 bytes long, not {len(self.key)}")
        if not hasattr(_encryption(), "create_encryption_properties"):
            raise ValueError(f"encryption_key needs a newer pyarrow than {pa.__version__}")

    def __repr__(self) -> str:
        return "<encryption key>"


def _encryption() -> Any:
    import pyarrow.parquet.encryption as encryption  # not in every build of pyarrow

    return encryption


@dataclass(frozen=True, slots=True)
class Format:
    """How parts are written.

    Attributes:
        kind: "parquet", "jsonl" or "csv".
        schema: of all parts; None for the type of a column whose values have to tell it.
        index: whether the index is written, as a column.
        compression: of Parquet.
        key: encrypts Parquet, columns and footer alike.

    Raises:
        ValueError: an unknown kind, or a key for another kind than Parquet.
    """

    kind: FileKind
    types: tuple[tuple[str, pa.DataType | None], ...]
    index: bool = False
    compression: str = "snappy"
    key: EncryptionKey | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(FileKind):
            raise ValueError(f"parts can be {', '.join(get_args(FileKind))}, not {self.kind!r}")
        if self.key is not None and self.kind != "parquet":
            raise ValueError("encryption_key is for Parquet: other files have no encryption of their own")


def schema_of(
    meta: pd.DataFrame, example: pd.DataFrame, index: bool, known: Mapping[str, pa.DataType]
) -> tuple[tuple[str, pa.DataType | None], ...]:
    """The columns of a table's files with their types; None where dtype object does not tell.

    Args:
        meta: the empty table.
        example: one of the same types with a row or two.
        known: types that take precedence.

    Raises:
        ValueError: columns that a file cannot name.
    """
    labels = list(meta.columns)
    if index and meta.index.nlevels > 1:
        raise ValueError("an index of several levels cannot be written: make columns of it by reset_index()")
    odd = [label for label in labels if not isinstance(label, str)]
    if odd or len(set(labels)) < len(labels):
        raise ValueError(f"the columns of a file have names, each once; rename {(odd or labels)[0]!r}")
    unknown = [name for name in labels if is_object_dtype(meta[name]) and name not in known]
    plain = example.drop(columns=[name for name in labels if name in known or name in unknown])
    told = {f.name: f.type for f in pa.Schema.from_pandas(plain, preserve_index=index)}
    if index:
        labels.append(index_name(meta))
    return tuple((name, known[name] if name in known else told.get(name)) for name in labels)


def index_name(table: pd.DataFrame) -> str:
    """The column that an index is written as."""
    return "__index_level_0__" if table.index.name is None else str(table.index.name)


def as_arrow(table: pd.DataFrame, form: Format) -> pa.Table:
    """A partition with the types of all; those that are not known come from its values.

    Raises:
        ValueError: a column that mixes kinds of values, or has others than it should.
    """
    fields = []
    for name, kind in form.types:
        try:
            fields.append(pa.field(name, kind or pa.array(table[name], from_pandas=True).type))
        except pa.ArrowException as error:
            raise ValueError(
                f"column {name!r} cannot be written, it mixes kinds of values: {error}"
            ) from error
    try:
        return pa.Table.from_pandas(table, schema=pa.schema(fields), preserve_index=form.index)
    except pa.ArrowException as error:
        raise ValueError(f"a column does not have the type of the other parts: {error}") from error


def encode(table: pa.Table, form: Format, says: Mapping[str, Any]) -> pa.Buffer:
    """A file's bytes.

    Args:
        says: what a Parquet file tells of itself, as JSON.
    """
    sink = pa.BufferOutputStream()
    if form.kind == "parquet":
        metadata = {**(table.schema.metadata or {}), _METADATA: json.dumps(says, ensure_ascii=False).encode()}
        pq.write_table(
            table.replace_schema_metadata(metadata),
            sink,
            compression=form.compression,
            write_page_checksum=True,
            encryption_properties=_properties(form.key, says),
        )
    elif form.kind == "csv":
        pacsv.write_csv(_flat(table), sink)
    else:
        sink.write("".join(map(_line, table.to_pylist())).encode("utf-8"))
    return sink.getvalue()


def _properties(key: EncryptionKey | None, says: Mapping[str, Any]) -> Any:
    if key is None:
        return None
    # Bound to its place in its job, so that no part passes for another.
    prefix = f"{says.get('job')}/{says.get('part')}".encode()
    return _encryption().create_encryption_properties(key.key, aad_prefix=prefix)


def decode(data: Any, form: Format) -> pa.Table:
    """A Parquet file's table, every page of it checked.

    Raises:
        pyarrow.ArrowException, OSError: it is not whole, or encrypted with another key.
    """
    decryption = None if form.key is None else _encryption().create_decryption_properties(form.key.key)
    return pq.read_table(
        pa.BufferReader(data), page_checksum_verification=True, decryption_properties=decryption
    )


def told_by(table: pa.Table) -> dict[str, Any]:
    """What a Parquet file of ours tells of itself; nothing where it is none of ours."""
    said = (table.schema.metadata or {}).get(_METADATA)
    return {} if said is None else dict(json.loads(said))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_text) + "\n"


def _as_text(value: Any) -> str:
    if isinstance(value, (date, datetime, time)):
        return value.isoformat()
    if isinstance(value, bytes):
        raise ValueError("a column of bytes cannot be written as JSON: drop it, or write Parquet")
    return str(value)


def _flat(table: pa.Table) -> pa.Table:
    """The table with lists and structs as JSON, which CSV has no other way to write."""
    for place, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            cells = [None if c is None else _json(c) for c in table.column(place).to_pylist()]
            table = table.set_column(place, field.name, pa.array(cells, pa.string()))
        elif pa.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
    return table


def _json(cell: Any) -> str:
    return json.dumps(cell, ensure_ascii=False, default=_as_text)
