"""What a caller says and gets back: sampling parameters, completions, errors.

This room is low in the house. It knows no array library, no Dask and no tokenizer, so that
anything may import it for free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias

from daskllm import markup

__all__ = [
    "URGENT",
    "Completion",
    "DaskLLMError",
    "FinishReason",
    "JobError",
    "Message",
    "ModelError",
    "ModelSpec",
    "Pooling",
    "Prompt",
    "RowError",
    "SamplingParams",
    "StageLostError",
    "StageSpec",
    "TokenLogprob",
]

FinishReason: TypeAlias = Literal["stop", "length", "error"]
Pooling: TypeAlias = Literal["mean", "last"]
"""Which of a text's hidden states its embedding is made of: all of them, or the last token's."""
URGENT = 1
"""The priority of what somebody waits for, above a job's 0."""
Message: TypeAlias = Mapping[str, Any]
"""One chat turn, ``{"role": ..., "content": ...}``, with whatever else the model's template reads."""


class DaskLLMError(Exception):
    """Base of every error that is about daskllm rather than about an argument.

    Example:
        >>> issubclass(ModelError, DaskLLMError), issubclass(RowError, ValueError)
        (True, False)
    """


class ModelError(DaskLLMError):
    """A model directory that cannot be loaded; the message names the file and the tensor or field.

    Example:
        >>> import daskllm
        >>> try:
        ...     daskllm.load("/no/such/model")
        ... except ModelError as error:
        ...     print(error)
        there is no directory '/no/such/model', nor is it a Hub id (org/name)
    """


class StageLostError(DaskLLMError):
    """A worker that held layers of a model is gone or does not answer, and its rows with it."""


class JobError(DaskLLMError):
    """A job that stopped because too many of its rows failed; its finished parts stay.

    Example: a job stops with it, and may go on under another limit.
        >>> raise JobError("5 of 100 rows failed, and max_errors is 4")
        Traceback (most recent call last):
        ...
        daskllm.types.JobError: 5 of 100 rows failed, and max_errors is 4
    """


class RowError(DaskLLMError):
    """One row cannot be answered; its message becomes the row's error and its neighbours go on.

    Example: a table keeps it as text; the calls for a single text raise it.
        >>> import daskllm
        >>> from daskllm import demo
        >>> daskllm.generate_text("", demo.model_path())
        Traceback (most recent call last):
        ...
        daskllm.types.RowError: prompt is empty
    """


Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message] | RowError"
"""What one row asks: text, token ids, chat messages, or the reason why it already failed."""


@dataclass(frozen=True, slots=True)
class StageSpec:
    """Consecutive layers of a model, and the address of the worker that holds and runs them."""

    worker: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Which model, and how it is to be opened: the small handle that travels instead of weights.

    Attributes:
        path: a directory or a Hub id, as every process that opens it can reach it.
        revision: of a Hub id.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        quantize: "int8" for matrices in eight bits; None for weights as they are.
        kv_dtype: "int8" for keys and values in eight bits; "auto" for the type that the model computes in.
        kv_memory: bytes of KV cache per process; None takes a share of the memory that is free.
        identity: the checkpoint's, so that a changed directory is another model.
        content: the checkpoint's, by which a process knows a copy of the directory from another model.
        version: how many updates have brought other weights since the model was loaded.
        copy: tells a model loaded from files anew from one that came from them and was updated since.
        stages: where its layers are, in order and each once; empty where each process holds all of them.
        replicas: several such chains of stages in the place of one, each the whole model on workers of its
            own; then ``stages`` is empty.
    """

    path: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    quantize: str | None = None
    kv_dtype: str = "auto"
    kv_memory: int | None = None
    identity: str = ""
    content: str = ""
    version: int = 0
    copy: int = 0
    stages: tuple[StageSpec, ...] = ()
    replicas: tuple[tuple[StageSpec, ...], ...] = ()

    @property
    def chains(self) -> tuple[ModelSpec, ...]:
        """A specification with stages for each copy of the model; none where each process holds all layers.

        >>> first, second = StageSpec("a", ("embed",)), StageSpec("b", ("embed",))
        >>> both = ModelSpec(path="m", replicas=((first,), (second,)))
        >>> [chain.stages[0].worker for chain in both.chains], ModelSpec(path="m").chains
        (['a', 'b'], ())
        """
        if self.replicas:
            return tuple(replace(self, stages=stages, replicas=()) for stages in self.replicas)
        return (self,) if self.stages else ()

    def with_chains(self, chains: Sequence[Sequence[StageSpec]]) -> ModelSpec:
        """The same model with its layers on these chains of stages; at least one."""
        if len(chains) == 1:
            return replace(self, stages=tuple(chains[0]), replicas=())
        return replace(self, stages=(), replicas=tuple(map(tuple, chains)))


def _as_tuple(name: str, value: Any, kind: type, what: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    items = (value,) if isinstance(value, kind) else tuple(value) if _is_listlike(value) else None
    if items is None or not all(isinstance(x, kind) and not isinstance(x, bool) for x in items):
        raise TypeError(f"{name} must be {what} or a list of them, not {value!r}")
    return items


def _is_listlike(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a completion are chosen.

    Args:
        max_tokens: at most this many new tokens (≥ 1).
        min_tokens: no stop token, and no stop string, ends a row before this many new tokens.
        temperature: 0 takes the most likely token; above 0 the logits are divided by it and sampled.
        top_p: keep the smallest set of tokens whose probability reaches this (0 < top_p ≤ 1).
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than this share of the most likely one (0 ≤ min_p ≤ 1).
        repetition_penalty: divides positive (multiplies negative) logits of every token seen in prompt
            or output (Keskar et al. 2019, https://arxiv.org/abs/1909.05858); 1 is off.
        presence_penalty: subtracted once from the logit of every token in the output so far.
        frequency_penalty: subtracted from a logit once per occurrence in the output so far.
        stop: strings that end a row; the text is cut before the first that appears.
        stop_token_ids: token ids that end a row, besides the model's own.
        seed: the row's draws come from (seed, prompt ids, sample number) alone, so that they do not depend
            on batch, partition, worker or retry. None draws independently for each row.
        n: completions per prompt, sharing one prefill.
        logprobs: None, or how many alternatives to report beside each chosen token (0: the token alone).
            They are taken before penalties and temperature.
        ignore_eos: go on past the model's own end tokens.
        truncate: "left" drops the oldest tokens of a prompt that does not fit the context; None makes
            such a prompt its row's error.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range; the message names it and the range.

    Example:
        >>> SamplingParams(max_tokens=8, stop="\\n").stop
        ('\\n',)
        >>> SamplingParams(top_p=1.5)
        Traceback (most recent call last):
        ...
        ValueError: top_p must be above 0 and at most 1, not 1.5
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: int | Sequence[int] | None = ()
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    ignore_eos: bool = False
    truncate: Literal["left"] | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "min_tokens", "top_k", "n"):
            self._normalise(name, Integral, "an integer", int)
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            self._normalise(name, Real, "a number", float)
        for name in ("seed", "logprobs"):
            if getattr(self, name) is not None:
                self._normalise(name, Integral, "an integer or None", int)
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, not {self.ignore_eos!r}")
        set_ = object.__setattr__
        set_(self, "stop", _as_tuple("stop", self.stop, str, "a string"))
        ids = _as_tuple("stop_token_ids", self.stop_token_ids, Integral, "a token id")
        set_(self, "stop_token_ids", tuple(int(i) for i in ids))
        self._check_ranges()

    def _normalise(self, name: str, kind: type, what: str, cast: type) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{name} must be {what}, not {value!r}")
        object.__setattr__(self, name, cast(value))

    def _check_ranges(self) -> None:
        def need(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {allowed}, not {getattr(self, name)!r}")

        finite = float("inf")
        need(self.max_tokens >= 1, "max_tokens", "at least 1")
        need(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "between 0 and max_tokens")
        need(0 <= self.temperature < finite, "temperature", "at least 0 and finite")
        need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(0 <= self.top_k < 2**31, "top_k", "at least 0 (0 keeps all) and below 2**31")
        need(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        need(0 < self.repetition_penalty < finite, "repetition_penalty", "above 0 and finite")
        for name in ("presence_penalty", "frequency_penalty"):
            need(abs(getattr(self, name)) < finite, name, "finite")
        need(all(self.stop or ()), "stop", "non-empty strings")
        need(all(i >= 0 for i in self.stop_token_ids or ()), "stop_token_ids", "token ids of at least 0")  # type: ignore[union-attr]
        need(self.n >= 1, "n", "at least 1")
        need(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        need(self.logprobs is None or self.logprobs >= 0, "logprobs", "None or at least 0")
        need(self.truncate in (None, "left"), "truncate", 'None or "left"')

    @classmethod
    def of(cls, sampling: Mapping[str, Any]) -> SamplingParams:
        """Parameters from keyword arguments; an unknown name is a TypeError that lists the known ones.

        >>> SamplingParams.of({"max_tokens": 4}).max_tokens
        4
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(sampling) - set(known))
        if unknown:
            raise TypeError(f"unknown sampling argument {unknown[0]!r}; known: {', '.join(known)}")
        return cls(**sampling)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, so that nothing is drawn."""
        return self.temperature == 0.0

    def with_(self, **changes: Any) -> SamplingParams:
        """A copy with some parameters changed.

        >>> SamplingParams().with_(max_tokens=2).max_tokens
        2
        """
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One chosen token's natural log-probability, and the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer.

    Attributes:
        text: the generated text without its stop string; None when the row failed.
        token_ids: the generated ids, the end token included when one was chosen.
        finish_reason: "stop" (end token or stop string), "length" (max_tokens or the context), "error".
        prompt_tokens: tokens of the prompt, as the model saw it.
        completion_tokens: ``len(token_ids)``.
        logprobs: one entry per generated token when asked for.
        error: why the row failed, else None.
        model_version: of the weights that it is from: 0 as loaded, n after the n-th update.

    Example:
        >>> Completion.failed("prompt is empty").finish_reason
        'error'
    """

    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None
    model_version: int = 0

    def _repr_html_(self) -> str:
        counts = f"{self.prompt_tokens:,} tokens read, {self.completion_tokens:,} written"
        version = f"; version {self.model_version} of the weights" if self.model_version else ""
        failed = self.text is None
        parts = [markup.quote(self.error if failed else self.text, colour=4 if failed else 0)]
        if self.logprobs:
            parts.append(markup.details("tokens", self._likely(self.logprobs)))
        return markup.card(self.finish_reason, *parts, note=f"{counts}{version}")

    @staticmethod
    def _likely(tokens: Sequence[TokenLogprob]) -> markup.HTML:
        """A line for each token: how likely the model found it, and what else it thought of."""

        def others(one: TokenLogprob) -> str:
            return ", ".join(f"{i}: {math.exp(logprob):.1%}" for i, logprob in one.top.items())

        shares = [(one, math.exp(one.logprob)) for one in tokens]
        rows = [(one.token_id, markup.bar(share, f"{share:.1%}"), others(one)) for one, share in shares]
        return markup.table(("token id", "probability", "most likely"), rows)

    @classmethod
    def failed(cls, error: str, prompt_tokens: int = 0, model_version: int = 0) -> Completion:
        """The answer of a row that could not be answered."""
        return cls(None, (), "error", prompt_tokens, 0, None, error, model_version)
