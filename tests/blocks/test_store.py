"""The store: what is held under which key, and letting go of it."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

from daskllm.blocks.store import STORE, BlockKey, BlockStore


@pytest.fixture
def store() -> BlockStore:
    store = BlockStore()
    for version in (0, 1):
        for layer in ("embed", "head"):
            store.put(BlockKey("a", version, layer, "w"), np.full(4, version, np.float32))
    store.put(BlockKey("b", 0, "head", "w"), np.zeros(2, np.uint16))
    return store


def test_keys_and_bytes(store: BlockStore) -> None:
    assert len(store.keys()) == 5
    assert store.keys("b") == [BlockKey("b", 0, "head", "w")]
    assert (store.nbytes(), store.nbytes("a"), store.nbytes("b"), store.nbytes("c")) == (68, 64, 4, 0)


def test_a_shared_block_counts_once(store: BlockStore) -> None:
    store.put(BlockKey("b", 0, "embed", "w"), store.get(BlockKey("b", 0, "head", "w")))
    assert store.nbytes("b") == 4


def test_get_names_what_is_not_there(store: BlockStore) -> None:
    assert store.get(BlockKey("a", 1, "head", "w"))[0] == 1
    with pytest.raises(KeyError, match=r"'w' of 'layers.0' \(model 'a', version 0\) is not held"):
        store.get(BlockKey("a", 0, "layers.0", "w"))


def test_drop_by_model_version_and_layer(store: BlockStore) -> None:
    assert store.drop("a", version=0, layer="head") == 1
    assert store.drop("a", version=0) == 1
    assert store.drop("a") == 2
    assert store.drop("a") == 0
    assert store.keys() == [BlockKey("b", 0, "head", "w")]


def test_a_dropped_block_is_freed(store: BlockStore) -> None:
    gone = weakref.ref(store.get(BlockKey("b", 0, "head", "w")))
    store.drop("b")
    gc.collect()
    assert gone() is None


def test_threads_see_all_of_a_layer_or_nothing() -> None:
    store, seen = BlockStore(), set()
    layer = {BlockKey("m", 0, "layers.0", str(i)): np.zeros(1, np.float32) for i in range(50)}
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add(len(store.keys("m")))

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(200):
        store.put_all(layer)
        store.drop("m")
    done.set()
    watcher.join()
    assert seen <= {0, 50}


def test_the_process_has_one() -> None:
    assert isinstance(STORE, BlockStore)
