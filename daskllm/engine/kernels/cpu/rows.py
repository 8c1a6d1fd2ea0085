"""What is done to a row by itself: residual add and norm, the MLP's activation."""

from __future__ import annotations

import torch

from daskllm.engine.kernels.cpu.compiled import Kernel
from daskllm.engine.kernels.cpu.team import address, float_bits, run

__all__ = ["ACTIVATIONS", "activate", "activate_kernel", "add_norm", "norm_kernel"]

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
"""Their numbers in compiled code."""

_NORM_F32, _NORM_BF16, _ACTIVATE_F32, _ACTIVATE_BF16 = (
    Kernel("rows", name) for name in ("norm_f32", "norm_bf16", "activate_f32", "activate_bf16")
)


def norm_kernel(dtype: torch.dtype) -> Kernel:
    """What `add_norm` runs."""
    return _NORM_F32 if dtype == torch.float32 else _NORM_BF16


def add_norm(
    delta: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
) -> torch.Tensor:
    """``residual += delta`` in place, then its RMS or layer norm; all ``[rows, hidden]``."""
    out = torch.empty_like(residual)
    run(
        norm_kernel(residual.dtype),
        residual.shape[0],
        address(delta),
        residual.data_ptr(),
        out.data_ptr(),
        weight.data_ptr(),
        address(bias),
        residual.shape[1],
        float_bits(eps),
        int(kind == "layer"),
        numbers=residual.numel(),
    )
    return out


def activate_kernel(dtype: torch.dtype) -> Kernel:
    """What `activate` runs."""
    return _ACTIVATE_F32 if dtype == torch.float32 else _ACTIVATE_BF16


def activate(x: torch.Tensor, kind: str, gated: bool) -> torch.Tensor:
    """act(gate) * up from ``[rows, 2 * size]``, or act(x) from ``[rows, size]``."""
    size = x.shape[1] // 2 if gated else x.shape[1]
    out = torch.empty((x.shape[0], size), dtype=x.dtype)
    kernel = activate_kernel(x.dtype)
    run(kernel, x.shape[0], x.data_ptr(), out.data_ptr(), size, ACTIVATIONS[kind], int(gated))
    return out
