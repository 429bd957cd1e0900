"""Triton's operations besides products: what a captured step relies on, and in how many launches a layer is decoded."""

from __future__ import annotations

import pytest
import torch

from llmpq.kernels import (
    CacheLayer,
    DeviceSequences,
    PreparedWeight,
    Sequences,
    add_positions_,
    argmax,
    attention,
    cache_backend,
    last_rows,
    layer_norm,
    prepare,
    rms_norm,
    rotate_and_store,
    route,
)
from llmpq.kernels.backends import reference, triton_attention
from llmpq.models.arena import Arena
from llmpq.models.decoder import DecoderLayer, ForwardContext
from llmpq.models.kv_cache import KVCache
from llmpq.models.linear import ExpertLinear, QuantLinear
from llmpq.models.rotary import rotary_tables
from llmpq.quant import QuantTensor
from llmpq.spec import W16, Experts, LayerKind, LinearShape, ModelSpec, Precision, Rope
from llmpq.spec.layers import KV_BLOCK
from tests.support.kv_caches import empty_layer, fill, of_slot, parts, sequences
from tests.support.launches import counted
from tests.support.reference import (
    attention_float64,
    held,
    int8_codes,
    layer_norm_float64,
    random_weight,
    relative_error,
    rms_norm_float64,
)
from tests.support.specs import tiny_model

pytestmark = pytest.mark.usefixtures("triton_device")

HALF = torch.bfloat16


def filled(
    lens: list[int],
    kv_heads: int,
    max_len: int,
    head_dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
) -> tuple[CacheLayer, torch.Tensor, torch.Tensor]:
    """A cache of sequences of such lengths, NaN else, and all that it has [slots, kv_heads, max_len, head_dim]."""
    kept = cache_dtype or dtype
    keys, values = (torch.randn(len(lens), kv_heads, max_len, head_dim).to(dtype) for _ in range(2))
    cache = empty_layer(len(lens), kv_heads, max_len, head_dim, kept, dtype)
    for slot, length in enumerate(lens):
        fill(cache, slot, *(part[slot, :, :length].transpose(0, 1) for part in (keys, values)))
    return cache, held(keys, kept), held(values, kept)


def decoding(lens: list[int]) -> Sequences:
    """One new token of each."""
    return sequences([*range(len(lens))], [1] * len(lens), lens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF], ids=str)
def test_the_backend_of_what_is_no_product_is_triton_where_it_runs(
    triton_device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_backend(triton_device, dtype) == "triton"
    monkeypatch.setenv("LLMPQ_BACKEND", "reference")
    assert cache_backend(triton_device, dtype) == "reference"


SHAPES = {"SmolLM2": (9, 3, 64), "Llama": (32, 8, 128), "OPT": (12, 12, 64), "multi-query": (20, 1, 256)}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "cache_dtype"),
    [*((*shape, HALF) for shape in SHAPES.values()), (*SHAPES["Llama"], torch.int8)],
    ids=[*SHAPES, "Llama-8-bits"],
)
@pytest.mark.parametrize("new", [1, 3])
def test_attention_of_the_shapes_of_models_matches_float64(
    heads: int, kv_heads: int, head_dim: int, cache_dtype: torch.dtype, new: int
) -> None:
    lens = [3, 190, 128]
    cache, keys, values = filled(lens, kv_heads, 200, head_dim, HALF, cache_dtype)
    q, scale = torch.randn(3 * new, heads, head_dim).to(HALF), head_dim**-0.5
    found = attention(q, cache, sequences([0, 1, 2], [new] * 3, lens), scale)
    exact = attention_float64(q, keys, values, [0, 1, 2], [new] * 3, lens, scale)
    assert (found.double() - exact).abs().max() <= 4 * 2.0**-8


OPTIONS = {  # what the cache holds, window, cap, and whether there are sinks and slopes
    "a window with sinks": (torch.int8, 70, None, True, False),  # decoded in one part
    "a window with slopes": (torch.float32, 200, None, False, True),  # in two
    "all": (torch.int8, 199, 3.0, True, True),
    "a cap with sinks": (torch.float32, None, 3.0, True, False),
}


@pytest.mark.parametrize(("cache_dtype", "window", "cap", "sinks", "slopes"), OPTIONS.values(), ids=OPTIONS)
def test_attention_with_options_matches_float64(
    cache_dtype: torch.dtype, window: int | None, cap: float | None, sinks: bool, slopes: bool
) -> None:
    """Of sequences that are decoded and others, with windows that begin in the middle of blocks, in a ring and not."""
    new, lens = [1, 1, 70, 1], [260, 7, 130, 201]
    cache, keys, values = filled(lens, 1, 320, 16, torch.float32, cache_dtype)
    of, q = sequences([0, 1, 2, 3], new, lens), torch.randn(73, 2, 16)
    options = {
        "window": window,
        "cap": cap,
        "sinks": 2 * torch.randn(2) if sinks else None,
        "slopes": torch.randn(2) / 8 if slopes else None,
    }
    found = attention(q, cache, of, 0.25, **options)
    exact = attention_float64(q, keys, values, [0, 1, 2, 3], new, lens, 0.25, **options)
    assert (found.double() - exact).abs().max() <= 8e-6
    if window is not None:
        assert torch.equal(attention(q, ring_of(cache, window + 69, lens), of, 0.25, **options), found)


def ring_of(cache: CacheLayer, capacity: int, lens: list[int]) -> CacheLayer:
    """The latest positions of each slot, NaN else."""
    ring = empty_layer(len(lens), cache.kv_heads, cache.max_len, cache.head_dim, cache.keys.dtype, capacity=capacity)
    for slot, length in enumerate(lens):
        kept = torch.arange(max(0, length - capacity), length)
        for to, source in zip(parts(ring), parts(cache), strict=True):
            turned = kept % ring.capacity
            blocks = slot * ring.slot_blocks + turned // KV_BLOCK
            to[:, blocks, turned % KV_BLOCK] = of_slot(cache, source, slot)[:, kept]
    return ring


@pytest.mark.parametrize("dims", [12, 32, None])
def test_the_scale_of_heads_that_turn_in_part_is_that_of_all_their_dimensions(dims: int | None) -> None:
    of, qkv = sequences([1, 0], [3, 1], [24, 9]), torch.randn(4, 6, 32)
    qkv[::2, :, :6] *= 9
    rotary = None if dims is None else (torch.randn(30, dims), torch.randn(30, dims))
    cache = empty_layer(2, 1, 30, 32, torch.int8)
    rotate_and_store(qkv, cache, of, rotary)
    positions = torch.tensor([21, 22, 23, 8])
    blocks = torch.tensor([1, 1, 1, 0])
    expected = [part for of_both in zip(int8_codes(qkv[:, 4]), int8_codes(qkv[:, 5])) for part in of_both]
    for found, wanted in zip(parts(cache), expected, strict=True):
        assert torch.equal(found[0, blocks, positions], wanted)


@pytest.mark.parametrize("dims", [12, 32, None])
def test_a_ring_keeps_the_latest_positions_of_heads_that_turn_in_part(dims: int | None) -> None:
    """Against the reference, which tests/kernels/test_attention_options.py compares with float64."""
    of, qkv = sequences([1, 0], [3, 1], [24, 9]), torch.randn(4, 6, 32)
    rotary = None if dims is None else (torch.randn(30, dims), torch.randn(30, dims))
    expected, wanted = empty_layer(2, 1, 30, 32, torch.float16, capacity=11), qkv.clone()
    reference.rotate_and_store(wanted, expected, of, rotary)
    cache = empty_layer(2, 1, 30, 32, torch.float16, capacity=11)
    rotate_and_store(qkv, cache, of, rotary)
    assert (qkv - wanted).abs().max() <= 1e-6
    for found, exact in ((cache.keys, expected.keys), (cache.values, expected.values)):
        assert torch.equal(found.isnan(), exact.isnan())
        assert (found - exact).nan_to_num().abs().max() <= 2.0**-8


def test_reading_costs_what_the_window_is_long() -> None:
    """NaN in what tokens do not see, and in whole blocks before: none is read."""
    lens, window = [310, 300], 65
    cache, of, q = filled(lens, 1, 320, 16, torch.float32)[0], sequences([0, 1], [1, 40], lens), torch.randn(41, 1, 16)
    expected = attention(q, cache, of, 0.25, window=window)
    for part in (cache.keys, cache.values):
        for position in range(310 - window):
            part[:, position // KV_BLOCK, position % KV_BLOCK] = torch.nan
        part[:, cache.slot_blocks : cache.slot_blocks + (260 - window + 1) // KV_BLOCK] = torch.nan
    assert torch.equal(attention(q, cache, of, 0.25, window=window), expected)


def test_experts_are_chosen_among_numbers_only_once() -> None:
    logits = torch.tensor([[-torch.inf, 2.0, -torch.inf, -torch.inf, 1.0], [torch.nan] * 5])
    assert route(logits, 4, True)[0].tolist() == [[1, 4, 0, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize("size", [5120, 14336])
def test_norms_of_sizes_that_are_no_powers_of_two_match_float64(size: int) -> None:
    x, weight, bias = torch.randn(3, size) + 3, torch.randn(size), torch.randn(size)
    exact = rms_norm_float64(x, weight, 1e-5)
    assert ((rms_norm(x, weight, 1e-5).double() - exact).abs() <= 1e-6 * exact.abs() + 1e-7).all()
    exact = layer_norm_float64(x, weight, bias, 1e-5)
    assert ((layer_norm(x, weight, bias, 1e-5).double() - exact).abs() <= 1e-6 * exact.abs() + 2e-6).all()


def test_the_likeliest_token_of_a_row_with_nan_is_in_the_vocabulary() -> None:
    x = torch.randn(3, 9000)
    x[0], x[1, 4000:] = torch.nan, torch.nan
    found = argmax(x, torch.empty(3, dtype=torch.int64)).tolist()
    assert found == [0, 4000, int(x[2].argmax())]


@pytest.mark.parametrize("length", [4096, 5000, 6001])
def test_a_context_longer_than_its_splits_were_made_for_is_cut_into_longer_ones(length: int) -> None:
    assert triton_attention.most_splits(6100) == 32 and triton_attention.most_splits(129) == 2
    cache, keys, values = filled([length], 1, 6100, 16, torch.float32)
    q = torch.randn(1, 2, 16)
    exact = attention_float64(q, keys, values, [0], [1], [length], 0.25)
    assert (attention(q, cache, decoding([length]), 0.25).double() - exact).abs().max() <= 8e-6


def test_bits_do_not_depend_on_how_many_programs_share_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = [700, 1, 65, 129]
    cache, *_ = filled(lens, 1, 700, 16, torch.float32)
    q, found = torch.randn(4, 2, 16), []
    for programs in (1, 8, 1000):
        monkeypatch.setattr(triton_attention, "_PROGRAMS", programs)
        with counted() as operations:
            found.append(attention(q, cache, decoding(lens), 0.25))
        if q.device.type == "cpu":
            assert operations.launches[0][1] == {1: 1, 8: 2, 1000: 6}[programs]
    assert all(torch.equal(other, found[0]) for other in found[1:])


def room_for(count: int, real: Sequences, device: torch.device) -> Sequences:
    """Sequences as a captured step has them: so many, of which some are there."""
    room = DeviceSequences.absent(count, device)
    room.copy_(real)
    return sequences([0] * count, [1] * count, [1] * count).placed(room)


@pytest.mark.parametrize(
    ("max_len", "cache_dtype"), [(100, torch.float32), (300, torch.int8)], ids=["one split", "three splits"]
)
@pytest.mark.parametrize("lens", [[], [7], [100, 33]], ids=str)
def test_absent_sequences_leave_the_cache_alone_and_those_beside_them_their_bits(
    triton_device: torch.device, max_len: int, cache_dtype: torch.dtype, lens: list[int]
) -> None:
    real, count, heads, kv_heads, head_dim = decoding(lens), len(lens), 4, 2, 16
    placed = room_for(4, real, triton_device)
    tables = torch.randn(max_len, head_dim), torch.randn(max_len, head_dim)
    qkv = torch.randn(4, heads + 2 * kv_heads, head_dim)
    alone = qkv[:count].clone()
    cache, expected = (filled([99] * 4, kv_heads, max_len, head_dim, torch.float32, cache_dtype)[0] for _ in range(2))
    for to, source in zip(parts(expected), parts(cache), strict=True):
        to.copy_(source)

    rotate_and_store(qkv, cache, placed, tables)
    rotate_and_store(alone, expected, real, tables)
    for found, wanted in zip(parts(cache), parts(expected), strict=True):
        assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.nan_to_num(), wanted.nan_to_num())
    assert torch.equal(qkv[:count], alone)

    found = attention(qkv[:, :heads], cache, placed, 0.25, out=torch.full((4, heads, head_dim), torch.nan))
    assert torch.equal(found[:count], attention(alone[:, :heads], expected, real, 0.25))
    assert (found[count:] == 0).all()

    x, table = torch.randn(4, 48), torch.randn(max_len, 48)
    wanted = torch.cat((add_positions_(x[:count].clone(), table, real), x[count:]))
    assert torch.equal(add_positions_(x, table, placed), wanted)
    assert torch.equal(last_rows(x, placed, torch.empty(4, 48)), x)


def layer_of(spec: ModelSpec, backend: str, device: torch.device) -> DecoderLayer:
    """With weights that depend on the seed alone."""

    class Loader:
        def linear(self, unit: str, name: str, precision: Precision) -> QuantLinear:
            shape = spec.linears("layer.0")[name]
            return QuantLinear(self.weight(shape, precision), torch.randn(shape.n).to(device) if shape.bias else None)

        def experts(self, unit: str, name: str, precision: Precision) -> ExpertLinear:
            shape = spec.linears("layer.0")[name]
            return ExpertLinear([self.weight(shape, precision) for _ in range(shape.experts)])

        def plain(self, unit: str, name: str) -> QuantLinear:
            return QuantLinear(self.weight(spec.plain_linears("layer.0")[name], W16))

        def weight(self, shape: LinearShape, precision: Precision) -> PreparedWeight:
            weight: QuantTensor | torch.Tensor = random_weight(shape.n, shape.k, precision)
            return prepare(weight, device, backend=backend)

        def vector(self, unit: str, part: str) -> torch.Tensor:
            of_heads = part.startswith(("q_norm", "k_norm"))
            return torch.rand(spec.head_dim if of_heads else spec.hidden_size).to(device)

    torch.manual_seed(1)
    with torch.device("cpu"):
        return DecoderLayer(spec, Loader(), 0, Precision(4, 32))


WINDOWED = "with a window, norms after blocks and of heads, and a cap"
SPECS = {
    "llama": {"norm": "rms", "activation": "silu", "gated_mlp": True, "position_offset": None},
    "opt": {
        "norm": "layer",
        "activation": "relu",
        "gated_mlp": False,
        "position_offset": 2,
        "layer_kinds": (LayerKind(),),
    },
    WINDOWED: {
        "block": "sandwich",
        "qk_norm": "head",
        "attention_cap": 30.0,
        "activation": "gelu_tanh",
        "layer_kinds": (LayerKind(window=200, rope=Rope(1e4, 8)),),
    },
}


@pytest.mark.parametrize(
    ("kind", "batch", "most"), [("llama", 1, 12), ("llama", 5, 12), ("opt", 5, 12), (WINDOWED, 5, 14)]
)
def test_a_layer_decodes_in_a_few_launches_whatever_the_lengths(
    triton_device: torch.device, kind: str, batch: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = HALF if triton_device.type == "cuda" else torch.float32
    spec = tiny_model(**SPECS[kind])
    results = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("LLMPQ_BACKEND", backend)
        layer, arena = layer_of(spec, backend, triton_device), Arena(spec, batch, dtype, triton_device)
        shape, capacity = (1, batch, 300, spec.num_kv_heads, spec.head_dim), spec.layer_kind(0).window
        cache = KVCache(*shape, dtype, dtype, triton_device, [capacity], 1)
        rotary = rotary_tables(spec, 300, dtype, triton_device)
        found = []
        for lens in ([1] * batch, [2] * batch, [3 + 60 * i for i in range(batch)]):
            torch.manual_seed(2)
            of, x = decoding(lens), torch.randn(batch, spec.hidden_size).to(dtype)
            arena.begin(batch)
            of.on(triton_device), of.longest_query  # looked up once for all layers
            with counted() as operations, torch.inference_mode():
                y = layer(x, ForwardContext(of, rotary, arena), cache, 0)
            found.append((operations, y.clone()))
        results[backend] = found
    (first, _), *others = results["triton"]
    assert len(first.launches) <= most and not first.torch, [*first.launches, *first.torch]
    for operations, _ in others:
        assert operations.launches == first.launches and operations.torch == first.torch
    for (_, ours), (_, theirs) in zip(results["triton"], results["reference"]):
        # The sums of random weights cancel out, so single numbers may be far off in 16 bits.
        assert relative_error(ours, theirs) < (2e-2 if dtype == HALF else 1e-4)


def test_a_layer_of_experts_computes_what_the_reference_does(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = HALF if triton_device.type == "cuda" else torch.float32
    spec = tiny_model(layer_kinds=(LayerKind(experts=Experts(5, 2, 32, False, shared_size=48)),))
    found = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("LLMPQ_BACKEND", backend)
        layer, arena = layer_of(spec, backend, triton_device), Arena(spec, 3, dtype, triton_device)
        torch.manual_seed(2)
        x, residual = torch.randn(2, 3, 64).to(dtype)
        arena.begin(3)
        with torch.inference_mode():
            found.append(layer.mlp(x, arena, residual, arena.hidden_states(3)))
    assert relative_error(*found) < (2e-2 if dtype == HALF else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("max_len", [100, 3000])
def test_a_captured_step_attends_to_the_sequences_of_each_replay(triton_device: torch.device, max_len: int) -> None:
    heads, kv_heads, head_dim, count = 32, 8, 128, 4
    cache, *_ = filled([max_len] * count, kv_heads, max_len, head_dim, HALF)
    qkv = torch.empty(count, heads + 2 * kv_heads, head_dim, dtype=HALF)
    tables = torch.randn(max_len, head_dim).to(HALF), torch.randn(max_len, head_dim).to(HALF)
    room, out = DeviceSequences.absent(count, triton_device), torch.empty(count, heads, head_dim, dtype=HALF)
    placed = sequences([0] * count, [1] * count, [1] * count).placed(room)

    def step() -> None:
        rotate_and_store(qkv, cache, placed, tables)
        attention(qkv[:, :heads], cache, placed, 0.1, out=out)

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lens in ([1], [5, max_len], [max_len, 64, 65, 1]):
        real = decoding(lens)
        new = torch.randn(qkv.shape).to(HALF)
        qkv.copy_(new)
        room.copy_(real)
        graph.replay()
        found = out.clone()
        alone = new[: len(lens)].clone()
        rotate_and_store(alone, cache, real, tables)
        assert torch.equal(found[: len(lens)], attention(alone[:, :heads], cache, real, 0.1))
        assert (found[len(lens) :] == 0).all()
