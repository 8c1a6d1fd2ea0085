"""Reading a ``config.json`` field by field, so that none that changes logits is passed over.

A family names the fields it honours, those that change no logits, and those it refuses unless they are at a
harmless value. This module knows the fields that every decoder shares, in their old and new spelling
(``torch_dtype``/``dtype``, ``rope_theta`` + ``rope_scaling``/``rope_parameters``), and no family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from daskllm.models.description import Rope
from daskllm.types import ModelError

__all__ = ["COMMON", "Classified", "Fields"]

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_DTYPES = ("float32", "bfloat16", "float16")
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_ROPE_TAKES = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"}
        | {"beta_fast", "beta_slow", "truncate"}
    ),
}
# "finetuned" notes a model's history; the others are read apart from the kind's own numbers.
_ROPE_OTHERS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"})


@dataclass(frozen=True, slots=True)
class Classified:
    """How a family treats each field of its config.

    Attributes:
        honoured: read into the description.
        neutral: changes no logits in inference.
        refused: changes logits in a way that is not built, unless it has one of these values (or is absent).
    """

    honoured: frozenset[str]
    neutral: frozenset[str]
    refused: Mapping[str, tuple[Any, ...]]

    def __or__(self, other: Classified) -> Classified:
        """Both together."""
        refused = {**self.refused, **other.refused}
        return Classified(self.honoured | other.honoured, self.neutral | other.neutral, refused)


COMMON = Classified(
    honoured=frozenset(
        {"model_type", "vocab_size", "bos_token_id", "eos_token_id", "tie_word_embeddings", "dtype"}
        | {"torch_dtype"}
    ),
    neutral=frozenset(
        # what a file was written by, and what callers of transformers want returned
        {"transformers_version", "architectures", "_name_or_path", "auto_map", "output_hidden_states"}
        | {"output_attentions", "return_dict", "use_cache", "attn_implementation", "_attn_implementation"}
        # training: initialisation, dropout and labels
        | {"initializer_range", "id2label", "label2id", "problem_type", "gradient_checkpointing"}
        # padding is never computed here; feed-forward chunks change no value
        | {"pad_token_id", "chunk_size_feed_forward"}
    ),
    refused={
        "quantization_config": (None,),
        "compression_config": (None,),
        "is_encoder_decoder": (None, False),
        "is_causal": (None, True),
        "use_bidirectional_attention": (None, False),
        "attention_chunk_size": (None,),
        "kv_sharing_modes": (None,),
        "per_layer_config": (None, {}),
        "pruned_heads": (None, {}),
        "transformers_weights": (None,),
    },
)


class Fields:
    """A config together with its family's classification; every read is checked.

    Args:
        config: the parsed ``config.json``.
        classified: how the family treats its fields; a refused one raises here.

    Raises:
        ModelError: names the field, its value and what is allowed.

    Example:
        >>> fields = Fields({"model_type": "llama", "hidden_size": 64}, COMMON)
        >>> fields.size("hidden_size")
        64
        >>> fields.size("num_hidden_layers")
        Traceback (most recent call last):
        ...
        daskllm.types.ModelError: config.json has no num_hidden_layers, which a llama model needs
    """

    def __init__(self, config: Mapping[str, Any], classified: Classified) -> None:
        self._config = config
        self.family = str(config["model_type"])
        for name, allowed in classified.refused.items():
            if config.get(name) not in allowed:
                self.refuse(name, f"only {' or '.join(map(repr, allowed))} is supported")

    def refuse(self, name: str, why: str) -> None:
        """Raise about one field."""
        raise ModelError(f"config.json: {name}={self._config.get(name)!r} of a {self.family} model: {why}")

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or the default where it is absent or null."""
        value = self._config.get(name)
        return default if value is None else value

    def has(self, name: str) -> bool:
        """Whether the field is there, null included."""
        return name in self._config

    def need(self, *spellings: str) -> Any:
        """The first spelling of a field that is there and not null."""
        for name in spellings:
            if self._config.get(name) is not None:
                return self._config[name]
        raise ModelError(f"config.json has no {spellings[0]}, which a {self.family} model needs")

    def size(self, *spellings: str) -> int:
        """A needed count of at least 1."""
        return self._positive(spellings[0], self.need(*spellings))

    def size_or(self, name: str, default: int) -> int:
        """A count of at least 1, or the default where it is absent or null."""
        return self._positive(name, self.get(name, default))

    def _positive(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"config.json: {name} must be an integer of at least 1, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number; needed when there is no default."""
        value = self.need(name) if default is None else self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ModelError(f"config.json: {name} must be a number, not {value!r}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """A true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"config.json: {name} must be true or false, not {value!r}")
        return value

    def activation(self, name: str, default: str) -> Activation:
        """The feed-forward's activation under this project's name."""
        value = self.get(name, default)
        if value not in _ACTIVATIONS:
            self.refuse(name, f"only {', '.join(_ACTIVATIONS)} are supported")
        return _ACTIVATIONS[value]

    def dtype(self) -> str:
        """The checkpoint's own dtype; float32 where the config does not say."""
        value = self.get("dtype", self.get("torch_dtype", "float32"))
        name = str(value).removeprefix("torch.")
        if name not in _DTYPES:
            self.refuse("dtype" if self.get("dtype") else "torch_dtype", f"only {', '.join(_DTYPES)}")
        return name

    def bos(self) -> int | None:
        """The token that starts a text."""
        ids = self._token_ids("bos_token_id")
        return ids[0] if ids else None

    def eos(self) -> tuple[int, ...]:
        """The tokens that end a text: one, several or none."""
        return self._token_ids("eos_token_id")

    def _token_ids(self, name: str) -> tuple[int, ...]:
        value = self.get(name, ())
        ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ModelError(f"config.json: {name} must be a token id or a list of them, not {value!r}")
        return ids

    def rope(self) -> Rope:
        """The rotary embedding, from either spelling; what stretches it is kept under its own names.

        The old spelling's ``rope_scaling`` goes before ``rope_parameters`` and a ``rope_theta`` inside them
        before the one beside them, as in transformers.
        """
        where = "rope_scaling" if self.get("rope_scaling") else "rope_parameters"
        given = self.get(where, {})
        if not isinstance(given, Mapping):
            raise ModelError(f"config.json: {where} must be an object, not {given!r}")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in _ROPE_NEEDS:
            self.refuse(where, f"rope type {kind!r} is not supported, only {', '.join(_ROPE_NEEDS)}")
        theta = self.get("rope_theta", 10000.0) if given.get("rope_theta") is None else given["rope_theta"]
        partial = given.get("partial_rotary_factor", self.get("partial_rotary_factor", 1.0))
        if partial not in (None, 1, 1.0):
            raise ModelError(f"config.json: partial_rotary_factor={partial!r} is not supported, only 1")
        known = _ROPE_OTHERS.union(*_ROPE_TAKES.values())
        for name in sorted(set(given) - known):
            self.refuse(where, f"its {name!r} is unknown")
        for name in _ROPE_NEEDS[kind]:
            # yarn alone may leave its factor to the ratio of the two lengths, by an explicit null
            if name not in given or (given[name] is None and kind != "yarn"):
                raise ModelError(f"config.json: {where} of type {kind!r} has no {name}")
        taken = {name: given[name] for name in sorted(_ROPE_TAKES[kind]) if given.get(name) is not None}
        if "original_max_position_embeddings" in _ROPE_TAKES[kind]:
            original = self.get("original_max_position_embeddings")
            if original is not None:
                taken["original_max_position_embeddings"] = original
        for name, value in {"rope_theta": theta, **taken}.items():
            if not isinstance(value, (int, float)):
                raise ModelError(f"config.json: {name} of {where} must be a number, not {value!r}")
        numbers = tuple(sorted((name, float(value)) for name, value in taken.items()))
        return Rope(float(theta), kind, numbers)
