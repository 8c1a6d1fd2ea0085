"""A short, fixed list of fused operations, one file per device beside a plain-torch `reference`.

===========  =================================================================
operation    what it does
===========  =================================================================
load         whatever a model's steps run, ready to be called
pack         weights, side by side as one, in the layout that `linear` reads best
pack_int8    the same, quantised to int8 with a scale per output channel
linear       product with packed weights, and their biases
likeliest    where each row of such a product is largest
add_norm     residual add, then RMS or layer norm
rope_store   q/k norm, rotary embedding, keys and values into the cache
attention    every query row over its own sequence's blocks
activate     the MLP's activation, gated or not
stack        all of these over consecutive decoder layers, as one
===========  =================================================================
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from daskllm.engine.batch import Batch

__all__ = ["Kernels", "padded_head_dim", "select"]

logger = logging.getLogger(__name__)


def padded_head_dim(head_dim: int) -> int:
    """Width of a value row in the cache: whole panels of the CPU's products.

    >>> padded_head_dim(20)
    32
    """
    return -(-head_dim // 32) * 32


class Kernels(Protocol):
    """The list, as a type; see `daskllm.engine.kernels.reference` for shapes and meaning."""

    PACKS: bool
    INVARIANT: bool

    def load(self, dtype: torch.dtype, quantized: bool, kv_dtype: torch.dtype, config: Any) -> None: ...
    def pack(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor] | None,
        laid: tuple[memoryview, bool] | None = None,
    ) -> Any: ...
    def pack_int8(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None) -> Any: ...
    def linear(self, x: torch.Tensor, weight: Any, dtype: torch.dtype | None = None) -> torch.Tensor: ...
    def likeliest(self, x: torch.Tensor, weight: Any) -> torch.Tensor: ...
    def add_norm(
        self,
        delta: torch.Tensor | None,
        residual: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        kind: str,
    ) -> torch.Tensor: ...
    def rope_store(
        self,
        qkv: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: Batch,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> torch.Tensor: ...
    def attention(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: Batch,
        window: int | None,
        scale: float,
    ) -> torch.Tensor: ...
    def activate(self, x: torch.Tensor, kind: str, gated: bool) -> torch.Tensor: ...
    def stack(
        self, layers: Sequence[Any], keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], config: Any
    ) -> Callable[[torch.Tensor, Batch, tuple[torch.Tensor, torch.Tensor] | None], torch.Tensor]: ...


@functools.cache
def _tell_denied() -> None:
    logger.warning(
        "this CPU has matrix registers (AMX) that the system does not let this process use "
        "(arch_prctl refused, perhaps by a container's seccomp profile): falling back to plain torch, "
        "which is several times slower"
    )


def select(device: str, dtype: torch.dtype) -> Kernels:
    """The kernels for a device ("cpu", "cuda") and a compute dtype."""
    import torch  # not above: a part of what is here is used while it is imported

    if device == "cpu" and dtype in (torch.float32, torch.bfloat16):
        from daskllm.engine.kernels.cpu import operations  # LLVM is not loaded where it is not used

        if not operations.DENIED:
            return operations
        _tell_denied()
    from daskllm.engine.kernels import reference

    return reference
