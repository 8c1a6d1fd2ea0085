from __future__ import annotations

import pytest
import torch

from daskllm.engine.kvcache import BlockPool, KVCache, blocks_for, bytes_per_block


def test_blocks_are_free_again_when_the_last_holder_lets_go() -> None:
    pool = BlockPool(4)
    mine = [pool.take() for _ in range(3)]
    assert (pool.free, pool.used) == (1, 3)
    pool.share(mine[:2])
    pool.release(mine)
    assert pool.used == 2
    pool.release(mine[:2])
    assert pool.free == 4


def test_no_block_is_given_twice() -> None:
    pool = BlockPool(8)
    assert len({pool.take() for _ in range(8)}) == 8
    with pytest.raises(IndexError):
        pool.take()


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (32, 1), (33, 2), (64, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens) == blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_size_is_what_the_tensors_take(dtype: torch.dtype) -> None:
    cache = KVCache(3, layers=2, kv_heads=2, head_dim=20, dtype=dtype)
    held = sum(t.nbytes for t in (*cache.keys, *cache.values))
    assert held == 3 * bytes_per_block(2, 2, 20, dtype.itemsize)


def test_eight_bits_take_half_of_sixteen_and_a_scale() -> None:
    assert bytes_per_block(3, 2, 64, 1) * 128 == bytes_per_block(3, 2, 64, 2) * 68


def test_copy_copies_every_layer() -> None:
    cache = KVCache(2, layers=2, kv_heads=1, head_dim=16, dtype=torch.float32)
    for i, tensor in enumerate((*cache.keys, *cache.values)):
        tensor[0] = i + 1.0
        tensor[1] = 0.0
    cache.copy([(0, 1)])
    assert all(torch.equal(t[0], t[1]) for t in (*cache.keys, *cache.values))
