"""Windows and rings, soft caps, sinks, ALiBi and partly rotated heads, against float64, and what must hold exactly."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from llmpq.kernels import (
    CacheLayer,
    Program,
    Sequences,
    allocate_cache,
    attention,
    available_backends,
    rotate_and_store,
)
from tests.support.kv_caches import empty_layer, sequences
from tests.support.reference import attention_float64, held

Steps = list[dict[int, int]]  # of each step: slot -> new tokens


@pytest.fixture
def backend(operations: str) -> str:
    """Each backend, but Triton interpreted, which is slow: tests/kernels/test_triton_operations.py has fewer cases."""
    if operations == "triton" and torch.get_default_device().type == "cpu":
        pytest.skip("there is no GPU")
    return operations


@dataclass
class Conversation:
    """Keys, values and queries of whole sequences, which go into a cache step by step."""

    steps: Steps
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    cache_dtype: torch.dtype = torch.float32
    qkv: dict[int, torch.Tensor] = field(init=False)  # slot: [length, heads + 2 * kv_heads, d]

    def __post_init__(self) -> None:
        shape = (self.heads + 2 * self.kv_heads, self.head_dim)
        self.qkv = {slot: torch.randn(n, *shape) for slot, n in self.lengths(self.steps).items()}
        for qkv in self.qkv.values():  # what the cache can hold exactly, or with scales an ulp off
            qkv[:, self.heads :] = held(qkv[:, self.heads :], self.cache_dtype)

    @staticmethod
    def lengths(steps: Steps) -> dict[int, int]:
        return {slot: sum(step.get(slot, 0) for step in steps) for slot in sorted({s for step in steps for s in step})}

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def cache(self, capacity: int | None = None) -> CacheLayer:
        longest = max(len(qkv) for qkv in self.qkv.values())
        shape = (max(self.qkv) + 1, self.kv_heads, longest + 5, self.head_dim)
        return empty_layer(*shape, self.cache_dtype, capacity=capacity)

    def run(self, cache: CacheLayer, steps: Steps | None = None, **options: Any) -> dict[int, torch.Tensor]:
        """Attention of all tokens of each slot [length, heads, d]."""
        done, found = dict.fromkeys(self.qkv, 0), {slot: torch.full_like(x, torch.nan) for slot, x in self.qkv.items()}
        for step in steps or self.steps:
            of = sequences([*step], [*step.values()], [done[slot] + n for slot, n in step.items()])
            qkv = torch.cat([self.qkv[slot][done[slot] : done[slot] + n] for slot, n in step.items()])
            rotate_and_store(qkv, cache, of, None)
            results = attention(qkv[:, : self.heads], cache, of, self.scale, **options).split([*step.values()])
            for (slot, n), result in zip(step.items(), results, strict=True):
                found[slot][done[slot] : done[slot] + n, : self.heads] = result
                done[slot] += n
        return {slot: x[:, : self.heads] for slot, x in found.items()}

    def float64(self, **options: Any) -> dict[int, torch.Tensor]:
        found = {}
        for slot, qkv in self.qkv.items():
            q, keys, values = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)
            cached = (x.transpose(0, 1)[None] for x in (keys, values))
            found[slot] = attention_float64(q, *cached, [0], [len(q)], [len(q)], self.scale, **options)
        return found


def assert_close(found: dict[int, torch.Tensor], exact: dict[int, torch.Tensor], limit: float = 8e-6) -> None:
    for slot, result in found.items():
        assert (result.double() - exact[slot]).abs().max() <= limit, f"slot {slot}"


def assert_equal(found: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> None:
    for slot, result in found.items():
        assert torch.equal(result, expected[slot]), f"slot {slot}"


def of_heads(heads: int, *names: str) -> dict[str, torch.Tensor]:
    """Sinks of about the size of scores; slopes as ALiBi has them, of both signs here."""
    all_of_them = {"sinks": 2 * torch.randn(heads), "slopes": torch.randn(heads) / 8}
    return {name: all_of_them[name] for name in names}


RAGGED: Steps = [{2: 40, 0: 7}, {0: 1, 2: 1}, {1: 21, 0: 1}, {1: 1, 0: 30, 2: 90}, {2: 1, 0: 1, 1: 1}, {1: 120}, {1: 1}]


@pytest.mark.parametrize(
    ("shape", "cache_dtype", "window", "cap", "names"),
    [
        ((6, 2, 16), torch.int8, 17, None, ()),
        ((4, 4, 12), torch.float32, 1, None, ()),
        ((4, 1, 64), torch.float16, None, 3.0, ()),
        ((5, 1, 80), torch.int8, 128, 1.5, ()),
        ((4, 2, 12), torch.float32, None, None, ("slopes",)),
        ((4, 2, 64), torch.float32, 40, None, ("sinks",)),
        ((6, 2, 20), torch.float16, 100, 50.0, ("sinks", "slopes")),
        ((6, 2, 20), torch.int8, 100, 50.0, ("sinks", "slopes")),
    ],
)
def test_attention_with_options_matches_float64(
    backend: str,
    shape: tuple[int, int, int],
    cache_dtype: torch.dtype,
    window: int | None,
    cap: float | None,
    names: tuple[str, ...],
) -> None:
    case = Conversation(RAGGED, *shape, cache_dtype)
    options = {"window": window, "cap": cap} | of_heads(shape[0], *names)
    found = case.run(case.cache(), **options)
    assert_close(found, case.float64(**options))


@pytest.mark.parametrize(("window", "capacity"), [(1, 100), (9, 130), (100, 219), (128, 256)])
def test_a_ring_holds_what_a_window_sees(backend: str, window: int, capacity: int) -> None:
    """Several times around, by prefill and decoding, for two sequences that are not in step."""
    most = min(110, capacity - window + 1)
    steps: Steps = [{0: most}, {0: 1, 1: 3}, {1: 50}, {0: 1, 1: 1}]
    case = Conversation(6 * steps, heads=2, kv_heads=1, head_dim=12)
    ring = case.cache(capacity)
    assert capacity <= ring.capacity and ring.is_ring
    found = case.run(ring, window=window)
    assert_close(found, case.float64(window=window))
    assert_equal(found, case.run(case.cache(), window=window))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
def test_bits_depend_neither_on_the_threads_nor_on_the_steps(
    backend: str, threads: None, cache_dtype: torch.dtype
) -> None:
    if backend == "reference":
        pytest.skip("its matrix products take all queries of a sequence at once")
    case = Conversation([{0: 1} for _ in range(450)], heads=3, kv_heads=1, head_dim=20, cache_dtype=cache_dtype)
    options = {"window": 150, "cap": 2.0} | of_heads(3, "sinks", "slopes")
    expected = case.run(case.cache(), **options)
    wholes: tuple[list[int], ...] = ([450], [300, 150], [7, 100, 120, 1, 90, 132])
    for count, lens in zip((1, 2, 3), wholes, strict=True):
        torch.set_num_threads(count)
        assert_equal(case.run(case.cache(), [{0: n} for n in lens], **options), expected)
    assert_equal(case.run(case.cache(281), [{0: n} for n in wholes[2]], **options), expected)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
def test_nothing_before_a_window_enters_a_sum(backend: str, cache_dtype: torch.dtype) -> None:
    """Not even as zero times NaN."""
    if backend != "cpu":
        pytest.skip("its matrix products take several keys and several queries at once")
    case = Conversation([{0: 100}, {0: 140}], cache_dtype=cache_dtype)
    for window in (3, 60, 100):
        cache, clean = case.cache(), case.run(case.cache(), window=window)
        qkv, of = case.qkv[0], sequences([0], [140], [240])
        rotate_and_store(qkv.clone(), cache, sequences([0], [240], [240]), None)
        unseen = 100 - window + 20  # what the first 20 queries see part of
        rotate_and_store(torch.full_like(qkv[:unseen], torch.nan), cache, sequences([0], [unseen], [unseen]), None)
        found = attention(qkv[100:, : case.heads], cache, of, case.scale, window=window)
        assert torch.equal(found[19:], clean[0][119:])
        assert found[:19].isnan().all()


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.int8], ids=str)
def test_a_program_keeps_all_options(threads: None, cache_dtype: torch.dtype) -> None:
    if reason := available_backends()["cpu"]:
        pytest.skip(reason)
    device, heads = torch.device("cpu"), of_heads(4, "sinks", "slopes")
    angles = torch.randn(400, 4)
    tables = (torch.cat((angles, angles), 1), torch.cat((-angles, angles), 1))
    shape = (2, 1, 400, 12, cache_dtype, device)
    caches = [*allocate_cache("cpu", 2, *shape, 256), *allocate_cache("cpu", 2, *shape)]
    qkv, once, twice = torch.empty(130, 6, 12), *torch.empty(2, 130, 4, 12)

    def compute(of: Sequences, windowed: CacheLayer, full: CacheLayer) -> None:
        new = qkv[: of.tokens]
        rotate_and_store(new, windowed, of, tables)
        attention(new[:, :4], windowed, of, 0.3, window=100, cap=5.0, out=once[: of.tokens])
        rotate_and_store(new, full, of, None)
        attention(once[: of.tokens], full, of, 0.3, **heads, out=twice[: of.tokens])

    first = sequences([0], [1], [1])
    program = Program(lambda: compute(first, *caches[::2]))
    done = [0, 0]
    for count, lens in enumerate(([130, 0], [60, 70], [1, 1], [1, 129], [100, 1])):
        torch.set_num_threads(count % 3 + 1)
        done = [before + n for before, n in zip(done, lens, strict=True)]
        here = [slot for slot in (0, 1) if lens[slot]]
        of = sequences(here, [lens[slot] for slot in here], [done[slot] for slot in here])
        before = torch.randn(of.tokens, 6, 12)
        found = []
        for run in (partial(program.run, of.tokens, sequences=of), partial(compute, of, *caches[1::2])):
            qkv[: of.tokens] = before
            run()
            found.append(twice[: of.tokens].clone())
            twice.fill_(torch.nan)
        assert torch.equal(*found) and found[0].isfinite().all()


def test_a_capacity_of_all_positions_is_no_ring(backend: str) -> None:
    for capacity in (40, 41, 3, None):  # in whole blocks
        layer = empty_layer(1, 1, 40, 4, capacity=capacity)
        assert layer.capacity == 64 and not layer.is_ring


@pytest.mark.parametrize("dims", [2, 8, 32, 34])
def test_the_first_dimensions_are_rotated_and_the_others_stay(backend: str, dims: int) -> None:
    angles = torch.randn(50, dims // 2)
    cos, sin = (torch.cat((x, y), 1) for x, y in ((angles.cos(), angles.cos()), (-angles.sin(), angles.sin())))
    qkv = torch.randn(40, 5, 34)
    before, cache = qkv.clone(), empty_layer(1, 1, 50, 34)
    rotate_and_store(qkv, cache, sequences([0], [40], [45]), (cos, sin))
    pairs = torch.complex(*before[:, :4, :dims].double().chunk(2, -1))
    pairs *= torch.polar(torch.ones(45, dims // 2, dtype=torch.float64), angles[:45].double())[5:, None]
    assert (qkv[:, :4, :dims] - torch.cat((pairs.real, pairs.imag), -1)).abs().max() <= 1e-6
    assert torch.equal(qkv[:, :4, dims:], before[:, :4, dims:]) and torch.equal(qkv[:, 4], before[:, 4])
    expected = attention_float64(
        qkv[-1:, :3], *(qkv[:, i].view(1, 1, 40, 34) for i in (3, 4)), [0], [1], [40], scale=0.2
    )
    found = attention(qkv[-1:, :3], cache, sequences([0], [1], [45]), 0.2, window=40)
    assert (found - expected).abs().max() <= 4e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "keeps 128 of 300 positions: window is missing"),
        ({"window": 0}, "window is 0, expected 1 or more"),
        ({"window": 127}, "3 new tokens of a sequence see 129 positions through a window of 127, but .* keeps 128"),
        ({"window": 9, "cap": 0.0}, "cap is 0.0, expected a positive number"),
        ({"window": 9, "sinks": torch.zeros(4).double()}, r"sinks is torch.float64 \[4\], expected .*float32 \[4\]"),
        ({"window": 9, "slopes": torch.zeros(3)}, r"slopes is torch.float32 \[3\], expected .*float32 \[4\]"),
        ({"window": 9, "slopes": torch.zeros(4, device="meta")}, "slopes is on meta, but q is on cpu"),
    ],
)
def test_attention_refuses_options(backend: str, options: dict[str, Any], message: str) -> None:
    cache = empty_layer(1, 2, 300, 8, capacity=128)
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(3, 4, 8), cache, sequences([0], [3], [290]), 1.0, **options)


def test_a_ring_refuses_more_tokens_than_it_keeps(backend: str) -> None:
    cache = empty_layer(1, 1, 300, 8, capacity=128)
    with pytest.raises(ValueError, match="query_lens says 129, but a slot of the cache keeps 128 positions"):
        rotate_and_store(torch.zeros(129, 3, 8), cache, sequences([0], [129], [129]), None)
    with pytest.raises(ValueError, match="capacity is 0, expected 1 or more"):
        empty_layer(1, 1, 300, 8, capacity=0)
