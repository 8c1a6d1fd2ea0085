"""What ``df.llm`` offers.

It owns the documented signatures, the same for both kinds of table. It refuses to know how they are answered.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
from dask.dataframe.extensions import register_dataframe_accessor

from daskllm.frame.ask import Handle, ask_table, call_over
from daskllm.frame.explain import explain_table
from daskllm.jobs import BackgroundJob, Explanation, FileKind, OnError, Summary, prepare, run, submit
from daskllm.runtime.call import Kind
from daskllm.runtime.cluster import client_for
from daskllm.types import Pooling

__all__ = ["DaskAccessor", "PandasAccessor"]

Table = TypeVar("Table", pd.DataFrame, dd.DataFrame)


class _Accessor(Generic[Table]):
    def __init__(self, table: Table) -> None:
        self._table: Table = table

    def generate(
        self,
        llm: Handle,
        prompt: Hashable,
        output: str = "generated",
        system: str | None = None,
        examples: Sequence[tuple[Any, str]] | None = None,
        model_version: bool = False,
        **sampling: Any,
    ) -> Table:
        """The table with an answer to every row.

        Index, order, partitions, divisions and the other columns stay as they are. A row that cannot be
        answered (a null, a cell that is neither text nor number, an empty or too long prompt) has a null
        text and says why in ``{output}_error``.

        Args:
            llm: a model from `daskllm.load`.
            prompt: a column, or a template over columns such as ``"Translate: {text}"``; ``{{`` and ``}}``
                stand for braces. A column may hold lists of token ids too (for a Dask frame that was not read
                from Parquet with ``dataframe.convert-string`` off, as Dask makes text of them otherwise).
            output: the name of the text's column, and the start of the others' names.
            system: what stands before every prompt.
            examples: (input, output) pairs shown before every prompt; an input is text, or a mapping that
                fills the template as a row does.
            model_version: whether to say which version of the weights answered each row.
            sampling: fields of `daskllm.SamplingParams`.

        Returns:
            The columns ``{output}`` (str), ``{output}_finish_reason`` (str), ``{output}_prompt_tokens`` and
            ``{output}_completion_tokens`` (int64), ``{output}_error`` (str), with ``logprobs=`` also
            ``{output}_logprobs`` (object: a list of float, one for each generated token), with
            ``model_version=True`` ``{output}_model_version`` (int64; 0 as loaded, n after the n-th
            ``llm.update``, always one alone for a row). With ``n > 1``
            text, finish reason and log-probabilities are lists with one entry per sample (object), the
            completion tokens are those of all samples, and the prompt is counted once.

        Raises:
            KeyError: a column or template field that is not there.
            ValueError: a value out of its range, a template that is none, an output column that is there.
            TypeError: an unknown argument, or one of the wrong type.

        Example:
            >>> import daskllm
            >>> from daskllm import demo
            >>> llm = daskllm.load(demo.model_path())
            >>> import pandas as pd
            >>> table = pd.DataFrame({"a": [1, None, 3]}, index=list("xyz"))
            >>> answered = table.llm.generate(llm, "Calculate {a}", output="b", max_tokens=2)
            >>> answered[["b_finish_reason", "b_error"]]
              b_finish_reason             b_error
            x            stop                 NaN
            y           error  column 'a' is null
            z            stop                 NaN
        """
        call = call_over(
            self._table.columns,
            llm,
            "generate",
            prompt,
            output=output,
            system=system,
            examples=examples,
            model_version=model_version,
            sampling=sampling,
        )
        return ask_table(self._table, llm, call)

    def chat(
        self,
        llm: Handle,
        messages: Hashable,
        output: str = "generated",
        system: str | None = None,
        examples: Sequence[tuple[Any, str]] | None = None,
        model_version: bool = False,
        **sampling: Any,
    ) -> Table:
        """The table with the model's next turn in every row's conversation.

        Args:
            messages: a column of message lists (``[{"role": "user", "content": …}, …]``) or of text, which is
                one user turn; or a template, which makes one.
            system, examples: put before the messages; a conversation that begins with a system turn takes
                no ``system``.

        The rest is as for `generate`. Dask turns object columns into text unless
        ``dataframe.convert-string`` is off; message lists need it off (those read from Parquet do not).

        Example:
            >>> import daskllm
            >>> from daskllm import demo
            >>> llm = daskllm.load(demo.model_path())
            >>> import pandas as pd
            >>> table = pd.DataFrame({"a": [770, 12], "b": [951, 30]})
            >>> table.llm.chat(llm, "Calculate {a} + {b}.", output="sum", max_tokens=8)["sum"].tolist()
            ['1721', '42']
        """
        call = call_over(
            self._table.columns,
            llm,
            "chat",
            messages,
            output=output,
            system=system,
            examples=examples,
            model_version=model_version,
            sampling=sampling,
        )
        return ask_table(self._table, llm, call)

    def score(self, llm: Handle, text: Hashable, output: str = "score") -> Table:
        """The table with how likely the model finds each row's text.

        Args:
            text: a column, or a template over columns.
            output: the name of the score's column.

        Returns:
            The columns ``{output}`` (float64: natural log-probability of the text, NaN on error),
            ``{output}_tokens`` (int64) and ``{output}_error`` (str).

        Example:
            >>> import daskllm
            >>> from daskllm import demo
            >>> llm = daskllm.load(demo.model_path())
            >>> import pandas as pd
            >>> table = pd.DataFrame({"text": ["Her brother sees ten cars.", "cars ten sees brother Her."]})
            >>> scored = table.llm.score(llm, "text")
            >>> bool(scored["score"][0] > scored["score"][1])
            True
        """
        call = call_over(self._table.columns, llm, "score", text, output=output, sampling={})
        return ask_table(self._table, llm, call)

    def embed(
        self,
        llm: Handle,
        text: Hashable,
        output: str = "embedding",
        pooling: Pooling = "mean",
        normalize: bool = True,
    ) -> Table:
        """The table with each row's text as a vector: the hidden states behind the model's last norm, pooled.

        Args:
            text: a column, or a template over columns.
            output: the name of the vector's column.
            pooling: "mean" of all of the text's tokens, or its "last" token alone.
            normalize: make each vector's Euclidean length 1.

        Returns:
            The columns ``{output}`` (object: a float32 array ``[hidden]``, null on error),
            ``{output}_tokens`` (int64) and ``{output}_error`` (str).

        Raises: as `generate`.

        Example:
            >>> import daskllm
            >>> from daskllm import demo
            >>> llm = daskllm.load(demo.model_path())
            >>> import dask.dataframe as dd
            >>> table = dd.from_pandas(demo.table(), npartitions=2)
            >>> table.llm.embed(llm, "prompt")["embedding"].head(1)[0].shape
            (128,)
        """
        call = call_over(
            self._table.columns,
            llm,
            "embed",
            text,
            output=output,
            sampling={},
            pooling=pooling,
            normalize=normalize,
        )
        return ask_table(self._table, llm, call)

    def explain(
        self,
        llm: Handle | None = None,
        prompt: Hashable = None,
        kind: Kind = "generate",
        *,
        full: bool = False,
        seconds: float = 10.0,
        **asked: Any,
    ) -> Explanation:
        """What answering the table would take: rows, tokens, memory, time. The table stays as it is.

        A part of it is read, its prompts are made and counted, and a few rows are answered, whose answers
        are thrown away: they tell how fast it goes and how long answers are.

        Args:
            llm, prompt: as for `generate`, of a question that has not been asked yet. Without them, a Dask
                table that `generate` or its like returned is explained.
            kind: "generate", "chat", "score" or "embed".
            full: count every row instead of a sample; that reads the whole table.
            seconds: how long rows may run at most, some on each of up to four engines; 0: none runs, and
                nothing is said of time.
            asked: the other arguments of `generate`, `chat`, `score` or `embed`.

        Returns:
            A table on the screen and in a notebook; ``to_dict()`` is for programs.

        Raises: as `generate`; ValueError also for a table with no answers to come, or with several.

        Example:
            >>> import daskllm
            >>> from daskllm import demo
            >>> llm = daskllm.load(demo.model_path())
            >>> found = demo.table().llm.explain(llm, "prompt", "chat", max_tokens=64, seconds=0)
            >>> found.rows, round(found.prompt_tokens), found.most_output_tokens
            (200, 6608, 12800.0)
        """
        return explain_table(self._table, llm, prompt, kind, full, seconds, asked)


@pd.api.extensions.register_dataframe_accessor("llm")
class PandasAccessor(_Accessor[pd.DataFrame]):
    """``df.llm`` of a pandas table; its rows are answered when the call returns."""


@register_dataframe_accessor("llm")
class DaskAccessor(_Accessor[dd.DataFrame]):
    """``df.llm`` of a Dask table; its rows are answered when the result is computed."""

    def to_parquet(
        self,
        path: str | os.PathLike[str],
        resume: bool = True,
        *,
        overwrite: bool = False,
        on_error: OnError = "keep",
        max_errors: float | None = None,
        retry_errors: bool = False,
        encryption_key: bytes | None = None,
        compression: str = "snappy",
        write_index: bool | None = None,
        types: Mapping[str, pa.DataType] | None = None,
    ) -> Summary:
        """Answer the table and write it as Parquet, part by part; the same call goes on where one was cut
        off.

        Each partition becomes a file, ``part.00012-<job>.parquet``, written by the worker that made it, whole
        or not at all; readers may use those that are there. ``_daskllm.json`` beside them says which job it
        is and how far. A part is kept where data, prompt, model (by its content), sampling and seed are the
        same, and with all of them there neither the rows are read nor the model is loaded. A job without a
        seed goes on with the one that it drew. All rows of the run are answered by the weights that are the
        model's when it begins, whatever `LLM.update` brings.

        Args:
            path: a directory or an fsspec URL, which workers reach too.
            resume: go on with the same job where the directory has it begun; False refuses one that is there.
            overwrite: begin again, over whatever job the directory holds.
            on_error: what a row that failed does: it stays in the table with its reason ("keep"), is left out
                ("drop"), or ends the job ("raise").
            max_errors: stop when more rows failed: a number of them (int), or a share of those that are done
                (float, looked at from 100 rows on and at the end).
            retry_errors: ask the failed rows of finished parts again; the rest of each part stays as it is.
            encryption_key: 16, 24 or 32 bytes, for Parquet's own encryption (AES-GCM of columns and footer).
                It goes to the workers with the tasks: use a cluster with TLS.
            compression: as pyarrow has it.
            write_index: None: where the index has a name, or is no numbering.
            types: Arrow types of columns of Python objects that neither Parquet files nor daskllm tell of.

        Returns:
            Rows, errors, tokens and parts; the table itself stays in the files.

        Raises:
            ValueError: the directory holds another job, with what differs, or something else; a table without
                answers; an argument out of its range.
            JobError, RowError: too many rows failed, or one with ``on_error="raise"``.
            OSError: a part cannot be written. After any of these what was finished stays.

        Example:
            >>> import daskllm
            >>> from daskllm import demo
            >>> llm = daskllm.load(demo.model_path())
            >>> import tempfile, dask.dataframe as dd
            >>> table = dd.from_pandas(demo.table().head(20), npartitions=2)
            >>> out = table.llm.chat(llm, "prompt", max_tokens=64)
            >>> with tempfile.TemporaryDirectory() as path:
            ...     first = out.llm.to_parquet(path)
            ...     again = out.llm.to_parquet(path)
            ...     right = demo.share_right(dd.read_parquet(path).compute())
            >>> first.rows, first.written, again.written, right
            (20, 2, 0, 0.95)
        """
        client = client_for(None)
        job = prepare(
            self._table,
            path,
            client=client,
            resume=resume,
            overwrite=overwrite,
            on_error=on_error,
            max_errors=max_errors,
            retry_errors=retry_errors,
            encryption_key=encryption_key,
            compression=compression,
            write_index=write_index,
            types=types,
        )
        return run(job, client)

    def to_json(self, path: str | os.PathLike[str], resume: bool = True, **options: Any) -> Summary:
        """As `to_parquet`, as JSON lines: ``part.00012-<job>.jsonl``.

        Dates are text, bytes are refused. What a file's own metadata say in Parquet is in a ``_part….json``.

        Args:
            options: of `to_parquet`, but for ``encryption_key`` and ``compression``.

        Example:
            >>> import daskllm
            >>> from daskllm import demo
            >>> llm = daskllm.load(demo.model_path())
            >>> import tempfile, dask.dataframe as dd
            >>> table = dd.from_pandas(demo.table().head(4), npartitions=1)
            >>> out = table.llm.chat(llm, "prompt", max_tokens=64)
            >>> with tempfile.TemporaryDirectory() as path:
            ...     out.llm.to_json(path).rows
            4
        """
        return self._to_text("jsonl", path, resume, **options)

    def to_csv(self, path: str | os.PathLike[str], resume: bool = True, **options: Any) -> Summary:
        """As `to_parquet`, as CSV with a header in each file: ``part.00012-<job>.csv``.

        A null is an empty cell, an empty text ``""``; lists are JSON.

        Args:
            options: as for `to_json`.

        Example:
            >>> import daskllm
            >>> from daskllm import demo
            >>> llm = daskllm.load(demo.model_path())
            >>> import tempfile, dask.dataframe as dd
            >>> table = dd.from_pandas(demo.table().head(4), npartitions=1)
            >>> out = table.llm.chat(llm, "prompt", max_tokens=64)
            >>> with tempfile.TemporaryDirectory() as path:
            ...     out.llm.to_csv(path).rows
            4
        """
        return self._to_text("csv", path, resume, **options)

    def submit(
        self, path: str | os.PathLike[str], name: str | None = None, priority: int = 0, **options: Any
    ) -> BackgroundJob:
        """As `to_parquet`, in the background: on the current client's cluster, where it goes on when this
        process ends, or in a thread of this process where there is no client.

        ``daskllm.jobs.find(name, client)`` finds it again from anywhere; `daskllm.jobs.queue` says who waits.

        Args:
            name: by which it is found; made up if none is given.
            priority: of its rows on a cluster; more is sooner.
            options: of `to_parquet`; also ``kind="jsonl"`` or ``"csv"``.

        Returns:
            The job, with ``status()``, ``progress()``, ``cancel()`` and ``result()``.

        Raises:
            ValueError: a job of that name is running; otherwise as `to_parquet`, where that can be told now.

        Example:
            >>> import daskllm
            >>> from daskllm import demo
            >>> llm = daskllm.load(demo.model_path())
            >>> import tempfile, dask.dataframe as dd
            >>> table = dd.from_pandas(demo.table().head(4), npartitions=1)
            >>> out = table.llm.chat(llm, "prompt", max_tokens=64)
            >>> with tempfile.TemporaryDirectory() as path:
            ...     job = out.llm.submit(path, name="four rows")
            ...     job.result().rows, job.status(), job.progress().rows
            (4, 'finished', 4)
        """
        return submit(self._table, path, client_for(None), name, priority, **options)

    def _to_text(
        self,
        kind: FileKind,
        path: str | os.PathLike[str],
        resume: bool,
        *,
        overwrite: bool = False,
        on_error: OnError = "keep",
        max_errors: float | None = None,
        retry_errors: bool = False,
        write_index: bool | None = None,
        types: Mapping[str, pa.DataType] | None = None,
    ) -> Summary:
        client = client_for(None)
        job = prepare(
            self._table,
            path,
            client=client,
            kind=kind,
            resume=resume,
            overwrite=overwrite,
            on_error=on_error,
            max_errors=max_errors,
            retry_errors=retry_errors,
            write_index=write_index,
            types=types,
        )
        return run(job, client)
