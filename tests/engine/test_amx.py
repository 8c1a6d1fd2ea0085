"""Products in matrix registers."""

from __future__ import annotations

import logging

import pytest
import torch

from daskllm.engine import kernels
from daskllm.engine.kernels import reference
from daskllm.engine.kernels.cpu import operations as cpu
from daskllm.engine.kernels.cpu import registers
from daskllm.engine.kernels.cpu.gemm import linear, pack

needs_amx = pytest.mark.skipif(not registers.AMX or registers.DENIED, reason="this machine has no AMX")


@needs_amx
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33, 70])
@pytest.mark.parametrize("inputs", [2, 31, 32, 34, 96, 100])
def test_a_product_is_that_of_exact_sums_whatever_is_left_over(rows: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(rows * 1000 + inputs)
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    weights = [torch.randn(size, inputs, generator=generator).bfloat16() for size in (32, 5, 70)]
    biases = [torch.randn(len(w), generator=generator) for w in weights]
    got = linear(x, pack(weights, biases), torch.float32)
    exact = x.double() @ torch.cat(weights).double().T + torch.cat(biases).double()
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(linear(x, pack(weights, biases)), got.bfloat16())


@needs_amx
def test_a_rows_bits_do_not_depend_on_its_company() -> None:
    x = torch.randn(90, 200).bfloat16()
    x[40] = float("nan")
    packed = pack([torch.randn(100, 200).bfloat16()], None)
    together = linear(x, packed)
    for row in (0, 15, 16, 31, 39, 41, 89):
        assert torch.equal(linear(x[row : row + 1], packed)[0], together[row])
    assert together[40].isnan().all()
    assert not together[41:].isnan().any()


@needs_amx
def test_onednns_products_are_right_before_and_after_ours() -> None:
    """It shapes the same registers in its own way."""
    a, b = torch.randn(48, 80).bfloat16(), torch.randn(64, 80).bfloat16()
    packed = pack([b], None)
    exact = a.double() @ b.double().T
    for _ in range(3):
        theirs = torch.nn.functional.linear(a, b)
        torch.testing.assert_close(theirs.double(), exact, rtol=1e-2, atol=1e-1)
        torch.testing.assert_close(linear(a, packed, torch.float32).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", [torch.bfloat16, torch.float32])
def test_products_need_no_matrix_registers(inputs: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles in vectors, of pairs and as float32, of which a CPU uses one or none."""
    if inputs == torch.bfloat16 and not registers.BFLOAT16:
        pytest.skip("this CPU multiplies no bfloat16")
    import numba
    import numpy as np

    from daskllm.engine.kernels.cpu.code import gemm

    monkeypatch.setattr(registers, "AMX", False)

    @numba.njit
    def product(rows, x, w, bias, words, y):  # type: ignore[no-untyped-def]
        gemm.tile(rows, x, 0, 2 * words, w, 0, bias, 0, words, y, 0, registers.COLUMNS, True, 0)

    weight = torch.randn(registers.COLUMNS, 50).bfloat16()
    packed = pack([weight], [torch.randn(registers.COLUMNS)])
    for rows in range(1, registers.VECTOR_ROWS + 1):
        x, y = torch.randn(rows, 50).bfloat16(), torch.empty(rows, registers.COLUMNS)
        pairs = x.view(torch.int16).flatten().numpy().view(np.uint16)
        flat = pairs if inputs == torch.bfloat16 else x.float().flatten().numpy()
        panels = packed.panels.view(torch.int16).flatten().numpy().view(np.uint16)
        product(rows, flat, panels, packed.bias.numpy(), packed.words, y.view(-1).numpy())
        exact = x.double() @ weight.double().T + packed.bias.double()
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    assert "tdpbf16ps" not in product.inspect_asm(product.signatures[0])


def test_a_process_that_may_not_use_the_registers_falls_back_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "DENIED", True)
    kernels._tell_denied.cache_clear()
    with caplog.at_level(logging.WARNING, logger="daskllm"):
        assert kernels.select("cpu", torch.bfloat16) is reference
        assert kernels.select("cpu", torch.float32) is reference
    assert [record.message.count("AMX") for record in caplog.records] == [1]
