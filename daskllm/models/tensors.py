"""Matching the tensors that a description needs with the names that a checkpoint has.

It knows prefixes, missing tensors and left-over ones; which tensors a family has is the family's to say.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from daskllm.models.description import BlockSources
from daskllm.types import ModelError

__all__ = ["find_prefix", "settle"]


def find_prefix(names: Collection[str], prefix: str, anchors: Iterable[str]) -> str:
    """The prefix under which a checkpoint keeps its decoder: the family's own, or none.

    Args:
        names: the checkpoint's tensors.
        prefix: as a model with a head saves it, such as ``"model."``.
        anchors: tensors that every checkpoint of the family has, one of which tells.

    Example:
        >>> find_prefix({"h.0.ln_1.weight", "wte.weight"}, "transformer.", ["wte.weight"])
        ''
    """
    return "" if any(anchor in names for anchor in anchors) else prefix


def settle(
    sources: BlockSources, names: Collection[str], *, roots: tuple[str, ...], ignored: re.Pattern[str]
) -> BlockSources:
    """The sources, once it is sure that they are all there and that nothing of the decoder is left over.

    A tensor left over among the decoder's own (a bias that the config says is not there, a layer too many)
    would have changed the logits. What lies outside, such as a classifier's head, does not.

    Args:
        roots: how the names of the decoder's own tensors start.
        ignored: names that may be left over: buffers that are computed here.

    Raises:
        ModelError: names the tensor.
    """
    needed = {source.name for blocks in sources.values() for source in blocks.values()}
    missing = sorted(needed.difference(names))
    if missing:
        raise ModelError(
            f"the checkpoint has no tensor {missing[0]!r}, which its config.json calls for "
            f"({len(missing)} of {len(needed)} are missing)"
        )
    for name in sorted(set(names) - needed):
        if name.startswith(roots) and not ignored.fullmatch(name):
            raise ModelError(
                f"the checkpoint has a tensor {name!r} that its config.json has no place for; leaving it out "
                "would change the model's answers"
            )
    return sources
