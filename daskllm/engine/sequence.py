"""What the engine is asked for and what it keeps about each sample while it runs.

The engine deals in token ids. A stop string, a stream, a progress bar all reach it as one function on the
request, called with each new token.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from daskllm.engine.kvcache import block_key
from daskllm.engine.lookup import Lookup
from daskllm.engine.sizes import BLOCK_SIZE
from daskllm.types import FinishReason, Pooling, SamplingParams, TokenLogprob

__all__ = ["Request", "Sample", "SequenceState", "random_stream"]

Vector: TypeAlias = npt.NDArray[np.float64]


def random_stream(seed: int, *parts: Sequence[int]) -> np.random.Generator:
    """A counter-based generator (Philox, Salmon et al. 2011) keyed by a seed and lists of integers.

    The same key gives the same draws on every machine; keys that differ anywhere are independent.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(seed.to_bytes(32, "little", signed=True))
    for part in parts:
        digest.update(struct.pack(f"<q{len(part)}q", len(part), *part))
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))


@dataclass(slots=True, eq=False)
class Request:
    """One prompt.

    Attributes:
        prompt: its token ids, at least one.
        params: how tokens are chosen; strings in it mean nothing here.
        stop_ids: ids that end a sample (the model's own and the caller's).
        stream_key: (seed, lists of integers) of the row's draws, the sample number not included.
        on_token: called in the engine's thread as ``on_token(sample, output ids)`` after each new token;
            True ends the sample with "stop".
        kind: "generate"; or no generation: "score" is the log-probability of every prompt token after the
            first, "embed" the prompt's hidden states pooled.
        pooling: how "embed" pools.
        priority: waits before those with a lower one, and gives its blocks up after them.
        caller: whose request this is; rows of several callers share steps.
    """

    prompt: Sequence[int]
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    stream_key: tuple[int, tuple[Sequence[int], ...]] = (0, ())
    on_token: Callable[[int, Sequence[int]], bool] | None = None
    kind: Literal["generate", "score", "embed"] = "generate"
    pooling: Pooling = "mean"
    priority: int = 0
    caller: object = None


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What became of one sample of a request; ``error`` says why a "error" one ended.

    ``scores`` is of a "score" request, ``pooled`` (float64 [hidden]) of an "embed" one. ``reused`` tells how
    many tokens of the prompt were found instead of computed.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    scores: tuple[float, ...] | None = None
    pooled: Vector | None = None
    error: str | None = None
    reused: int = 0


@dataclass(slots=True, eq=False)
class SequenceState:
    """One sample in the making.

    Attributes:
        request: what it answers.
        sample: its number among the request's n.
        tokens: prompt and output ids.
        computed: how many of them have their keys and values in the cache.
        reused: how many of those were found there, for a row taken up again too.
        blocks: its block table.
        keys: what its full blocks are found by, as far as somebody asked.
        scores, hidden: what its prompt has given so far: log-probabilities, the sum of its hidden states.
        counts: how often each id stands in the output, for the penalties.
        lookup: what it has guessed of its next tokens, and from what.
        flying: whether a step that it is in is under way.
        dropped: nobody waits for it any more; it goes when its step has landed.
    """

    request: Request
    sample: int
    tokens: list[int]
    computed: int = 0
    reused: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    hidden: Vector | None = None
    counts: Counter[int] = field(default_factory=Counter)
    generator: np.random.Generator | None = None
    lookup: Lookup | None = None
    flying: bool = False
    dropped: bool = False

    @classmethod
    def of(cls, request: Request, sample: int) -> SequenceState:
        """Sample number ``sample`` of a request, not begun."""
        state = cls(request, sample, list(request.prompt))
        if not request.params.greedy:
            seed, parts = request.stream_key
            state.generator = random_stream(seed, *parts, (sample,))
        return state

    @property
    def output(self) -> list[int]:
        """The ids generated so far."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def produced(self) -> int:
        """How many tokens were generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def takes_likeliest(self) -> bool:
        """Whether the next token is the likeliest by the logits alone, whichever tokens come before it."""
        params = self.request.params
        return (
            params.greedy
            and params.repetition_penalty == 1.0
            and params.presence_penalty == params.frequency_penalty == 0.0
            and params.logprobs is None
            and (self.produced >= params.min_tokens or not self.request.stop_ids)
        )

    @property
    def remaining(self) -> int:
        """Tokens that still have to run before the next one can be chosen."""
        return len(self.tokens) - self.computed

    def key(self, number: int) -> bytes:
        """What its block ``number`` is found by; the block's tokens must all be known."""
        while len(self.keys) <= number:
            start = len(self.keys) * BLOCK_SIZE
            parent = self.keys[-1] if self.keys else b""
            self.keys.append(block_key(parent, self.tokens[start : start + BLOCK_SIZE]))
        return self.keys[number]

    def pool(self, rows: Vector) -> None:
        """Add hidden states ``[rows, hidden]`` of its prompt, in the order of its tokens."""
        for row in rows:  # one by one: where chunks begin and end must not show in the sum
            self.hidden = row if self.hidden is None else self.hidden + row

    def rewind(self) -> None:
        """Forget what its tokens gave besides the output, since they run again."""
        self.scores.clear()
        self.hidden = None

    def finished(self, reason: FinishReason, error: str | None = None) -> Sample:
        """The sample as its caller gets it."""
        request = self.request
        logprobs = tuple(self.logprobs) if request.params.logprobs is not None else None
        scores = tuple(self.scores) if request.kind == "score" else None
        pooled = self.hidden
        if pooled is not None and request.pooling == "mean":
            pooled = pooled / len(request.prompt)
        reused = min(self.reused, len(self.request.prompt))
        return Sample(tuple(self.output), reason, logprobs, scores, pooled, error, reused)
