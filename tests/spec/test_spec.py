"""Models, precisions, devices and costs: what each refuses and by which name; costs between measurements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpq.spec import (
    W16,
    CostRow,
    CostTable,
    Device,
    InvalidField,
    Link,
    NotMeasuredError,
    Op,
    Precision,
    Profile,
    Sensitivity,
    Solution,
    UsageError,
    parse_bytes,
    parse_devices,
)
from llmpq.spec.precision import ZeroKind
from tests.support.specs import tiny_model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads: is 3, which does not divide num_heads = 4"),
        ({"hidden_size": 0}, "hidden_size: is 0"),
        ({"vocab_size": -1}, "vocab_size: is -1"),
    ],
)
def test_a_bad_model_is_refused_by_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidField, match=message):
        tiny_model(**change)


def test_linears_are_fused_and_their_bytes_add_up() -> None:
    model = tiny_model(biases=("qkv", "out"))
    shapes = {name: (linear.n, linear.k, linear.bias) for name, linear in model.linears("layer.0").items()}
    assert shapes == {
        "qkv": (128, 64, True),
        "out": (64, 64, True),
        "up": (192, 64, False),
        "down": (64, 96, False),
    }
    weights = 2 * (128 * 64 + 64 * 64 + 192 * 64 + 64 * 96)
    assert model.unit_bytes("layer.0", W16) == weights + 4 * (2 * 64 + 128 + 64)
    assert model.kv_bytes(10, "float16") == 10 * 2 * 32 * 2


@pytest.mark.parametrize("text", ["", "w4", "w4-g64", "w4-g64-sym-rtn-a8", "W16", "w16-g64-sym-rtn", "w4-g-sym-rtn"])
def test_precision_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a precision such as|takes no group size"):
        Precision.parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5,), "bits: is 5"),
        ((4, 48), "group_size: is 48"),
        ((16, 64), "bits: is 16, which takes no group size"),
        ((4, 64, "none"), "zero: is 'none', expected one of"),
        ((16, None, "offset"), "bits: is 16, which takes no group size, zero points"),
    ],
)
def test_precision_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidField, match=message):
        Precision(*arguments)


def test_cpus_alone_multiply_quantized_weights_in_other_modes() -> None:
    cpu, gpu = Device("c", "cpu"), Device("g", "cuda")
    assert (cpu.activations("a8"), gpu.activations("a8")) == ("a8", "a16")
    assert (Precision(4, 64).multiplied("a8"), W16.multiplied("a8")) == ("a8", "a16")


def test_three_bits_take_three_eighths_of_a_byte() -> None:
    assert Precision(3, 128).weight_bytes(2, 256) == 2 * (256 * 3 // 8 + 2 * 2)
    assert Precision(3, 128, "asym").weight_bytes(2, 256) == 2 * (256 * 3 // 8 + 2 * 3)
    assert Precision(3, 128, "offset").weight_bytes(2, 256) == 2 * (256 * 3 // 8 + 2 * 4)
    assert W16.weight_bytes(2, 256) == 1024


@pytest.mark.parametrize("zero", ["sym", "asym", "offset"])
def test_the_kind_of_zero_is_a_word_of_the_identifier(zero: ZeroKind) -> None:
    precision = Precision(4, 32, zero)
    assert str(precision) == f"w4-g32-{zero}-rtn"
    assert Precision.parse(str(precision)) == precision


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("90MiB", 90 * 2**20), ("1.5GiB", 3 * 2**29), ("2 kb", 2000), ("7b", 7), ("3GB", 3 * 10**9)],
)
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "3 apples", "1e3"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


def test_devices_are_parsed() -> None:
    text = "cpu:threads=1,isa=avx2,memory=90MiB; cpu ;cuda:1,memory=4GiB;cuda;cpu:name=far,host=other;"
    assert parse_devices(text).devices == (
        Device("cpu0", "cpu", 0, 1, "avx2", 90 * 2**20),
        Device("cpu1", "cpu"),
        Device("cuda1", "cuda", 1, 1, None, 4 * 2**30),
        Device("cuda0", "cuda"),
        Device("far", "cpu", host="other"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "devices: is empty"),
        ("cpu:isa=avx2 cpu:threads=1,isa=avx512", "'isa' is given twice"),
        ("tpu:0", "'tpu:0' names no known kind of device; write cpu:... or cuda:INDEX"),
        ("cpu:threads", "'threads' is not of the form key=value"),
        ("cpu:threads=", "'threads=' is not of the form key=value"),
        ("cpu:threads=two", "'two' is not a whole number"),
        ("cpu:threads=0", "threads: is 0"),
        ("cpu:cores=2", "'cores' is not an option; there are threads, isa, memory, name, host"),
        ("cpu:isa=sse", "isa: is 'sse', expected one of 'portable'"),
        ("cuda:0,isa=avx2", "isa: is set, but only a cpu"),
        ("cpu:memory=much", "'much' is not a size"),
        ("cuda:0;cuda:0", "name: is 'cuda0', which an earlier one has"),
        ("cpu:slowdown=inf", "slowdown: is inf, expected 1 to 1e\\+06"),
        ("cpu:slowdown=nan", "slowdown: is nan"),
        ("cpu:price=1e999", "price_per_hour: is inf, expected 0 to 1e\\+09"),
    ],
)
def test_invalid_devices_are_refused_by_the_field(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^--devices: .*{message}"):
        parse_devices(text)


@pytest.mark.parametrize(
    ("latency_s", "bytes_per_s", "message"),
    [
        (float("inf"), 1.0, "latency_s: is inf, expected 0 to 1e"),
        (float("nan"), 1.0, "latency_s: is nan"),
        (0.0, float("inf"), "bytes_per_s: is inf, expected 1 to 1e"),
        (0.0, float("nan"), "bytes_per_s: is nan"),
    ],
)
def test_links_without_finite_numbers_are_refused(latency_s: float, bytes_per_s: float, message: str) -> None:
    with pytest.raises(InvalidField, match=message):
        Link("a", "b", latency_s, bytes_per_s)


def table(*points: tuple[int, float, float]) -> CostTable:
    """Attention measured at (m, context, seconds)."""
    rows = tuple(CostRow(Op("attention", m, 8, 8, context), value, "cpu", "float32", 0) for m, context, value in points)
    return CostTable("cpu0", "version", 1, "avx2", 0, rows)


def at(m: int, context: float) -> Op:
    return Op("attention", m, 8, 8, context)


def test_costs_are_bilinear_between_measurements() -> None:
    costs = table((1, 0, 1.0), (1, 10, 2.0), (5, 0, 3.0), (5, 10, 8.0))
    assert costs.seconds(at(1, 0)) == 1.0
    assert costs.seconds(at(5, 10)) == 8.0
    assert costs.seconds(at(1, 5)) == pytest.approx(1.5)
    assert costs.seconds(at(3, 0)) == pytest.approx(2.0)
    assert costs.seconds(at(2, 5)) == pytest.approx(1.5 + (5.5 - 1.5) / 4)


@given(
    st.dictionaries(st.integers(1, 100), st.floats(1e-9, 100), min_size=1, max_size=6),
    st.integers(1, 100),
)
def test_costs_lie_between_their_neighbours_and_never_outside(points: dict[int, float], m: int) -> None:
    costs = table(*((size, 0.0, value) for size, value in points.items()))
    if not min(points) <= m <= max(points):
        with pytest.raises(NotMeasuredError):
            costs.seconds(at(m, 0))
        return
    below, above = max(p for p in points if p <= m), min(p for p in points if p >= m)
    low, high = sorted((points[below], points[above]))
    assert low - 1e-9 <= costs.seconds(at(m, 0)) <= high + 1e-9


@pytest.mark.parametrize(
    "op",
    [at(6, 0), at(0, 0), at(1, 11), Op("attention", 1, 9, 8), Op("linear", 1, 8, 8), Op("attention", 1, 8, 8, 0, W16)],
)
def test_costs_outside_of_what_was_measured_are_refused(op: Op) -> None:
    costs = table((1, 0, 1.0), (1, 10, 2.0), (5, 0, 3.0), (5, 10, 8.0))
    with pytest.raises(NotMeasuredError, match=r"no cost of .* on cpu0: .* was (not )?measured; run `llmpq profile`"):
        costs.seconds(op)


def staircase(m: int, passes_from: int = 64) -> float:
    """Seconds of a kernel that goes through all weights once for 8, 16, 32 or 64 rows, and anew for every 64."""
    if m > passes_from:
        return 5.0 * -(-m // 64)
    return next(seconds for rows, seconds in ((8, 3.0), (16, 3.5), (32, 4.0), (64, 5.0)) if m <= rows)


def test_products_in_tiles_of_rows_cost_as_much_as_full_tiles() -> None:
    measured = [1, 2, 3, 4, 6, 8, 12, *(2**i for i in range(4, 13))]

    def products(row_tile: int) -> CostTable:
        rows = tuple(CostRow(Op("linear", m, 8, 8, precision=W16), staircase(m), "cuda", "f", 0) for m in measured)
        return replace(CostTable("cuda0", "version", 1, None, 0, rows), row_tile=row_tile)

    tiled, plain = products(64), products(1)
    for m in range(1, 4097):
        assert tiled.seconds(Op("linear", m, 8, 8, precision=W16)) == pytest.approx(staircase(m), rel=1e-12), m
    assert plain.seconds(Op("linear", 65, 8, 8, precision=W16)) < 0.52 * staircase(65)
    with pytest.raises(NotMeasuredError):
        tiled.seconds(Op("linear", 4097, 8, 8, precision=W16))
    attention = replace(table((1, 0, 1.0), (8, 0, 8.0)), row_tile=64)
    assert attention.seconds(at(5, 0)) == pytest.approx(5.0)  # no product
    with pytest.raises(InvalidField, match="row_tile: is 48, expected a power of two"):
        products(48)


def test_profile_refuses_devices_and_links_that_were_not_measured() -> None:
    profile = Profile({"a": table((1, 0, 1.0))}, (Link("a", "b", 0.5, 100.0),))
    assert profile.table("a").device == "cpu0"
    assert profile.link("a", "b").seconds(50) == 1.0
    with pytest.raises(NotMeasuredError, match="device b was not measured"):
        profile.table("b")
    with pytest.raises(NotMeasuredError, match="no link from b to a was measured"):
        profile.link("b", "a")


def test_sensitivity_is_zero_at_16_bits_and_refused_where_it_was_not_measured() -> None:
    sensitivity = Sensitivity("m", "h", "variance", "t", {"layer.0": {str(Precision(4, 64)): 0.5}})
    assert sensitivity.of("layer.0", Precision(4, 64)) == 0.5
    assert sensitivity.of("layer.9", W16) == 0.0
    for unit, precision in (("layer.1", Precision(4, 64)), ("layer.0", Precision(4, 32))):
        with pytest.raises(UsageError, match=f"no sensitivity of {unit} at {precision} was measured"):
            sensitivity.of(unit, precision)


def test_a_solution_s_gap_is_relative_and_never_negative() -> None:
    assert Solution("s", 2.0, 1.0, 0.1, 0.0, None).gap == 0.5
    assert Solution("s", 1.0, 1.1, 0.1, 0.0, None).gap == 0.0
