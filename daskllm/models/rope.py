"""Rotary frequencies, plain and stretched.

It knows the formulas, and neither configs nor caches. Sources: RoPE https://arxiv.org/abs/2104.09864;
linear interpolation https://arxiv.org/abs/2306.15595; YaRN https://arxiv.org/abs/2309.00071 (sections 3.2 to
3.4); "llama3" https://github.com/meta-llama/llama-models (``apply_scaling``). Orders of operations follow
transformers, so that the float32 results are the same bits.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from daskllm.models.description import Rope

__all__ = ["inverse_frequencies"]


def inverse_frequencies(
    rope: Rope, head_dim: int, max_positions: int
) -> tuple[npt.NDArray[np.float32], float]:
    """What a position is multiplied by to give each pair's angle, and the factor on cos and sin.

    Args:
        rope: base, kind and the kind's numbers.
        head_dim: even; pair i is the dimensions i and i + head_dim/2.
        max_positions: the model's context, which stands in for an absent original one.

    Returns:
        float32 ``[head_dim / 2]`` in radians per position, and the attention factor.

    Example:
        >>> frequencies, factor = inverse_frequencies(Rope(theta=100.0), head_dim=4, max_positions=16)
        >>> frequencies.tolist(), factor
        ([1.0, 0.10000000149011612], 1.0)
    """
    # torch, because NumPy's float32 power differs from it in the last bit
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    inverse = 1.0 / wavelengths
    numbers = dict(rope.parameters)
    factor = 1.0
    if rope.kind == "linear":
        inverse = inverse / numbers["factor"]
    elif rope.kind == "llama3":
        inverse = _llama3(inverse, numbers, max_positions)
    elif rope.kind == "yarn":
        inverse, factor = _yarn(wavelengths, rope.theta, numbers, head_dim, max_positions)
    frequencies: npt.NDArray[np.float32] = inverse.numpy()
    return frequencies, factor


def _llama3(inverse: torch.Tensor, numbers: dict[str, float], max_positions: int) -> torch.Tensor:
    """Long waves are stretched by ``factor``, short ones kept, those between are blended."""
    factor, low, high = numbers["factor"], numbers["low_freq_factor"], numbers["high_freq_factor"]
    original = numbers.get("original_max_position_embeddings", max_positions)
    lengths = 2 * math.pi / inverse
    blend = (original / lengths - low) / (high - low)
    blended = (1 - blend) * inverse / factor + blend * inverse
    stretched = torch.where(lengths > original / low, inverse / factor, blended)
    return torch.where(lengths < original / high, inverse, stretched)


def _yarn(
    wavelengths: torch.Tensor, theta: float, numbers: dict[str, float], head_dim: int, max_positions: int
) -> tuple[torch.Tensor, float]:
    """Pairs that turn often over the original context are kept, rare ones stretched, between is a ramp."""
    original = numbers.get("original_max_position_embeddings", max_positions)
    factor = numbers.get("factor", max_positions / original)
    # 0 means "not set" for these, as in transformers
    fast, slow = numbers.get("beta_fast") or 32.0, numbers.get("beta_slow") or 1.0

    def pair_turning(times: float) -> float:
        return (head_dim * math.log(original / (times * 2 * math.pi))) / (2 * math.log(theta))

    first, last = pair_turning(fast), pair_turning(slow)
    if numbers.get("truncate", 1.0):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width, 0, 1)
    kept = 1 - ramp
    inverse = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return inverse, _yarn_attention_factor(factor, numbers)


def _yarn_attention_factor(factor: float, numbers: dict[str, float]) -> float:
    if "attention_factor" in numbers:
        return numbers["attention_factor"]

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, all_dim = numbers.get("mscale"), numbers.get("mscale_all_dim")
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)
