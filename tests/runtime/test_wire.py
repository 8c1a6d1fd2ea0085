"""A step's way over the wire: what arrives is what was sent, in order, and a lost worker is known."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from distributed.core import Server
from distributed.protocol import deserialize, serialize

from daskllm.engine.batch import Batch, Chunk
from daskllm.engine.stage import Flight
from daskllm.runtime.flights import pack, unpack
from daskllm.runtime.wire import Courier, ask
from daskllm.types import StageLostError


def carried(message: Any) -> dict[str, Any]:
    """What a handler gets: arrays through distributed's own serialisation."""
    return {
        name: deserialize(*serialize(value.data)) if hasattr(value, "data") else value
        for name, value in message.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", None])
def test_a_step_arrives_as_it_left(dtype: str | None) -> None:
    batch = Batch.of([Chunk([7, 8, 9], 31, [4, 2], range(2, 3)), Chunk([1], 0, [3])])
    hidden = None if dtype is None else torch.randn(4, 6).to(getattr(torch, dtype))
    message = carried(pack(Flight(5, batch, ((1, 2), (3, 4)), hidden), "run"))
    assert message.pop("run") == "run"
    flight = unpack(**message, dtype=dtype or "float32", device="cpu")
    assert (flight.number, flight.copies) == (5, ((1, 2), (3, 4)))
    for name in ("tokens", "positions", "slots", "tables", "tiles", "wanted"):
        assert torch.equal(getattr(flight.batch, name), getattr(batch, name))
    if hidden is None:
        assert flight.hidden is None
    else:
        assert torch.equal(flight.hidden, hidden)
        flight.hidden.add_(1)  # the next stage writes to it


def test_an_array_of_another_type_is_refused() -> None:
    batch = Batch.of([Chunk([7], 0, [0])])
    message = carried(pack(Flight(0, batch, (), torch.zeros(1, 4)), "run"))
    del message["run"]
    with pytest.raises(TypeError, match="bfloat16"):
        unpack(**message, dtype="bfloat16", device="cpu")


class Listener(Server):
    """Notes the numbers that it hears; refuses odd ones when told to."""

    def __init__(self) -> None:
        super().__init__({"daskllm_step": self.step})
        self.heard: list[int] = []

    async def step(self, number: int, refused: bool = False) -> None:
        await asyncio.sleep(0.002 * (5 - number % 5))
        self.heard.append(number)
        if refused:
            raise ValueError(f"{number} is odd")


def test_messages_stay_in_order_and_failures_are_told() -> None:
    failed: list[tuple[int, str]] = []

    async def talk() -> list[int]:
        there, here = Listener(), Listener()
        await there.listen("tcp://127.0.0.1:0")
        await here.rpc.start()
        courier = Courier(here, there.address, "step", lambda n, error: failed.append((n, repr(error))))
        for number in range(12):
            courier.send({"number": number, "refused": number == 7})
        while len(there.heard) < 12:
            await asyncio.sleep(0.01)
        courier.close()
        await there.close()
        with pytest.raises(StageLostError, match=there.address):
            await ask(here, there.address, "step", number=99)
        await here.close()
        return there.heard

    assert asyncio.run(asyncio.wait_for(talk(), 60)) == list(range(12))
    assert failed == [(7, "ValueError('7 is odd')")]


def test_received_memory_that_is_read_only_is_copied() -> None:
    batch = Batch.of([Chunk([7], 0, [0])])
    message = carried(pack(Flight(0, batch, (), torch.zeros(1, 4)), "run"))
    del message["run"]
    for name in ("ints", "hidden"):
        message[name] = np.frombuffer(message[name].tobytes(), message[name].dtype).reshape(
            message[name].shape
        )
        assert not message[name].flags.writeable
    flight = unpack(**message, dtype="float32", device="cpu")
    assert flight.hidden is not None
    assert flight.hidden.add_(2).tolist() == [[2.0] * 4]
