"""Attention and the way into its cache, against float64, and what must hold exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from llmpq.kernels import (
    CacheLayer,
    Sequences,
    attention,
    rotate_and_store,
)
from llmpq.spec.layers import KV_BLOCK
from tests.support.kv_caches import empty_layer, fill, parts, sequences, store
from tests.support.reference import attention_float64, held, int8_codes

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half an ulp of results of size 1
dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=str)


@dataclass(frozen=True)
class Batch:
    """Packed sequences, and their keys and values [slots, kv_heads, length, d], as the cache has them, else NaN."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    cache: CacheLayer
    slots: list[int]
    query_lens: list[int]
    context_lens: list[int]

    @classmethod
    def random(
        cls,
        lens: list[tuple[int, int, int]],
        *,
        heads: int = 6,
        kv_heads: int = 2,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
    ) -> Batch:
        """`lens`: slot, query_len and context_len of each sequence."""
        cache_dtype = cache_dtype or dtype
        slots, query_lens, context_lens = (list(column) for column in zip(*lens, strict=True))
        shape = (max(slots) + 2, kv_heads, max(context_lens) + 3, head_dim)
        keys, values = (torch.randn(shape).to(dtype) for _ in range(2))
        cache = empty_layer(*shape, cache_dtype, dtype)
        for slot, context in zip(slots, context_lens, strict=True):
            fill(cache, slot, *(x[slot, :, :context].transpose(0, 1) for x in (keys, values)))
        q = torch.randn(sum(query_lens), heads, head_dim).to(dtype)
        return cls(q, held(keys, cache_dtype), held(values, cache_dtype), cache, slots, query_lens, context_lens)

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def sequence(self, s: int, first: int, count: int) -> torch.Tensor:
        """The attention of `count` queries of one sequence from its query `first` on, alone."""
        start = sum(self.query_lens[:s]) + first
        context = self.context_lens[s] - self.query_lens[s] + first + count
        of = sequences([self.slots[s]], [count], [context])
        return attention(self.q[start : start + count], self.cache, of, self.scale)

    def run(self) -> torch.Tensor:
        return attention(self.q, self.cache, sequences(self.slots, self.query_lens, self.context_lens), self.scale)

    def float64(self) -> torch.Tensor:
        return attention_float64(
            self.q, self.keys, self.values, self.slots, self.query_lens, self.context_lens, self.scale
        )


BATCHES = {
    "one-token": [(0, 1, 1)],
    "prefill": [(1, 7, 7)],
    "decode": [(3, 1, 40), (0, 1, 17), (1, 1, 1)],
    "continued-prefill": [(2, 5, 33), (0, 16, 20)],
    "mixed": [(4, 1, 70), (1, 19, 19), (0, 3, 65), (2, 1, 2)],
    "beyond-a-chunk": [(1, 21, 140), (0, 1, 129), (2, 1, 300), (3, 2, 256)],
}
batches = pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES.keys())


SHAPES = [(4, 4, 8), (9, 3, 64), (6, 1, 20), (2, 2, 80), (3, 1, 1), (25, 1, 33)]  # heads, kv_heads, head_dim


@batches
@dtypes
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_attention_matches_float64(
    operations: str, lens: list[tuple[int, int, int]], dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    batch = Batch.random(lens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    found = batch.run()
    assert found.shape == batch.q.shape and found.dtype == dtype
    error = (found.double() - batch.float64()).abs().max()
    assert error <= 4 * DTYPES[dtype]


@batches
@pytest.mark.parametrize(
    ("cache_dtype", "heads", "kv_heads", "head_dim"),
    [*((torch.float16, *shape) for shape in SHAPES), *((torch.int8, *shape) for shape in SHAPES[1:4])],
)
def test_attention_to_keys_and_values_of_fewer_bits_matches_float64(
    operations: str,
    lens: list[tuple[int, int, int]],
    cache_dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    """Of 8 bits: against codes times scales."""
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    batch = Batch.random(lens, **shape, cache_dtype=cache_dtype)
    assert (batch.run().double() - batch.float64()).abs().max() <= 4 * DTYPES[torch.float32]


def test_attention_to_a_long_context_matches_float64(operations: str) -> None:
    batch = Batch.random([(0, 2, 1500), (1, 1, 1025)], heads=4, kv_heads=2, head_dim=32)
    assert (batch.run().double() - batch.float64()).abs().max() <= 8e-6


def test_attention_survives_scores_of_any_size(operations: str) -> None:
    batch = Batch.random(BATCHES["mixed"])
    batch.q.mul_(200)  # exp of the scores themselves overflows
    batch.q[0] = -batch.q[0]
    found = batch.run()
    assert found.isfinite().all()
    assert (found.double() - batch.float64()).abs().max() <= 2e-4


@batches
def test_a_sequence_s_attention_has_the_same_bits_alone(operations: str, lens: list[tuple[int, int, int]]) -> None:
    batch = Batch.random(lens)
    whole = batch.run()
    start = 0
    for s, queries in enumerate(batch.query_lens):
        assert torch.equal(batch.sequence(s, 0, queries), whole[start : start + queries])
        start += queries


@batches
def test_a_query_s_attention_has_the_same_bits_in_any_chunk(operations: str, lens: list[tuple[int, int, int]]) -> None:
    if operations == "reference":
        pytest.skip("its matrix products take all queries of a sequence at once")
    if operations == "triton" and not torch.cuda.is_available():
        pytest.skip("in numpy's products, which the interpreter makes, a row's bits depend on where it stands")
    batch = Batch.random(lens)
    whole = batch.run()
    start = 0
    for s, queries in enumerate(batch.query_lens):
        count = min(queries, 2) if operations == "triton" else 1  # a single one goes through another kernel there
        for first in range(queries - count + 1):
            assert torch.equal(batch.sequence(s, first, count), whole[start + first : start + first + count])
        start += queries


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
def test_attention_bits_do_not_depend_on_the_number_of_threads(
    operations: str, threads: None, cache_dtype: torch.dtype
) -> None:
    shape = {"heads": 9, "kv_heads": 3, "head_dim": 64}
    batch = Batch.random([(0, 1, 300), (1, 40, 90), (2, 1, 7)], **shape, cache_dtype=cache_dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(batch.run())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_attention_takes_q_as_a_strided_view(operations: str) -> None:
    batch = Batch.random(BATCHES["mixed"], heads=6, kv_heads=2, head_dim=16)
    t = len(batch.q)
    fused = torch.full((t, 200), float("nan"))
    fused[:, 40 : 40 + 96] = batch.q.view(t, 96)
    view = replace(batch, q=fused[:, 40 : 40 + 96].unflatten(1, (6, 16)))
    assert torch.equal(view.run(), batch.run())


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
def test_no_number_of_a_later_token_enters_an_earlier_one_s_attention(
    operations: str, cache_dtype: torch.dtype
) -> None:
    """Not even as zero times infinity: the last three tokens of a step have such keys and values."""
    if operations != "cpu":
        pytest.skip("its matrix products take several keys and several queries at once")
    batch = Batch.random([(0, 40, 150)], cache_dtype=cache_dtype)
    before = batch.run()
    for value in (float("inf"), float("nan")):
        store(batch.cache, 0, *(torch.full((3, 2, 16), value) for _ in range(2)), start=147)
        after = batch.run()
        assert torch.equal(after[:37], before[:37])
        assert after[37:].isnan().all()


def test_attention_of_no_sequences_is_empty(operations: str) -> None:
    cache, none = empty_layer(1, 2, 4, 8), sequences([], [], [])
    assert attention(torch.empty(0, 4, 8), cache, none, 1.0).shape == (0, 4, 8)
    rotate_and_store(torch.empty(0, 8, 8), cache, none, None)
    assert all(part.isnan().all() for part in parts(cache))


def rotary(max_len: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables as `rotate_and_store` takes them, and of angles that nothing follows from."""
    angles = torch.randn(max_len, head_dim // 2)
    return torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)


LENS = ([3, 0], [5, 40], [30, 57])  # slots, query_lens and context_lens


@pytest.mark.parametrize("head_dim", [2, 20, 64, 80])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.int8], ids=str)
def test_queries_and_keys_are_rotated_and_the_cache_is_written(
    operations: str, head_dim: int, cache_dtype: torch.dtype
) -> None:
    heads, kv_heads, of = 6, 2, sequences(*LENS)
    fused = torch.randn(45, heads + 2 * kv_heads + 1, head_dim)
    qkv, before = fused[:, :-1], fused.clone()
    cos, sin = rotary(60, head_dim)
    cache = empty_layer(4, kv_heads, 60, head_dim, cache_dtype)
    rotate_and_store(qkv, cache, of, (cos, sin))

    positions = torch.tensor([*range(25, 30), *range(17, 57)])
    pairs = torch.complex(*before[:, : heads + kv_heads].double().chunk(2, -1))
    turned = pairs * torch.complex(cos, sin)[positions, None, head_dim // 2 :]
    turned = torch.cat((turned.real, turned.imag), -1)
    assert (fused[:, :heads] - turned[:, :heads]).abs().max() <= 1e-6
    assert torch.equal(fused[:, heads + kv_heads :], before[:, heads + kv_heads :]), "values, and what is not ours"

    found = torch.empty(45, kv_heads, 2, head_dim)
    for token, (slot, position) in enumerate([*((3, p) for p in positions[:5]), *((0, p) for p in positions[5:])]):
        found[token] = torch.stack(read(cache, slot, int(position)), 1)
    if cache_dtype == torch.int8:
        codes, _ = int8_codes(fused[:, heads:-1].view(45, 2, kv_heads, head_dim).transpose(1, 2))
        assert torch.equal(found, codes.float())
        return
    for i, expected in enumerate((turned[:, heads:], before[:, heads + kv_heads : -1].double())):
        limit = 1e-6 + (0 if cache_dtype == torch.float32 else 2.0**-11 * expected.abs())
        assert ((found[:, :, i] - expected).abs() <= limit).all()
    assert int(cache.keys.isfinite().sum()) == 45 * kv_heads * head_dim


def read(cache: CacheLayer, slot: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value [kv_heads, d] at a position, as the layouts are drawn."""
    block, place = slot * cache.slot_blocks + position // KV_BLOCK, position % KV_BLOCK
    if cache.backend != "cpu":
        return cache.keys[:, block, place].float(), cache.values[:, block, place].float()
    key = cache.keys[:, block, place // 16, :, place % 16]
    return key.float(), cache.values[:, block, place, : cache.head_dim].float()


def test_a_cache_of_16_bits_holds_the_nearest_numbers(operations: str) -> None:
    """To the nearest, ties to even; what is too large becomes the largest; infinities and NaN show no other way."""
    halves = torch.arange(2**16).to(torch.int32).sub(2**15).to(torch.int16).view(torch.float16)
    exact = halves[halves.isfinite()].float()
    between = (exact[:-1] + exact[1:]) / 2
    numbers = torch.cat((exact, between, between * (1 + 2.0**-20), torch.tensor([65520.0, -1e9, 3e38, -torch.inf])))
    numbers = torch.cat((numbers, torch.randn(-len(numbers) % 1024)))
    cache = empty_layer(1, 1, len(numbers) // 1024, 1024, torch.float16)
    rows = numbers.view(-1, 1, 1024)
    store(cache, 0, rows, rows)
    expected = numbers.clamp(-65504, 65504).half().float().view(-1, 1024)
    for position in range(len(rows)):
        key, value = read(cache, 0, position)
        assert torch.equal(key[0], expected[position]) and torch.equal(value[0], expected[position])
    store(cache, 0, *(torch.full((1, 1, 1024), torch.nan) for _ in range(2)))
    assert all(part.isnan().all() for part in read(cache, 0, 0))


def test_a_cache_of_8_bits_holds_the_nearest_codes(operations: str) -> None:
    """By their definition: of two equally near ones the even one; NaN and infinities show in the scale.

    A largest number of 127 has the scale 1, so that numbers are in steps; of a scale that is subnormal there is little
    left but its bits.
    """
    rows = torch.randn(70, 2, 40) * torch.logspace(-30, 30, 70)[:, None, None]
    rows[0], rows[1, 0], rows[2, :, :-1] = 0, -rows[1, 0].abs(), 0
    rows[3] = torch.arange(-40, 40).view(2, 40) + 0.5
    rows[3, :, 7] = torch.tensor([127.0, -127.0])
    rows[4], rows[5, :, :] = 3.4e38, 1e-45
    rows[5, 1, 30:] = -190e-45
    cache = empty_layer(1, 2, 80, 40, torch.int8)
    store(cache, 0, rows, rows.flip(1))
    codes, scales = int8_codes(rows)
    for position in range(len(rows)):
        for found, of_head, heads in zip(read(cache, 0, position), read_scales(cache, 0, position), ([0, 1], [1, 0])):
            assert torch.equal(of_head, scales[position, heads]), position
            if position != 5:
                assert torch.equal(found, codes[position, heads].float()), position
            assert found.abs().max() <= 127
    for poison in (torch.nan, torch.inf, -torch.inf):
        rows[:3, 1, 39] = poison
        store(cache, 0, rows[:3], rows[:3])
        for of_heads in read_scales(cache, 0, 2):
            assert of_heads[0] == scales[2, 0] and of_heads[1].isnan()


def read_scales(cache: CacheLayer, slot: int, position: int) -> list[torch.Tensor]:
    """Of key and value, [kv_heads] each."""
    block, place = slot * cache.slot_blocks + position // KV_BLOCK, position % KV_BLOCK
    return [scales[:, block, place] for scales in parts(cache)[2:]]


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.int8], ids=str)
def test_what_is_stored_depends_neither_on_the_threads_nor_on_the_steps(
    operations: str, threads: None, cache_dtype: torch.dtype
) -> None:
    whole = 150 if operations == "cpu" else 40
    qkv, tables = torch.randn(whole, 13, 80), rotary(whole, 80)
    caches = []
    for count, portions in ((1, [whole]), (3, [whole]), (2, [1, 17, whole - 18])):
        torch.set_num_threads(count)
        cache, start = empty_layer(1, 3, whole, 80, cache_dtype), 0
        for tokens in portions:
            of = sequences([0], [tokens], [start + tokens])
            rotate_and_store(qkv[start : start + tokens].clone(), cache, of, tables)
            start += tokens
        caches.append(cache)
    for cache in caches[1:]:
        for part, first in zip(parts(cache), parts(caches[0]), strict=True):
            assert torch.equal(part.nan_to_num(), first.nan_to_num())


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.int8], ids=str)
def test_blocks_may_lie_anywhere_and_be_shared(operations: str, cache_dtype: torch.dtype) -> None:
    """Three sequences, two of which begin with the same block, against their bits in blocks of their own.

    What tables name behind a sequence's blocks is never looked at: NaN here.
    """
    new, lens, tables = [30, 1, 2], [150, 64, 70], [[6, 3, 1], [2, 0, 0], [6, 4, 0]]
    own = empty_layer(3, 2, 150, 20, cache_dtype)
    pool = empty_layer(3, 2, 150, 20, cache_dtype, blocks=7)
    begun, of_slots, of_tables = torch.randn(64, 4, 20), sequences([0, 1, 2], new, lens), None
    for slot, (length, count) in enumerate(zip(lens, new)):
        kept = torch.cat((begun, torch.randn(length, 4, 20))) if slot != 1 else torch.randn(length, 4, 20)
        for start, end in ((0, min(64, length - count)), (min(64, length - count), length - count)):
            if start < end:
                store(own, slot, *kept[start:end].split(2, 1), start=start)
        for index in range(-(-length // KV_BLOCK)):
            for to, source in zip(parts(pool), parts(own), strict=True):
                to[:, tables[slot][index]] = source[:, slot * own.slot_blocks + index]
    of_tables = sequences([0, 7, 2], new, lens, tables)
    qkv, rotations = torch.randn(33, 10, 20), rotary(150, 20)
    twice = qkv.clone()
    rotate_and_store(qkv, own, of_slots, rotations)
    rotate_and_store(twice, pool, of_tables, rotations)
    assert torch.equal(twice, qkv)
    for found, wanted in zip(parts(pool), parts(own), strict=True):
        for slot, length in enumerate(lens):
            for index in range(-(-length // KV_BLOCK)):
                block, expected = found[:, tables[slot][index]], wanted[:, slot * own.slot_blocks + index]
                assert torch.equal(block.nan_to_num(), expected.nan_to_num())
        unwritten = found[:, [0, 5]]
        assert (unwritten.isnan() if found.is_floating_point() else unwritten == 99).all()
    expected = attention(qkv[:, :6], own, of_slots, 0.3)
    assert expected.isfinite().all()
    assert torch.equal(attention(qkv[:, :6], pool, of_tables, 0.3), expected)
    expected = attention(qkv[:, :6], own, of_slots, 0.3, window=67, cap=3.0)
    assert torch.equal(attention(qkv[:, :6], pool, of_tables, 0.3, window=67, cap=3.0), expected)


def test_a_ring_is_in_the_blocks_of_its_slot_whatever_tables_say(operations: str) -> None:
    rings = [empty_layer(2, 1, 300, 20, capacity=128) for _ in range(2)]
    qkv = torch.randn(3, 4, 20)
    for length in (60, 120, 180, 230):
        for ring in rings:
            torch.manual_seed(length)
            store(ring, 1, *torch.randn(60, 2, 20).split(1, 1), start=length - 60)
    found = []
    for ring, tables in zip(rings, (None, [[9, 9, 9, 9]])):
        of, new = sequences([1], [3], [233], tables), qkv.clone()
        rotate_and_store(new, ring, of, None)
        found.append(attention(new[:, :2], ring, of, 0.3, window=100))
    assert torch.equal(*found) and found[0].isfinite().all()
    with pytest.raises(ValueError, match="slots names 2, but the cache has 2"):
        attention(qkv[:, :2], rings[0], sequences([2], [3], [3], [[0]]), 0.3, window=100)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.zeros(2, dtype=torch.int64)}, "slots is torch.int64"),
        ({"query_lens": ints(3)}, r"query_lens is .* expected int32 \[2\]"),
        ({"context_lens": torch.zeros(2, dtype=torch.int32, device="meta")}, "context_lens is .* on meta"),
        ({"slots": ints(0, -1)}, "slots names -1"),
        ({"query_lens": ints(2, 0)}, "say 0 and 1, expected 0 < query_len <= context_len"),
        ({"context_lens": ints(1, 1)}, "say 2 and 1, expected"),
        ({"tables": ints(0, 1)}, r"tables is torch.int32 \[2\] on cpu, expected int32 \[2, blocks\]"),
        ({"tables": ints(0, 1).view(2, 1), "context_lens": ints(2, 65)}, "tables have 1 blocks, but 65 tokens need 2"),
        ({"tables": ints(0, -1).view(2, 1)}, "tables name block -1"),
    ],
)
def test_sequences_refuse(change: dict[str, torch.Tensor], message: str) -> None:
    good = {"slots": ints(0, 1), "query_lens": ints(2, 1), "context_lens": ints(2, 1)}
    with pytest.raises(ValueError, match=message):
        Sequences(**{**good, **change})


@pytest.mark.parametrize(
    ("q", "of", "message"),
    [
        (torch.zeros(3, 32), LENS, r"is .* expected floating-point \[t, heads, d\]"),
        (torch.zeros(3, 4, 8, dtype=torch.int32), LENS, "is torch.int32"),
        (torch.zeros(3, 4, 9), LENS, "expected floating-point .* with d = 8"),
        (torch.zeros(3, 4, 8, device="meta"), LENS, "is on meta, but the cache is on cpu"),
        (torch.zeros(4, 4, 8), ([0, 1], [2, 1], [2, 1]), "has 4 tokens, but query_lens say 3"),
        (torch.zeros(3, 4, 8), ([0, 2], [2, 1], [2, 1]), "slots names 2, but the cache has 2"),
        (torch.zeros(3, 4, 8), ([0, 1], [2, 1], [2, 7]), "context_lens says 7, but a slot of the cache has 6"),
        (torch.zeros(3, 4, 8), ([0, 5], [2, 1], [2, 1], [[1], [2]]), "tables name block 2, but the cache has 2"),
    ],
)
def test_attention_and_storing_refuse(q: torch.Tensor, of: tuple[Any, ...], message: str) -> None:
    cache = empty_layer(2, 2, 6, 8)
    with pytest.raises(ValueError, match=message):
        attention(q, cache, sequences(*of), 1.0)
    with pytest.raises(ValueError, match=message):
        rotate_and_store(q, cache, sequences(*of), None)


def test_attention_refuses_heads_that_kv_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match="q has 5 heads, which 2 kv_heads do not divide"):
        attention(torch.zeros(1, 5, 8), empty_layer(1, 2, 6, 8), sequences([0], [1], [1]), 1.0)


@pytest.mark.parametrize(
    ("qkv", "tables", "message"),
    [
        (torch.zeros(1, 3, 8), None, "qkv has 3 heads, expected those of 2 keys and values at least"),
        (torch.zeros(1, 6, 16)[..., ::2], None, "qkv has gaps within a token"),
        (torch.zeros(1, 6, 8), (torch.zeros(4, 8), torch.zeros(3, 8)), r"\[3, 8\], expected \[>= 4, 8\]"),
        (torch.zeros(1, 6, 8), (torch.zeros(4, 4), torch.zeros(4, 8)), r"\[4, 8\], expected \[>= 4, 4\]"),
        (torch.zeros(1, 6, 8), (torch.zeros(4, 9), torch.zeros(4, 9)), "9 dimensions of heads of 8, expected an even"),
        (torch.zeros(1, 6, 8), (torch.zeros(4, 10), torch.zeros(4, 10)), "10 dimensions of heads of 8, expected"),
        (torch.zeros(1, 6, 8), (torch.zeros(4, 8), torch.zeros(4, 8).double()), "is torch.float64 on cpu, expected"),
    ],
)
def test_storing_refuses(qkv: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotate_and_store(qkv, empty_layer(1, 2, 6, 8), sequences([0], [1], [4]), tables)
