"""What a decoder is, in numbers: the one description that drives the engine, the planner and the loader.

A family file translates a Hugging Face ``config.json`` into a `DecoderConfig` and its tensor names into
`TensorSource`s; nothing above this room knows a family's name. The description is plain data: it can be
pickled, hashed and compared, and needs no array library.

Block names. The weights of a decoder are grouped in layers named ``embed``, ``layers.0`` …
``layers.{n-1}`` and ``head``. Weight matrices are ``[out_features, in_features]``:

==========  ========================================================================================
layer       blocks (those that a model has)
==========  ========================================================================================
embed       tokens.weight [vocab, hidden], positions.weight [max_positions, hidden]
layers.i    input_norm.weight/.bias, q.weight/.bias, k.weight/.bias, v.weight/.bias, q_norm.weight,
            k_norm.weight [head_dim], o.weight/.bias, post_norm.weight/.bias, gate.weight/.bias (gated
            only), up.weight/.bias, down.weight/.bias
head        norm.weight/.bias, lm_head.weight [vocab, hidden] (from the embedding when tied), lm_head.bias
==========  ========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["BlockSources", "DecoderConfig", "Rope", "TensorSource", "layer_names"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding and how it is stretched.

    Attributes:
        theta: base of the frequencies.
        kind: "default", "linear", "llama3" or "yarn".
        parameters: the kind's own numbers under their Hugging Face names (``factor``,
            ``original_max_position_embeddings``, ``low_freq_factor``, …), sorted by name.
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    parameters: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """One decoder-only transformer.

    Attributes:
        windows: per layer, how many most recent positions (its own included) a position may look at;
            None is all of them.
        attention_scale: factor on q·k.
        gated: act(gate(x)) * up(x) instead of act(up(x)).
        dtype: the checkpoint's own, "float32", "bfloat16" or "float16".
        eos_token_ids, bos_token_id: as config.json has them (generation_config.json goes first).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    gated: bool
    rope: Rope | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    attention_scale: float
    tied: bool
    dtype: str
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where one block comes from in a checkpoint.

    Attributes:
        name: the tensor's name in the file.
        shape: the shape it must have there.
        transpose: stored ``[in, out]`` (GPT-2's Conv1D); the block is ``[out, in]``.
        rows: (start, stop) along the block's first axis, after transposing; None takes all.
    """

    name: str
    shape: tuple[int, ...]
    transpose: bool = False
    rows: tuple[int, int] | None = None

    @property
    def block_shape(self) -> tuple[int, ...]:
        """The block's own shape, transposed and cut."""
        shape = self.shape[::-1] if self.transpose else self.shape
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])


BlockSources: TypeAlias = Mapping[str, Mapping[str, TensorSource]]
"""layer name -> block name -> source."""


def layer_names(config: DecoderConfig) -> tuple[str, ...]:
    """All layers in the order in which a token passes them.

    For a two-layer model: ``("embed", "layers.0", "layers.1", "head")``.
    """
    return ("embed", *(f"layers.{i}" for i in range(config.num_layers)), "head")
