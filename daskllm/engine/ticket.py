"""What a caller holds of a request that is with an engine."""

from __future__ import annotations

from daskllm.engine.sequence import Request, Sample

__all__ = ["EngineClosedError", "Ticket"]


class EngineClosedError(RuntimeError):
    """The engine was closed while rows were waiting for it."""


class Ticket:
    """A request on its way; `samples` is filled when it is done.

    Attributes:
        samples: one per sample of the request, None until that sample is done.
        failure: the exception that stopped the engine's step, where one did.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.samples: list[Sample | None] = [None] * request.params.n
        self.failure: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.failure is not None or all(sample is not None for sample in self.samples)
