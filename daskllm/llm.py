"""What a user holds: a model by its handle, and the calls on it.

It owns `load` and the rule that a call gives back the like of what it was given. It refuses to know how rows
are answered (`session`), where (`runtime`), and how tables are (`frame`).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import dask
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd

from daskllm.checkpoint import Checkpoint, open_checkpoint
from daskllm.frame import ask_series, check_chats
from daskllm.graph import LayerGraph, Plan
from daskllm.models import DecoderConfig, describe, layer_names, sources
from daskllm.runtime import dataflow
from daskllm.runtime.call import Call, Kind, draw_seed
from daskllm.runtime.cluster import client_for, over_rows
from daskllm.runtime.loading import (
    check_client,
    check_options,
    close_on,
    kv_bytes,
    open_on,
    reachable,
    residency_of,
    specs_of,
)
from daskllm.runtime.placing import Stages, check_stages, place, plan_of, with_times
from daskllm.runtime.process import close_session, session_for
from daskllm.runtime.resident import resident_bytes
from daskllm.runtime.tasks import answer_bag, answer_rows, plain
from daskllm.session import Session, end_tokens
from daskllm.text.tokenizer import Tokenizer
from daskllm.types import Completion, ModelSpec, RowError, SamplingParams

if TYPE_CHECKING:
    from dask.delayed import Delayed
    from distributed import Client

__all__ = ["LLM", "generate_text", "load", "parallel_generate_text"]


class LLM:
    """A model, by a handle that is as small as its specification; `load` makes one.

    Its weights are opened once in each process that answers rows. Pickled, it is its specification.

    Attributes:
        spec: which model, and how it is opened.
        client: the Dask client given to `load`, or None.
    """

    def __init__(self, spec: ModelSpec, client: Client | None = None) -> None:
        self.spec = spec
        self.client = client

    def __reduce__(self) -> tuple[Any, ...]:
        return LLM, (self.spec,)

    def __repr__(self) -> str:
        spec = self.spec
        return f"<LLM {spec.path} dtype={spec.dtype} device={spec.device}>"

    def session(self) -> Session:
        """This process's open model; opens it where that has not happened yet.

        For a model in stages, one that asks the worker of the last stage.
        """
        return session_for(self.spec)

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.spec.path, self.spec.revision)

    @cached_property
    def config(self) -> DecoderConfig:
        """What the model is, in numbers."""
        return describe(self._checkpoint.config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        return Tokenizer.from_directory(self._checkpoint.path)

    def generate(self, prompts: Any, **sampling: Any) -> Any:
        """Continue prompts.

        Args:
            prompts: a str; a list of str or of token-id lists; a pandas or Dask Series; a Dask Bag. Text is
                taken as it is: special tokens spelled in it are text.
            sampling: fields of `daskllm.SamplingParams`.

        Returns:
            For a str a `Completion`; for a list the list of them, in order; with ``n > 1`` a list of n
            completions in the place of each. For a Series a frame of answers with the Series' index
            (columns as ``df.llm.generate`` adds them); for a Bag a Bag of completions. A row that cannot be
            answered has ``finish_reason`` "error", and its neighbours are as if it were not there.

        Raises:
            TypeError: neither of these, or an unknown sampling argument.
            ValueError: a sampling value out of its range.
        """
        return self._ask("generate", prompts, sampling)

    def chat(self, messages: Any, **sampling: Any) -> Any:
        """The model's next turn.

        Args:
            messages: a conversation (a list of ``{"role": ..., "content": ...}``) or a str, which is one user
                turn; or many of them, in a list, Series or Bag.
            sampling: fields of `daskllm.SamplingParams`.

        Returns, raises: as `generate`; ValueError also where the model has no chat template.
        """
        return self._ask("chat", messages, sampling)

    def stream(self, prompt: str | Sequence[int], **sampling: Any) -> Iterator[str]:
        """One answer in pieces, as they come; their join is the text.

        Runs in this process, or where the engine is of a model in stages.

        Args:
            prompt: text or token ids.

        Raises:
            RowError: the prompt cannot be answered; raised by the first piece.
        """
        params = SamplingParams.of(sampling)
        if params.n != 1:
            raise ValueError(f"n must be 1 for a stream, not {params.n}")
        if draw_seed(params):
            params = params.with_(seed=secrets.randbits(63))
        call = Call(spec=self.spec, kind="generate", params=params)
        session = self.session()
        (ready,) = call.prompts([(prompt,)], session.tokenizer)
        return session.stream(ready, params)

    def score(self, texts: Any, *, tokens: bool = False) -> Any:
        """How likely the model finds texts: natural log-probability of all tokens after the first.

        Args:
            texts: as the prompts of `generate`.
            tokens: per token instead of per text; for a str or a list.

        Returns:
            For a list a float64 array [n], NaN where a text cannot be scored; for a str a float. With
            ``tokens`` a list of float for each text, one fewer than its tokens, or None. For a Series a frame
            with the columns of ``df.llm.score``; for a Bag a Bag of float.
        """
        if not isinstance(tokens, bool):
            raise TypeError(f"tokens must be True or False, not {tokens!r}")
        if not tokens:
            return self._ask("score", texts, {})
        one = isinstance(texts, str)
        call = Call(spec=self.spec, kind="score")
        scores = self._answers([texts] if one else _listed(texts, "score"), call)
        lists = [list(s.token_logprobs) if s.error is None else None for s in scores]
        return lists[0] if one else lists

    @cached_property
    def graph(self) -> LayerGraph:
        """The model as a graph of layers with their costs; made from its description, no weight is read."""
        dtype = self.config.dtype if self.spec.dtype == "auto" else self.spec.dtype
        return LayerGraph.of(self.config, dtype)

    def delayed(
        self,
        token_ids: Sequence[int],
        *,
        fuse: Literal["layer", "stage"] = "layer",
        shards: int = 1,
        max_tokens: int | None = None,
        ignore_eos: bool = False,
        stop_token_ids: Sequence[int] = (),
    ) -> Delayed:
        """One sequence through the model's layers, each a Dask task named after it.

        Args:
            token_ids: at least one.
            fuse: "layer" for a task per layer, "stage" for a task per stage.
            shards: above 1, each layer opens into so many head groups, MLP columns and vocabulary shards (as
                far as it has them) that run in parallel and are summed.
            max_tokens: generate greedily up to so many tokens, a row of layer tasks for each, keys and values
                as results of tasks; None gives the logits of ``token_ids``.
            ignore_eos, stop_token_ids: where that generation ends.

        Returns:
            float32 logits ``[tokens, vocab]``; or with ``max_tokens`` the list of new token ids.

        Raises:
            ValueError: no token, one outside the vocabulary, or arguments that do not go together.

        Example: ``llm.delayed([1, 5, 9]).visualize()`` draws the tasks.
        """
        ids = self._checked_ids(token_ids)
        if fuse not in ("layer", "stage"):
            raise ValueError(f'fuse must be "layer" or "stage", not {fuse!r}')
        if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
            raise ValueError(f"shards must be an integer of at least 1, not {shards!r}")
        if max_tokens is not None:
            if fuse != "layer" or shards != 1:
                raise ValueError('max_tokens goes layer by layer: leave fuse="layer" and shards=1')
            params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids)
            self._check_room(len(ids) + params.max_tokens - 1)
            ends = set(params.stop_token_ids or ()) | set(() if ignore_eos else self._eos_token_ids)  # type: ignore[arg-type]
            return dataflow.decode(self.spec, layer_names(self.config), ids, params.max_tokens, ends)
        if shards > 1:
            return dataflow.forward(self.spec, LayerGraph.of(self.config, shards=shards).open_all(), ids)
        whole = [layer_names(self.config)]
        stages = None if fuse == "layer" else [stage.layers for stage in self.spec.stages] or whole
        return dataflow.forward(self.spec, self.graph, ids, stages)

    def _checked_ids(self, token_ids: Sequence[int]) -> list[int]:
        ids = [int(i) for i in token_ids]
        if not ids:
            raise ValueError("token_ids must hold at least one token")
        vocab = self.config.vocab_size
        outside = [i for i in ids if not 0 <= i < vocab]
        if outside:
            raise ValueError(f"token id {outside[0]} is outside the model's vocabulary of {vocab}")
        self._check_room(len(ids))
        return ids

    def _check_room(self, positions: int) -> None:
        if positions > self.config.max_positions:
            raise ValueError(
                f"{positions} positions do not fit the model's context of {self.config.max_positions}"
            )

    @property
    def _eos_token_ids(self) -> tuple[int, ...]:
        return end_tokens(self._checkpoint, self.config)

    def close(self) -> None:
        """Let the model go, here and on the client's workers; a later call opens it again."""
        close_session(self.spec)
        client = client_for(self.client)
        if client is not None and client.status == "running":
            close_on(client, self.spec)

    @property
    def plan(self) -> Plan:
        """Which layers are where, what that was expected to take and, for stages, what it took so far."""
        client = client_for(self.client)
        if client is None:
            return plan_of(self.spec, self.config, None)
        present = specs_of(client, self.spec)[-1]
        return with_times(plan_of(present, self.config, client), client, present)

    def residency(self) -> dict[str, dict[str, int]]:
        """Worker address ("" for this process) -> layer -> bytes of its weights that are held there."""
        client = client_for(self.client)
        if client is None:
            return {"": resident_bytes(self.spec)}
        return residency_of(client, self.spec)

    def _ask(self, kind: Kind, given: Any, sampling: Mapping[str, Any]) -> Any:
        params = SamplingParams.of(sampling)
        if kind == "chat":
            check_chats(self)
        if isinstance(given, (pd.Series, dd.Series)):
            output = "score" if kind == "score" else "generated"
            return ask_series(given, self, kind, output, sampling)
        if isinstance(given, (pd.DataFrame, dd.DataFrame)):
            raise TypeError(f"a table is asked by its own accessor: df.llm.{kind}(llm, ...)")
        call = Call(spec=self.spec, kind=kind, params=params, job_seed=draw_seed(params))
        if isinstance(given, db.Bag):
            numbers = db.from_sequence(range(given.npartitions), npartitions=given.npartitions)
            return given.map_partitions(answer_bag, numbers, call=call)
        if isinstance(given, str) or (kind == "chat" and _is_conversation(given)):
            return plain(self._answers([given], call)[0], call)
        answers = [plain(answer, call) for answer in self._answers(_listed(given, kind), call)]
        return np.array(answers, dtype="float64") if kind == "score" else answers

    def _answers(self, items: Sequence[Any], call: Call) -> list[Any]:
        rows = [(item,) for item in items]
        return over_rows(client_for(self.client), answer_rows, rows, call)


def load(
    model: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantize: None = None,
    revision: str | None = None,
    client: Client | None = None,
    plan: Plan | Literal["auto"] = "auto",
    stages: Stages = "auto",
    replicas: Literal["auto"] = "auto",
    kv_memory: int | str = "auto",
) -> LLM:
    """Open a model.

    With a Dask client, given or current, it is opened on every worker that is there, and on those that join
    later by their first task; without one, in this process. In stages, each of its layers is on one worker
    and nowhere else, and a row's every token passes through all of them.

    Args:
        model: a directory, or a Hub id (``"org/name"``).
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        quantize: None, weights as they are.
        revision: branch, tag or commit of a Hub id.
        client: the Dask client whose workers answer lists, Series and pandas tables.
        plan: a `daskllm.graph.Plan` of one replica over the client's workers, named by their addresses;
            "auto" makes one.
        stages: into how many workers' parts the layers are cut; "auto": not at all where the model fits every
            worker, else as few as fit. 1: every worker holds the whole model.
        replicas: "auto".
        kv_memory: KV cache per process, in bytes or as "2 GiB"; "auto" takes a share of the free memory.

    Raises:
        ModelError: the model cannot be loaded; the message names the file and the tensor or field.
        ValueError: an argument out of what is supported, stages without a client or more than there are
            layers or workers.
        PlanError: no worker has room for some layer, or the plan is not one of this model on these workers.
        TypeError: an argument of the wrong type.
    """
    check_options(dtype, device, quantize, replicas)
    memory = kv_bytes(kv_memory)
    check_client(client)
    answering = client_for(client)
    check_stages(stages, plan, answering)
    checkpoint = open_checkpoint(model, revision)
    try:
        config = describe(checkpoint.config)
        sources(config, checkpoint.names)
        path, commit = reachable(model, checkpoint)
        spec = ModelSpec(
            path=path,
            revision=commit,
            dtype=dtype,
            device=device,
            kv_memory=memory,
            identity=checkpoint.identity,
        )
    finally:
        checkpoint.close()
    if answering is None:
        llm = LLM(spec, client)
        llm.session()
        return llm
    chosen = place(answering, spec, config, stages, plan)
    llm = LLM(chosen, client)
    open_on(answering, chosen)
    return llm


def generate_text(prompt: str, model: LLM | str | os.PathLike[str], max_length: int = 50) -> str:
    """The continuation of one prompt, greedily, without the prompt.

    Args:
        model: an `LLM`, or what `load` takes.
        max_length: at most this many new tokens.

    Raises:
        RowError: the prompt cannot be answered.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be text, not {prompt!r:.80}")
    return parallel_generate_text([prompt], model, 1, max_length)[0]


def parallel_generate_text(
    prompts: Sequence[str],
    model: LLM | str | os.PathLike[str],
    num_workers: int = 4,
    max_length: int = 50,
) -> list[str]:
    """The continuations of many prompts, greedily, in the prompts' order.

    Args:
        prompts: texts.
        model: an `LLM`, or what `load` takes.
        num_workers: Dask tasks that the prompts are dealt to, on the workers of the model's client or of the
            current one, else on threads; those in one process share its batch.
        max_length: at most this many new tokens for each.

    Raises:
        RowError: a prompt cannot be answered.
    """
    params = SamplingParams(max_tokens=max_length)
    if isinstance(num_workers, bool) or not isinstance(num_workers, Integral) or num_workers < 1:
        raise ValueError(f"num_workers must be an integer of at least 1, not {num_workers!r}")
    rows = [(prompt,) for prompt in _listed(prompts, "generate")]
    llm = model if isinstance(model, LLM) else load(model)
    call = Call(spec=llm.spec, kind="generate", params=params)
    places = [(0, row) for row in range(len(rows))]
    # Dealt out like cards, so that long prompts at one end do not make one long task.
    hands = [slice(first, None, int(num_workers)) for first in range(min(int(num_workers), len(rows)))]
    answer = dask.delayed(answer_rows, pure=False, traverse=False)
    parts = dask.compute(
        *(answer(rows[hand], call, places[hand]) for hand in hands),
        scheduler=client_for(llm.client),
        num_workers=int(num_workers),
    )
    texts = [""] * len(rows)
    for hand, part in zip(hands, parts, strict=True):
        texts[hand] = [_text(answer) for (answer,) in part]
    return texts


def _text(answer: Completion) -> str:
    if answer.text is None:
        raise RowError(answer.error)
    return answer.text


def _is_conversation(given: Any) -> bool:
    return isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], Mapping)


def _listed(given: Any, kind: Kind) -> list[Any]:
    """The items of a list of prompts.

    Raises:
        TypeError: no list, or the token ids of a single prompt.
    """
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, (Sequence, np.ndarray, pd.Index)):
        raise TypeError(
            f"{kind} takes a str, a list, a pandas or dask Series, or a dask Bag, not {type(given).__name__}"
        )
    items = list(given)
    if items and all(isinstance(item, Integral) and not isinstance(item, bool) for item in items):
        raise TypeError("a list of integers is one prompt's token ids: put it into a list, [[1, 2, 3]]")
    return items
