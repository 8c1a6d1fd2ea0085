"""Every fused operation against plain torch, over shapes, types and layouts; and the same bits however its
rows are grouped."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from daskllm.engine.batch import Batch, Chunk
from daskllm.engine.kernels import padded_head_dim, reference
from daskllm.engine.kernels.cpu import operations as cpu
from daskllm.engine.kernels.cpu import team
from daskllm.engine.kernels.cpu.registers import COLUMNS
from daskllm.engine.kernels.int8 import halves
from daskllm.engine.kvcache import KVCache
from daskllm.engine.sizes import BLOCK_SIZE

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SIZES = pytest.mark.parametrize("size", [16, 20, 44, 64, 172, 576])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within float32 rounding, or one unit of bfloat16."""
    loose = found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=2e-2 if loose else 2e-5, rtol=1e-2 if loose else 1e-5)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


@DTYPES
@pytest.mark.parametrize(("into", "out"), [(16, 32), (45, 70), (64, 288), (576, 1536)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype: torch.dtype, into: int, out: int, bias: bool) -> None:
    x, weight = random(70, into, dtype=dtype), random(out, into, dtype=dtype) / into**0.5
    b = random(out, dtype=dtype) if bias else None
    # Two weights side by side, as q, k, v or gate and up are.
    weights, biases = weight.split([10, out - 10]), None if b is None else b.split([10, out - 10])
    packed = cpu.pack(weights, biases)
    found = cpu.linear(x, packed)
    close(found, reference.linear(x, reference.pack([weight], None if b is None else [b])))
    close(reference.linear(x, reference.pack(weights, biases)), found)
    for rows in (1, 2, 3, 4, 7, 33):
        assert torch.equal(cpu.linear(x[:rows], packed), found[:rows])


@DTYPES
@pytest.mark.parametrize("pack", [cpu.pack, cpu.pack_int8])
@pytest.mark.parametrize(("into", "out"), [(1, 16), (16, 32), (45, 70), (64, 97), (48, 3001)])
@pytest.mark.parametrize("bias", [False, True])
def test_likeliest_is_where_the_product_is_largest(
    dtype: torch.dtype, pack: Callable[..., Any], into: int, out: int, bias: bool
) -> None:
    x, weight = random(70, into, dtype=dtype), random(out, into, dtype=dtype)
    weight[out - 5 :] = weight[:5]  # equals, in other panels and lanes: the first of them counts
    x[1], x[2] = 0, float("nan")
    weight[out // 2, 0] = weight[out - 3, 0] = float("inf")  # rows whose first input is 0 have two NaN
    x[4:9, 0] = 0
    x[3] = weight[out - 1] * 3
    b = weight[:, 0].contiguous() if bias else None
    packed = pack(weight.split([10, out - 10]), None if b is None else b.split([10, out - 10]))
    expected = cpu.linear(x, packed, torch.float32).max(-1).indices
    for rows in (70, 1, 2, 5, 33):
        found = cpu.likeliest(x[:rows], packed)
        assert found.dtype == torch.int64
        assert torch.equal(found, expected[:rows])


def test_the_reference_of_likeliest() -> None:
    x, weight = random(7, 16, dtype=torch.float32), random(40, 16, dtype=torch.float32)
    weight[20:] = weight[:20]
    for plain, packed in ((reference.pack, cpu.pack), (reference.pack_int8, cpu.pack_int8)):
        found = reference.likeliest(x, plain([weight], None))
        assert torch.equal(found, cpu.likeliest(x, packed([weight], None)))
        assert (found < 20).all()


@DTYPES
@pytest.mark.parametrize(("into", "out"), [(1, 16), (15, 5), (16, 96), (44, 70), (66, 100), (576, 500)])
@pytest.mark.parametrize("bias", [False, True])
def test_int8_linear_is_the_reference_to_the_bit(dtype: torch.dtype, into: int, out: int, bias: bool) -> None:
    x, weight = random(13, into, dtype=dtype), random(out, into, dtype=dtype) / into**0.5
    x[3], weight[2] = 0, 0
    x[4] *= 1000
    b = random(out, dtype=dtype) if bias else None
    # Rows of a larger table, as a part of a fused weight is.
    weights = torch.cat((weight, weight), 1)[:, :into].split([3, out - 3])
    biases = None if b is None else b.split([3, out - 3])
    packed = cpu.pack_int8(weights, biases)
    found = cpu.linear(x, packed)
    assert torch.equal(found, reference.linear(x, reference.pack_int8(weights, biases)))
    assert found.dtype == dtype
    assert packed.nbytes < max(out + 16, 96) * (into + 4 + 8)
    error = (found.double() - reference.linear(x, reference.pack([weight], None if b is None else [b]))).abs()
    # Half a step of the inputs' and of the weights' grid for each product.
    bound = x.abs().amax(1, keepdim=True) * weight.abs().amax(1) * into * (2 / 254 + 1 / 254**2)
    assert (error <= bound.double() + 2**-7 * found.abs().double() + 1e-5).all()
    for rows in (1, 2, 3, 4, 5, 9):
        assert torch.equal(cpu.linear(x[:rows], packed), found[:rows])
        assert torch.equal(cpu.linear(x[-rows:], packed), found[-rows:])


def test_int8_products_need_no_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits from instructions that any machine has."""
    import numba
    from numba import types

    from daskllm.engine.kernels.cpu import registers
    from daskllm.engine.kernels.cpu.code import vnni

    monkeypatch.setattr(registers, "VNNI", False)
    monkeypatch.setattr(registers, "AMX", False)

    @numba.njit
    def tile(x, w, quads, minus, out):  # type: ignore[no-untyped-def]
        vnni.dot_tile(x, 0, w, 0, quads, minus, 0, out, True, 0)

    x = torch.randint(-127, 128, (registers.INT8_ROWS, 8), dtype=torch.int8)
    w = torch.randint(1, 256, (registers.INT8_COLUMNS, 2, 16, 4), dtype=torch.uint8)
    minus = torch.arange(registers.INT8_ROWS, dtype=torch.int32)
    out = torch.empty(registers.INT8_ROWS, registers.INT8_COLUMNS * 16, dtype=torch.int32)
    tile(x.flatten().numpy(), w.flatten().numpy(), 2, minus.numpy(), out.flatten().numpy())
    expected = x.double() @ w.transpose(1, 2).reshape(-1, 8).double().T - minus[:, None]
    assert torch.equal(out.double(), expected)
    assert "vpdpbusd" not in tile.inspect_asm(tile.signatures[0])
    assert isinstance(tile.signatures[0][2], types.Integer)


@DTYPES
@SIZES
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("added", [False, True])
def test_add_norm(dtype: torch.dtype, size: int, kind: str, added: bool) -> None:
    delta = random(9, size, dtype=dtype) if added else None
    residual = random(9, size, dtype=dtype) + 1
    weight, bias = random(size, dtype=dtype), random(size, dtype=dtype) if kind == "layer" else None
    other = residual.clone()
    found = cpu.add_norm(delta, residual, weight, bias, 1e-5, kind)
    close(found, reference.add_norm(delta, other, weight, bias, 1e-5, kind))
    assert torch.equal(residual, other)


@DTYPES
@SIZES
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [False, True])
def test_activate(dtype: torch.dtype, size: int, kind: str, gated: bool) -> None:
    x = 4 * random(5, size * (1 + gated), dtype=dtype)
    x[0, 0], x[1, 0] = 100.0, -100.0
    close(cpu.activate(x, kind, gated), reference.activate(x, kind, gated))


HEADS = pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(4, 4, 8), (9, 3, 64), (4, 1, 20), (14, 2, 64), (8, 2, 32)]
)


class Cache:
    """Two sequences of 50 and 129 tokens in a cache whose other slots are poisoned."""

    chunks = (Chunk([0] * 50, 0, [3, 9]), Chunk([0] * 129, 0, [1, 4, 0, 7, 2]))

    def __init__(self, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
        self.keys = torch.full((10, kv_heads, size, BLOCK_SIZE), float("nan"), dtype=dtype)
        self.values = torch.full((10, kv_heads, BLOCK_SIZE, padded_head_dim(size)), float("nan"), dtype=dtype)
        self.qkv = random(179, (heads + 2 * kv_heads) * size, dtype=dtype)
        self.batch = Batch.of(self.chunks)
        angles = torch.rand(200, size // 2) * 6
        self.angles = angles.cos(), angles.sin()


def plain(cache: torch.Tensor) -> torch.Tensor:
    """The CPU's keys or values in the order of `reference`: both are panels of products' weights there."""
    blocks, heads, inputs, columns = cache.shape
    each = 4 // cache.itemsize
    panels = cache.view(blocks, heads, columns // COLUMNS, inputs // each, COLUMNS, each)
    return panels.permute(0, 1, 3, 5, 2, 4).reshape(cache.shape)


def plain_int8(cache: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The CPU's keys or values in eight bits as `reference` has them: numbers by fours of inputs, keys 128
    higher; and the scales."""
    numbers, scales = halves(cache, rows)
    blocks, heads, _, columns = numbers.shape
    panels = numbers.reshape(blocks, heads, columns // 32, rows // 4, 32, 4)
    return panels.permute(0, 1, 3, 5, 2, 4).reshape(numbers.shape), scales


class CacheInt8(Cache):
    """The same in eight bits; what is poison there is any number and no scale here."""

    def __init__(self, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
        super().__init__(heads, kv_heads, size, dtype)
        held = KVCache(10, 1, kv_heads, size, torch.int8)
        self.keys, self.values = held.keys[0].random_(), held.values[0].random_()
        for cache, rows in ((self.keys, size), (self.values, BLOCK_SIZE)):
            halves(cache, rows)[1].fill_(float("nan"))


@DTYPES
@HEADS
@pytest.mark.parametrize("normed", [False, True])
def test_rope_store_in_eight_bits(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, normed: bool
) -> None:
    cache = CacheInt8(heads, kv_heads, size, dtype)
    keys, values = cache.keys.clone(), cache.values.clone()
    cache.qkv[7] = 0
    norms = (random(size, dtype=dtype), random(size, dtype=dtype)) if normed else None
    rest = (cache.batch, cache.angles, norms, 1e-6)
    found = cpu.rope_store(cache.qkv, cache.keys, cache.values, *rest)
    close(found, reference.rope_store(cache.qkv, keys, values, *rest))
    for mine, theirs, rows, higher in (
        (cache.keys, keys, size, 128),
        (cache.values, values, BLOCK_SIZE, 0),
    ):
        numbers, scales = plain_int8(mine, rows)
        expected, expected_scales = halves(theirs, rows)
        torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0, equal_nan=True)
        written = ~scales.isnan()
        assert int(written.sum()) == 179 * kv_heads
        apart = (numbers.int() + higher - expected.int()).remainder(256)
        apart = apart.movedim(2 if rows == BLOCK_SIZE and theirs is values else 3, 2)[written]
        # A key that lies next to the middle of two numbers may be rounded to either.
        assert set(apart.unique().tolist()) <= {0, 1, 255}
        assert (apart != 0).float().mean() < 1e-3


@DTYPES
@HEADS
@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_attention_in_eight_bits(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, window: int | None
) -> None:
    cache = CacheInt8(heads, kv_heads, size, dtype)
    keys, values = cache.keys.clone(), cache.values.clone()
    rest = (cache.batch, cache.angles, None, 1e-6)
    q = cpu.rope_store(cache.qkv, cache.keys, cache.values, *rest)
    q[3], q[4] = 0, 100 * q[4]
    found = cpu.attention(q, cache.keys, cache.values, cache.batch, window, size**-0.5)
    reference.rope_store(cache.qkv, keys, values, *rest)
    expected = reference.attention(q, keys, values, cache.batch, window, size**-0.5)
    torch.testing.assert_close(found[4], expected[4], atol=5e-2, rtol=1e-2)  # whose scores are large
    found[4] = expected[4]
    loose = dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=2e-2 if loose else 5e-4, rtol=1e-2 if loose else 1e-4)
    found = cpu.attention(q, cache.keys, cache.values, cache.batch, window, size**-0.5)
    for first, count in ((128, 1), (31, 2), (40, 70)):
        part = Batch.of([Chunk([0] * count, first, cache.chunks[1].blocks)])
        rows = slice(50 + first, 50 + first + count)
        assert torch.equal(
            cpu.attention(q[rows], cache.keys, cache.values, part, window, size**-0.5), found[rows]
        )


@pytest.mark.parametrize("columns_unsigned", [False, True])
@pytest.mark.parametrize("vnni_there", [False, True])
def test_products_of_rows_with_a_block(
    columns_unsigned: bool, vnni_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numba

    from daskllm.engine.kernels.cpu import registers
    from daskllm.engine.kernels.cpu.code import vnni

    if not vnni_there:
        monkeypatch.setattr(registers, "VNNI", False)

    @numba.njit
    def products(rows, x, w, quads, start, out):  # type: ignore[no-untyped-def]
        vnni.dot_rows(rows, x, 2, 14, w, 128, quads, start, 0, out)

    kinds = (torch.int8, torch.uint8) if columns_unsigned else (torch.uint8, torch.int8)
    x, w = (
        torch.randint(0, 256, shape).to(kind)
        for shape, kind in zip(((12, 14), (4, 32, 4)), kinds, strict=True)
    )
    start = torch.arange(12, dtype=torch.int32) - 5
    expected = x[:, 2:].double() @ w[1:].transpose(1, 2).reshape(-1, 32).double() + start[:, None]
    for rows in range(1, 13):
        out = torch.full((12, 32), 77, dtype=torch.int32)
        products(rows, *(one.flatten().numpy() for one in (x, w)), 3, start.numpy(), out.flatten().numpy())
        assert torch.equal(out[:rows].double(), expected[:rows])
        assert (out[rows:] == 77).all()
    assert ("vpdpbusd" in products.inspect_asm(products.signatures[0])) == (vnni_there and registers.VNNI)


@DTYPES
@HEADS
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_store(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, turned: bool, normed: bool
) -> None:
    cache = Cache(heads, kv_heads, size, dtype)
    keys, values = cache.keys.clone(), cache.values.clone()
    angles = cache.angles if turned else None
    norms = (random(size, dtype=dtype), random(size, dtype=dtype)) if normed else None
    found = cpu.rope_store(cache.qkv, cache.keys, cache.values, cache.batch, angles, norms, 1e-6)
    close(found, reference.rope_store(cache.qkv, keys, values, cache.batch, angles, norms, 1e-6))
    assert torch.equal(plain(cache.keys).isnan(), keys.isnan())
    close(plain(cache.keys).nan_to_num(), keys.nan_to_num())
    # Behind the values of a block that has some there are zeros, which attention may multiply by zero.
    begun = ~values[:, :, :1].isnan().expand_as(values)
    assert torch.equal(plain(cache.values).isnan(), ~begun)
    close(plain(cache.values).nan_to_num(), values.nan_to_num())


@DTYPES
def test_values_that_are_to_come_are_zero_however_a_prompt_is_cut(dtype: torch.dtype) -> None:
    for cuts in ((0, 1, 2, 3), (0, 31, 32, 33, 34), (0, 5, 40, 41, 64), (0, 33, 63, 64, 65)):
        cache = Cache(4, 2, 32, dtype)
        for first, last in itertools.pairwise(cuts):
            part = Batch.of([Chunk([0] * (last - first), first, [3, 9, 2])])
            cpu.rope_store(cache.qkv[first:last], cache.keys, cache.values, part, cache.angles, None, 1e-6)
            values = plain(cache.values)[[3, 9, 2]].transpose(1, 2).flatten(0, 1)
            begun = -(-last // BLOCK_SIZE) * BLOCK_SIZE
            assert values[begun:].isnan().all()
            assert (values[last:begun] == 0).all()
            assert (values[:last] != 0).any((1, 2)).all()


@DTYPES
@HEADS
@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_attention(dtype: torch.dtype, heads: int, kv_heads: int, size: int, window: int | None) -> None:
    cache = Cache(heads, kv_heads, size, dtype)
    q = cpu.rope_store(cache.qkv, cache.keys, cache.values, cache.batch, cache.angles, None, 1e-6)
    arguments = (cache.keys, cache.values)
    found = cpu.attention(q, *arguments, cache.batch, window, size**-0.5)
    others = map(plain, arguments)
    close(found, reference.attention(q, *others, cache.batch, window, size**-0.5))
    for first, count in ((128, 1), (31, 2), (40, 70)):
        part = Batch.of([Chunk([0] * count, first, cache.chunks[1].blocks)])
        rows = slice(50 + first, 50 + first + count)
        assert torch.equal(cpu.attention(q[rows], *arguments, part, window, size**-0.5), found[rows])


def test_bfloat16_rounds_to_nearest_even() -> None:
    x = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8, 3.0e38, float("nan"), 0.0] + [0.0] * 10)
    residual = torch.zeros(1, 16, dtype=torch.bfloat16)
    found = cpu.activate(torch.cat((x.bfloat16(), residual[0]))[None], "relu", False)[0, :16]
    assert torch.equal(
        found.nan_to_num(7.0), x.bfloat16().relu().nan_to_num(7.0).where(~x.isnan(), found.nan_to_num(7.0))
    )


@pytest.mark.parametrize("parts", [1, 2, 6])
@pytest.mark.parametrize("tiles", range(2, 12))
def test_tiles_fetch_what_their_thread_takes_next(tiles: int, parts: int) -> None:
    """Parts of the next panel from its beginning, each once; a panel's first tile has its own to read."""
    from daskllm.engine.kernels.cpu.code.team import fetched_by

    size, panel = 60, 3
    places = [fetched_by.py_func(tile, tiles, parts, panel, 2, 6, size, 7) for tile in range(tiles)]
    fetching = min(tiles - 1, parts)
    own, following = [panel * size] * (tiles - fetching), (panel + 2) * size
    assert places == own + [following + part * (size // parts) for part in range(fetching)]
    assert {fetched_by.py_func(tile, tiles, parts, 5, 2, 6, size, 7) for tile in range(tiles)} == {5 * size}


@pytest.mark.parametrize("panel", [0, 2, 5])
def test_a_tile_alone_fetches_what_it_reads_a_little_later(panel: int) -> None:
    from daskllm.engine.kernels.cpu.code.gemm import ahead_of
    from daskllm.engine.kernels.cpu.code.team import fetched_by

    for dtype in (np.uint16, np.float32):
        ahead = ahead_of.py_func(1, np.zeros(1, dtype))
        assert ahead * np.dtype(dtype).itemsize == 4096
        assert fetched_by.py_func(0, 1, 2, panel, 2, 6, 36_864, ahead) == panel * 36_864 + ahead
    assert ahead_of.py_func(12, np.zeros(1, np.float32)) == 0


@pytest.mark.parametrize(("rows", "threads"), [(1, 1), (113, 1), (114, 2), (2000, 2)])
def test_little_work_is_one_threads(rows: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    started: list[int] = []
    start = team.start
    monkeypatch.setattr(team, "start", lambda k, packed, n: (started.append(n), start(k, packed, n)))
    x, weight = random(rows, 576, dtype=torch.float32), torch.ones(576)
    cpu.add_norm(None, x, weight, None, 1e-5, "rms")
    assert started == [threads]
    weight8 = cpu.pack_int8([random(96, 576, dtype=torch.float32)], None)
    found = cpu.linear(x, weight8)
    assert started[1] == threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert torch.equal(cpu.linear(x, weight8), found)
