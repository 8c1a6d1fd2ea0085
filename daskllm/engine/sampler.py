"""Logits in, one token per row out.

Order of the rules, as in transformers: penalties, end tokens held back until min_tokens, temperature, top_k,
top_p, min_p. Each row's result depends on its own logits, rules and draws alone: rows are grouped by what
they need, and a group's operations go row by row along the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from daskllm.engine.kernels.reference import first_largest
from daskllm.engine.sequence import SequenceState
from daskllm.types import SamplingParams, TokenLogprob

__all__ = ["choose", "token_scores"]

_SCORED_ROWS = 64  # at a time: float64 copies of wide rows
_CANDIDATES = 1024
"""The filters nearly always leave some of so many likeliest tokens, which are found in a fraction of the time
that sorting the vocabulary takes."""


def choose(logits: torch.Tensor, sequences: Sequence[SequenceState]) -> list[int]:
    """The next token of every sequence; its log-probability is noted on the sequence where asked for.

    Args:
        logits: float32 ``[rows, vocab]``, row i for ``sequences[i]``; may be overwritten.
    """
    wanted = [i for i, s in enumerate(sequences) if s.request.params.logprobs is not None]
    raw = logits[wanted].log_softmax(-1) if wanted else None
    for row, sequence in zip(logits, sequences, strict=True):
        _adjust(row, sequence)
    tokens = first_largest(logits)
    drawn = [i for i, s in enumerate(sequences) if not s.request.params.greedy]
    for filtered in (False, True):
        group = [i for i in drawn if _filters(sequences[i].request.params) == filtered]
        if group:
            tokens[group] = _draw(logits[group], [sequences[i] for i in group], filtered).to(tokens.device)
    chosen: list[int] = tokens.tolist()
    if raw is not None:
        for row, i in zip(raw, wanted, strict=True):
            sequences[i].logprobs.append(_logprob(row, chosen[i], sequences[i].request.params.logprobs or 0))
    return chosen


def token_scores(logits: torch.Tensor, targets: Sequence[int]) -> list[float]:
    """log p(target) of each row; logits float32 ``[rows, vocab]``, float64 sums."""
    scores: list[float] = []
    wanted = torch.tensor(targets, device=logits.device)[:, None]
    for part, ids in zip(logits.split(_SCORED_ROWS), wanted.split(_SCORED_ROWS), strict=True):
        rows = part.double()
        scores += (rows.gather(1, ids)[:, 0] - rows.logsumexp(-1)).tolist()
    return scores


def _adjust(row: torch.Tensor, sequence: SequenceState) -> None:
    """Penalties and held-back end tokens, in place."""
    params, request = sequence.request.params, sequence.request
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=row.device)
        values = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.counts:
        ids = torch.tensor(list(sequence.counts), device=row.device)
        counts = torch.tensor(list(sequence.counts.values()), dtype=torch.float32, device=row.device)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if sequence.produced < params.min_tokens and request.stop_ids:
        row[[i for i in request.stop_ids if i < row.shape[0]]] = float("-inf")


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _draw(logits: torch.Tensor, sequences: Sequence[SequenceState], filtered: bool) -> torch.Tensor:
    """Inverse of the cumulative distribution at one uniform number per row."""
    params = [s.request.params for s in sequences]

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    uniform = column([s.generator.random() for s in sequences if s.generator is not None])
    weights = (logits.double() / column([p.temperature for p in params])).softmax(-1)
    if not filtered:
        return _pick(weights, uniform)
    if weights.shape[1] <= 4 * _CANDIDATES:
        return _pick_kept(*weights.sort(dim=-1, descending=True, stable=True), weights, params, uniform)[0]
    likeliest, ids = weights.topk(_CANDIDATES)
    # Equal ones in the order of their ids, as sorting all of them leaves them.
    ids, places = ids.sort(dim=-1)
    likeliest, places = likeliest.gather(1, places).sort(dim=-1, descending=True, stable=True)
    tokens, least = _pick_kept(likeliest, ids.gather(1, places), weights, params, uniform)
    # Where a candidate as unlikely as the last one is kept, others may have to be.
    for i in (least <= likeliest[:, -1]).nonzero()[:, 0].tolist():
        one = weights[i : i + 1]
        ordered = one.sort(dim=-1, descending=True, stable=True)
        tokens[i : i + 1] = _pick_kept(*ordered, one, params[i : i + 1], uniform[i : i + 1])[0]
    return tokens


def _pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first place of each row whose cumulative weight exceeds the draw."""
    cumulative = weights.cumsum(-1)
    at = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    at.clamp_(max=weights.shape[1] - 1)
    # A draw next to 1 must not land past the last token with any weight.
    for i in (weights.gather(1, at) == 0).nonzero()[:, 0].tolist():
        at[i] = weights[i].nonzero()[-1]
    return at[:, 0]


def _pick_kept(
    ordered: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    params: Sequence[SamplingParams],
    uniform: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of those that the filters leave of the likeliest ones, and the smallest weight left."""
    kept = _filter(ordered, weights.sum(-1, keepdim=True), params)
    least = ordered.masked_fill(kept == 0, np.inf).amin(-1)
    return ids.gather(1, _pick(kept, uniform)[:, None])[:, 0], least


def _filter(ordered: torch.Tensor, whole: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Shares of the weights that top_k, top_p and min_p leave, zero for others; the largest come first.

    ``whole`` is the sum of a row's weights, those among them that are not in ``ordered``.
    """

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=ordered.device)[:, None]

    rank = torch.arange(ordered.shape[1], device=ordered.device)
    top_k = column([p.top_k or np.inf for p in params])
    weights = ordered.masked_fill(rank >= top_k, 0.0)
    weights = weights / torch.where(top_k.isinf(), whole, weights.sum(-1, keepdim=True))
    before = weights.cumsum(-1) - weights
    # A row that keeps everything must not lose its last tokens to rounding in the sum.
    top_p = column([p.top_p if p.top_p < 1.0 else np.inf for p in params])
    weights = weights.masked_fill(before >= top_p, 0.0)
    least = column([p.min_p for p in params]) * weights[:, :1]
    return weights.masked_fill(weights < least, 0.0)


def _logprob(row: torch.Tensor, token: int, alternatives: int) -> TokenLogprob:
    values, ids = row.topk(min(alternatives, row.shape[0]))
    return TokenLogprob(token, float(row[token]), dict(zip(ids.tolist(), values.tolist(), strict=True)))
