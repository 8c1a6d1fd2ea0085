"""What a user holds: a model by its handle, and the calls on it.

It owns `load` and a model's calls. It refuses to know how rows are answered (`session`), where (`runtime`),
what comes back for what is given (`given`), and how tables are (`frame`).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from daskllm.given import answers_of, ask, listed
from daskllm.graph import LayerGraph, Plan
from daskllm.models import DecoderConfig, end_tokens
from daskllm.runtime import dataflow, shown
from daskllm.runtime.call import Call, draw_seed
from daskllm.runtime.cluster import client_for
from daskllm.runtime.facts import Facts
from daskllm.runtime.loading import (
    check_client,
    check_cluster,
    keep_on,
    leave_on,
    let_go_on,
    open_on,
    residency_of,
    specify,
    specs_of,
)
from daskllm.runtime.placing import Replicas, Stages, check_stages, place, plan_of, with_times
from daskllm.runtime.process import close_session, session_for, using
from daskllm.runtime.recall import place_for
from daskllm.runtime.resident import resident_bytes
from daskllm.runtime.update import of_its_own, present_at, update
from daskllm.runtime.versions import known, learn, present
from daskllm.text.tokenizer import Tokenizer
from daskllm.types import ModelSpec, Pooling, SamplingParams

if TYPE_CHECKING:
    from dask.delayed import Delayed
    from distributed import Client

    from daskllm.session import Session

__all__ = ["LLM", "load"]


class LLM:
    """A model, by a handle that is as small as its specification; `load` makes one.

    Its weights are opened once in each process that answers rows. Pickled, it is its specification.

    Attributes:
        spec: which model, and how it was opened; an update leaves it as it is.
        client: the Dask client given to `load`, or None.
        answers: the directory or URL where finished rows are kept, or None; calls made from now on use it.

    Example:
        >>> from daskllm import demo
        >>> llm = load(demo.model_path())
        >>> llm.chat("Calculate 770 + 951.").text, llm.generate([[1, 5], []], max_tokens=4)[1].finish_reason
        ('1721', 'error')
        >>> ids = llm.tokenizer.encode_chat([{"role": "user", "content": "77加81等于几？"}])
        >>> "".join(llm.stream(ids)), llm.config.family, llm.version
        ('158', 'llama', 0)
        >>> likely, unlikely = llm.score(["The student saw three birds.", "birds three saw student The."])
        >>> bool(likely > unlikely), llm.embed(["ten cars", "two cars"]).shape
        (True, (2, 128))
        >>> llm.delayed([1, 5, 9]).compute().shape, [node.name for node in llm.graph.nodes][:2]
        ((3, 2048), ['embed', 'layers.0'])
        >>> list(llm.plan.placement), list(llm.residency()), llm.session().config == llm.config
        (['this process'], [''], True)
        >>> llm.update(demo.model_path())  # the same weights, as it happens
        >>> llm.version
        1
        >>> llm.close()
    """

    def __init__(
        self,
        spec: ModelSpec,
        client: Client | None = None,
        config: DecoderConfig | None = None,
        answers: str | None = None,
    ) -> None:
        self.spec = spec
        self.answers = answers
        self.client = client
        self._facts = Facts(spec, config)

    def __reduce__(self) -> tuple[Any, ...]:
        # Where it arrives, nobody may have heard of an update.
        return _arrived, (self.spec, present(self.spec), self.answers)

    def __repr__(self) -> str:
        spec = self.spec
        quantized = "" if spec.quantize is None else f" quantize={spec.quantize}"
        quantized += "" if spec.kv_dtype == "auto" else f" kv_dtype={spec.kv_dtype}"
        return f"<LLM {spec.path} dtype={spec.dtype} device={spec.device}{quantized}>"

    def _repr_html_(self) -> str:
        now = present(self.spec)  # as far as this process knows: showing a model asks nobody
        facts = self._facts if self._facts.spec == now else Facts(now)
        return shown.model_html(facts, self.client)

    def session(self) -> Session:
        """This process's open model; opens it where that has not happened yet.

        For a model in stages, one that asks the worker of the last stage. An update closes it, when the rows
        are done that were asked for by this handle's other methods.
        """
        return session_for(self._present)

    @property
    def _present(self) -> ModelSpec:
        """The version that answers now."""
        return present_at(client_for(self.client), self.spec)

    @property
    def _now(self) -> Facts:
        now = self._present
        if self._facts.spec != now:
            self._facts = Facts(now)
        return self._facts

    @property
    def version(self) -> int:
        """How many updates have brought other weights since the model was loaded."""
        return self._present.version

    @property
    def config(self) -> DecoderConfig:
        """What the model is, in numbers."""
        return self._now.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        return self._now.tokenizer

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
        return ask(self, "generate", prompts, sampling)

    def chat(self, messages: Any, **sampling: Any) -> Any:
        """The model's next turn.

        Args:
            messages: a conversation (a list of ``{"role": ..., "content": ...}``) or a str, which is one user
                turn; or many of them, in a list, Series or Bag.
            sampling: fields of `daskllm.SamplingParams`.

        Returns, raises: as `generate`; ValueError also where the model has no chat template.
        """
        return ask(self, "chat", messages, sampling)

    def stream(self, prompt: str | Sequence[int], **sampling: Any) -> Generator[str, None, None]:
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
        return self._pieces(prompt, Call(spec=self.spec, kind="generate", params=params))

    def _pieces(self, prompt: str | Sequence[int], call: Call) -> Generator[str, None, None]:
        present_at(client_for(self.client), self.spec)  # or this process would not know of another's update
        with using(self.spec) as session:
            (ready,) = call.prompts([(prompt,)], session.tokenizer)
            yield from session.stream(ready, call.params)

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
            return ask(self, "score", texts, {})
        one = isinstance(texts, str)
        call = Call(spec=self.spec, kind="score")
        scores = answers_of(self, [texts] if one else listed(texts, "score"), call)
        lists = [list(s.token_logprobs) if s.error is None else None for s in scores]
        return lists[0] if one else lists

    def embed(self, texts: Any, pooling: Pooling = "mean", normalize: bool = True) -> Any:
        """Texts as vectors: the hidden states behind the model's last norm, pooled over each text's tokens.

        Args:
            texts: as the prompts of `generate`.
            pooling: "mean" of all tokens, those included that the tokenizer adds, or the "last" one alone.
            normalize: make each vector's Euclidean length 1.

        Returns:
            For a list a float32 array [n, hidden], for a str one of [hidden]; NaN where a text cannot be
            embedded. For a Series a frame with the columns of ``df.llm.embed``; for a Bag a Bag of arrays.

        Raises:
            ValueError: an unknown pooling.
            TypeError: no text, list, Series or Bag; or ``normalize`` is no bool.
        """
        return ask(self, "embed", texts, {}, pooling=pooling, normalize=normalize)

    @property
    def graph(self) -> LayerGraph:
        """The model as a graph of layers with their costs; made from its description, no weight is read."""
        return self._now.graph

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
        """One sequence through the layers of the model's present version, each a Dask task named after it.

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
        now = self._now
        if max_tokens is None:
            return dataflow.logits(now.spec, now.config, token_ids, fuse, shards)
        if fuse != "layer" or shards != 1:
            raise ValueError('max_tokens goes layer by layer: leave fuse="layer" and shards=1')
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids)
        ends = set() if ignore_eos else set(end_tokens(now.checkpoint.generation_config, now.config))
        ends.update(params.stop_token_ids or ())  # type: ignore[arg-type]
        return dataflow.decode(now.spec, now.config, token_ids, params.max_tokens, ends)

    def update(self, checkpoint: str | os.PathLike[str], *, revision: str | None = None) -> None:
        """Give the model other weights while it answers, here and on the client's workers.

        Every row is answered wholly by one version: rows that are under way finish on the old one, whose
        weights and KV cache go with the last of them, and rows that begin later are answered by the new one,
        those of graphs made before too. ``version`` counts; each `Completion` says which version it is from.

        Both versions are in memory together for a while. The new one's KV cache takes its share of what is
        free then; with ``kv_memory`` there is room for that much twice.

        Args:
            checkpoint: a directory or a Hub id, of the same description: vocabulary, layers, sizes. Its
                tokenizer, chat template and end tokens come with it. Files of the version that is open must
                not be overwritten in place; write beside them, or rename files over them.
            revision: of a Hub id.

        Raises:
            ModelError: it cannot be loaded on some worker, or is another model; the message names the file
                and the tensor or field. The old version goes on everywhere, as if nothing had been asked.
            PlanError, StageLostError: a worker of the model's stages is gone, and those left have no room.
            RuntimeError: called in a task.
        """
        update(client_for(self.client), self.spec, self.config, checkpoint, revision)

    def close(self) -> None:
        """Let the model go, all versions of it, here and on the client's workers; a later call opens the
        present one again.

        Where other clients have loaded it too, it stays on the workers until they are gone; where rows of it
        are under way, as a background job's, until they are done and it was idle for a while.
        """
        close_session(self.spec)
        client = client_for(self.client)
        if client is not None and client.status == "running" and leave_on(client, self.spec):
            for one in known(self.spec):
                let_go_on(client, one)

    @property
    def plan(self) -> Plan:
        """Which layers are where, what that was expected to take and what it took so far.

        The workers and their links are measured for it where that has not been done.
        """
        client = client_for(self.client)
        placed = self._present if client is None else specs_of(client, self._present)[-1]
        return with_times(plan_of(placed, self.config, client), client, placed)

    def residency(self) -> dict[str, dict[str, int]]:
        """Worker address ("" for this process) -> layer -> bytes of its weights that are held there."""
        client = client_for(self.client)
        if client is None:
            return {"": resident_bytes(self._present)}
        return residency_of(client, self._present)


def _arrived(spec: ModelSpec, now: ModelSpec, answers: str | None) -> LLM:
    learn(spec, now)
    return LLM(spec, answers=answers)


def load(
    model: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    kv_dtype: str = "auto",
    revision: str | None = None,
    client: Client | None = None,
    plan: Plan | Literal["auto"] = "auto",
    stages: Stages = "auto",
    replicas: Replicas = "auto",
    kv_memory: int | str = "auto",
    answers: str | os.PathLike[str] | Literal[False] | None = "auto",
) -> LLM:
    """Open a model.

    With a Dask client, given or current, it is opened on every worker that is there, and on those that join
    later by their first task; without one, in this process. In stages, each of its layers is on one worker
    and nowhere else, and a row's every token passes through all of them. It stays until `LLM.close`, or until
    no client that loaded it has been there for a minute (Dask's configuration ``daskllm.lease``).

    Args:
        model: a directory, or a Hub id (``"org/name"``).
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        quantize: None, weights as they are; "int8", the matrices of the layers and the head in eight bits
            with a scale for each output channel, multiplied with inputs in eight bits: half the memory that
            they take in bfloat16, and other answers. On CPUs.
        kv_dtype: "auto", keys and values in the type that the model computes in; "int8", in eight bits with a
            scale for each token and head: about half the memory that they take in bfloat16, and other
            answers. On CPUs, and where head_dim is a multiple of 4.
        revision: branch, tag or commit of a Hub id.
        client: the Dask client whose workers answer lists, Series and pandas tables.
        plan: a `daskllm.graph.Plan` over the client's workers, named by their addresses; "auto" makes one.
        stages: into how many workers' parts the layers are cut; "auto": not at all where the model fits a
            worker, else as few as fit.
        replicas: how many copies of the model there are, so that a small job does not load a big one
            everywhere; rows on any worker are answered by the copy that is least busy. "auto": with
            ``stages`` as many chains of stages as the workers allow, otherwise a copy in every process that
            answers rows. What loading costs against a job's length is not known here: a plan made with
            ``Workload(total_tokens=...)`` counts it.
        kv_memory: KV cache per process, in bytes or as "2 GiB"; "auto" takes a share of the free memory.
        answers: where finished rows are kept, so that a lost worker's are not generated again and the same
            rows cost nothing the next time: a directory or an fsspec URL, best one that all workers reach.
            "auto": Dask's configuration ``daskllm.answers``, else the user's cache directory on each machine.
            None keeps none.

    Raises:
        ModelError: the model cannot be loaded; the message names the file and the tensor or field.
        ValueError: an argument out of what is supported; stages or replicas without a client, or more than
            there are layers or workers for.
        PlanError: no worker has room for some layer, or the plan is not one of this model on these workers.
        TypeError: an argument of the wrong type.
        RuntimeError: the client's scheduler or a worker has another daskllm, or none; see `daskllm.install`.

    Example:
        >>> from daskllm import demo
        >>> load(demo.model_path()).chat("77加81等于几？").text
        '158'
    """
    check_client(client)
    kept = place_for(answers)
    answering = client_for(client)
    if answering is not None:
        check_cluster(answering)
    check_stages(stages, replicas, plan, answering)
    spec, config = specify(
        model,
        dtype=dtype,
        device=device,
        quantize=quantize,
        kv_dtype=kv_dtype,
        revision=revision,
        kv_memory=kv_memory,
        with_content=answering is not None,
    )
    if answering is None:
        llm = LLM(of_its_own(None, spec), client, config, kept)
        llm.session()
        return llm
    chosen = place(answering, spec, config, stages, replicas, plan)
    chosen = of_its_own(answering, chosen)
    llm = LLM(chosen, client, config, kept)
    open_on(answering, chosen)
    keep_on(answering, chosen)
    # It needs distributed, which whoever has a client has imported.
    from daskllm.dashboard import install

    install(answering)
    return llm
