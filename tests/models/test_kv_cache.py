"""The KV cache of a stage whose layers keep different numbers of positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmpq.models.kv_cache import KVCache
from llmpq.models.step import Step
from tests.support.kv_caches import sequences

CPU = torch.device("cpu")


def kv_cache(layers: int, *more: object, dtype: torch.dtype = torch.float16) -> KVCache:
    """Of 2 slots of 1000 tokens, with one head of 4 numbers."""
    return KVCache(layers, 2, 1000, 1, 4, dtype, torch.float32, CPU, *more)  # type: ignore[arg-type]


def test_each_layer_has_its_own_capacity_and_those_alike_lie_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPQ_BACKEND", "reference")
    cache = kv_cache(5, [None, 300, 20, 300, 1000])
    layers = [cache.layer(i) for i in range(5)]
    assert [layer.capacity for layer in layers] == [1024, 320, 64, 320, 1024]
    assert {layer.max_len for layer in layers} == {1000}
    assert cache.nbytes == 2 * 2 * 2 * 4 * (1024 + 320 + 64 + 320 + 1024)
    memory = [layer.keys.untyped_storage().data_ptr() for layer in layers]
    assert memory[1] == memory[3] and len(set(memory)) == 4
    layers[3].keys.fill_(1)
    assert not any(layer.keys.any() for layer in (*layers[:3], layers[4]))


def test_a_cache_of_8_bits_has_a_scale_for_each_token_and_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPQ_BACKEND", "reference")
    cache = kv_cache(3, [None, 300, None], dtype=torch.int8)
    assert cache.nbytes == 2 * 2 * (4 + 4) * (1024 + 320 + 1024)
    scales = [cache.layer(i).key_scales for i in range(3)]
    assert all(of is not None and of.dtype == torch.float32 for of in scales)
    assert cache.layer(1).value_scales.shape == (1, 2 * 5, 64)


def test_a_cache_checks_what_its_layers_leave_room_for() -> None:
    cache = kv_cache(2, [None, 300], 45)
    cache.check(sequences([1, 0], [45, 1], [1000, 7]))
    for lens, message in (
        (([2], [1], [1]), "slots names 2, but the cache has 2"),
        (([0], [1], [1001]), "a slot of the cache has 1000 positions"),
        (([0], [46], [900]), "query_lens says 46, but the cache has room for 45 new tokens of a sequence in a step"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.check(sequences(*lens))
    kv_cache(2).check(sequences([0], [1000], [1000]))
    few = kv_cache(2, [None, 300], 45, 20)
    assert few.layer(0).blocks == 20 and few.layer(1).blocks == 2 * 5
    few.check(sequences([1], [1], [70], [[19, 4]]))
    for of, message in (
        (sequences([1], [1], [70], [[20, 4]]), "tables name block 20, but the cache has 20"),
        (sequences([1], [1], [70]), "slots names 1, but the cache has 1"),
        (sequences([2], [1], [70], [[0, 4]]), "slots names 2, but the cache has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            few.check(of)
    with pytest.raises(ValueError, match="there are 1 capacities, but 2 layers"):
        kv_cache(2, [300])


def test_a_step_has_the_blocks_of_each_sequence_in_a_row() -> None:
    blocks = [range(2, 4), (9,), np.array([7, 0, 5], dtype=np.int32), ()]
    tables = Step.of(range(4), [1] * 4, [0] * 4, [0] * 4, blocks).tables
    assert tables is not None and tables.dtype == torch.int32
    assert tables.tolist() == [[2, 3, 0], [9, 0, 0], [7, 0, 5], [0, 0, 0]]
    none = Step.of([], [], [], [], []).tables
    assert none is not None and none.shape == (0, 0)
