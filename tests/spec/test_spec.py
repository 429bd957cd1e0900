"""The specifications: what each refuses and by which name, short forms, costs between measurements."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpq.spec import (
    NATIVE,
    W16,
    CostRow,
    CostTable,
    Device,
    InvalidField,
    Link,
    ModelSpec,
    NotMeasuredError,
    Op,
    Placement,
    Plan,
    Precision,
    Profile,
    Sensitivity,
    Solution,
    Stage,
    UsageError,
    Workload,
    parse_bytes,
    parse_devices,
)
from llmpq.spec.precision import ZeroKind


def two_stage_plan() -> dict[str, Any]:
    w4 = Precision(4, 64)
    return Plan(
        "model",
        "hash",
        parse_devices("cpu:name=a;cpu:name=b"),
        Workload(8, 32, 32),
        (Stage("a", (0, 2), (w4, w4)), Stage("b", (2, 3), (W16,))),
        Placement(0, w4),
        Placement(1, W16),
        "float32",
        8,
        64,
        2,
        4,
    ).to_dict()


def put(value: Any, path: str, new: Any) -> Any:
    """A copy of JSON `value` with `new` at a path such as stages.1.bits."""
    value = copy.deepcopy(value)
    *outer, last = (int(part) if part.isdigit() else part for part in path.split("."))
    inner = value
    for part in outer:
        inner = inner[part]
    inner[last] = new
    return value


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        ("schema", "llmpq.plan/9", r"schema: is 'llmpq.plan/9'; this version of llmpq reads 'llmpq.plan/2'"),
        ("stages", [], r"stages: is empty"),
        ("stages.1.layers", [1, 2], r"stages\[1\].layers: begins at 1, expected 2"),
        ("stages.1.layers", [3, 4], r"stages\[1\].layers: begins at 3, expected 2"),
        ("stages.0.layers", [2, 1], r"stages\[0\].layers: is \[2, 1\]"),
        ("stages.0.layers", [0, 1, 2], r"stages\[0\].layers: has 3 entries, expected 2"),
        ("stages.0.layers", [0, "2"], r"stages\[0\].layers\[1\]: is '2', expected int"),
        ("stages.0.activations", "a4", r"stages\[0\].activations: is 'a4', expected one of 'a16'"),
        ("stages.0.precisions.1", "w5-g64-sym-rtn", r"stages\[0\].precisions\[1\].*bits: is 5, expected one of"),
        ("stages.0.precisions.1", "int4", r"stages\[0\].precisions\[1\]: is 'int4', expected a precision such as"),
        ("stages.0.precisions", ["w16"], r"stages\[0\].precisions: has 1 entries for 2 layers"),
        ("stages.0.compute_dtype", "int8", r"stages\[0\].compute_dtype: is 'int8', expected one of 'float32'"),
        ("stages.1.device", "a", r"stages\[1\].device: names 'a' a second time"),
        ("stages.1.device", "c", r"stages\[1\].device: names 'c', which the cluster lacks"),
        ("stages.1.device", ["a", "b"], r"stages\[1\].device: is \['a', 'b'\], expected str"),
        ("embedding.stage", 1, r"embedding.stage: is 1, expected the first stage, 0"),
        ("head.stage", 0, r"head.stage: is 0, expected the last stage, 1"),
        ("slots", 0, r"slots: is 0, expected 1 to 10000000"),
        ("decode_microbatch", -1, r"decode_microbatch: is -1"),
        ("wire_dtype", "fp16", r"wire_dtype: is 'fp16'"),
        ("workload.output_len", 0, r"workload.output_len: is 0, expected 1 to"),
        ("workload.max_prompt_len", 31, r"workload.max_prompt_len: is 31, less than prompt_len = 32"),
        ("cluster.devices.1.name", "a", r"cluster.devices\[1\].name: is 'a', which an earlier one has"),
        ("cluster.devices.0.threads", 0, r"cluster.devices\[0\].threads: is 0"),
        ("cluster.devices.0.kind", "tpu", r"cluster.devices\[0\].kind: is 'tpu', expected one of 'cpu', 'cuda'"),
        ("cluster.devices.0.memory_bytes", 1.5, r"cluster.devices\[0\].memory_bytes: is 1.5, expected int"),
        ("cluster.devices", [], r"cluster.devices: is empty"),
    ],
)
def test_a_bad_plan_is_refused_by_the_field(path: str, new: Any, message: str) -> None:
    good = two_stage_plan()
    Plan.from_dict(good)
    with pytest.raises(InvalidField, match="^" + message):
        Plan.from_dict(put(good, path, new))


def test_a_plan_has_gpus_multiply_in_a16_alone() -> None:
    plan = put(two_stage_plan(), "stages.0.activations", "a8")
    assert Plan.from_dict(plan).to_dict() == plan
    with pytest.raises(InvalidField, match="is 'a8', but a cuda device multiplies in a16 alone"):
        Plan.from_dict(put(plan, "cluster.devices.0.kind", "cuda"))


def tiny_model(**changes: Any) -> ModelSpec:
    values = {
        "name": "tiny",
        "content_hash": "hash",
        "num_layers": 3,
        "hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 100,
        "max_positions": 128,
        "dtype": "bfloat16",
        "tied_embeddings": False,
        "embedding_dim": 64,
        "norm_eps": 1e-5,
        "norm": "rms",
        "activation": "silu",
        "gated_mlp": True,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_first": True,
        "final_norm": True,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "position_offset": 0,
        "eos_token_ids": (2,),
        "bos_token_id": None,
    }
    return ModelSpec(**{**values, **changes})


def test_a_plan_is_refused_for_another_model() -> None:
    plan = Plan.from_dict(two_stage_plan())
    plan.check_model(tiny_model())
    for other in (tiny_model(content_hash="another"), tiny_model(num_layers=4)):
        with pytest.raises(UsageError, match="the plan was made for another model"):
            plan.check_model(other)


def test_a_plan_runs_on_a_model_that_was_quantized_for_it() -> None:
    """two_stage_plan() has 4, 4, 4, 16 and 16 bits."""
    plan, w4, q4 = Plan.from_dict(two_stage_plan()), Precision(4, 64), Precision(4, 32, "sym", "gguf")
    source = tiny_model()

    def quantized(*stored: Precision) -> ModelSpec:
        of_units = {unit: dict.fromkeys(source.linears(unit), p) for unit, p in zip(source.units, stored) if p != W16}
        return tiny_model(content_hash="another", source_hash=source.content_hash, stored=of_units)

    plan.check_model(quantized(w4, w4, w4, W16, W16))
    plan.with_precisions([NATIVE, w4, w4, W16, W16]).check_model(quantized(q4, w4, w4, W16, W16))
    for asked, stored in (
        (plan, [w4, w4, w4, w4, W16]),
        (plan, [w4, w4, W16, W16, W16]),
        (plan, [w4, w4, Precision(3, 64), W16, W16]),
        (plan.with_precisions([w4, NATIVE, w4, W16, W16]), [w4, w4, w4, W16, W16]),
        (plan.with_precisions([w4, NATIVE, w4, W16, W16]), [w4, W16, w4, W16, W16]),
    ):
        with pytest.raises(UsageError, match="was quantized to another precision"):
            asked.check_model(quantized(*stored))
    with pytest.raises(UsageError, match="made for another model"):
        replace(plan, model_hash="").check_model(source)


def test_a_plan_knows_the_precision_of_each_unit() -> None:
    plan = Plan.from_dict(two_stage_plan())
    units = tiny_model().units
    assert units == ("embedding", "layer.0", "layer.1", "layer.2", "head")
    assert [plan.precision(unit).bits for unit in units] == [4, 4, 4, 16, 16]


def test_a_single_device_plan_is_valid_for_its_model() -> None:
    model, device = tiny_model(), parse_devices("cpu").devices[0]
    plan = Plan.single(model, device, Precision(8, 32), slots=2, max_length=40)
    plan.check_model(model)
    assert {plan.precision(unit) for unit in model.units} == {Precision(8, 32)}
    assert Plan.from_dict(plan.to_dict()) == plan


def test_a_resized_plan_has_the_same_weights_and_steps_of_one_sequence_s_length() -> None:
    plan = Plan.from_dict(two_stage_plan())
    for slots, max_length in ((1, 1), (1, 512), (6, 33)):
        resized = plan.resized(slots, max_length)
        assert (resized.slots, resized.max_length) == (slots, max_length)
        assert resized.step_tokens == max(slots, max_length) and resized.decode_microbatch * 2 >= slots
        assert (resized.stages, resized.embedding, resized.head) == (plan.stages, plan.embedding, plan.head)
        assert all(device.memory_bytes is None for device in resized.cluster.devices)


# ---- model, precision, cluster, cost, sensitivity ----


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
    model = tiny_model(attention_bias=True)
    shapes = {name: (linear.n, linear.k, linear.bias) for name, linear in model.layer_linears.items()}
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


@given(st.lists(st.integers(1, 20), max_size=12), st.integers(1, 5), st.integers(20, 60))
def test_prefill_microbatches_keep_order_and_limits(lengths: list[int], microbatch: int, capacity: int) -> None:
    fields = two_stage_plan()
    fields.update(prefill_microbatch=microbatch, decode_microbatch=1, max_length=capacity)
    fields["workload"].update(prompt_len=1, max_prompt_len=0)
    packed = Plan.from_dict(fields).prefill_microbatches(lengths)
    assert [s for sequences in packed for s in sequences] == list(range(len(lengths)))
    for sequences in packed:
        assert 1 <= len(sequences) <= microbatch
        assert sum(lengths[s] for s in sequences) <= capacity
    for before, after in pairwise(packed):
        full = len(before) == microbatch or sum(lengths[s] for s in (*before, after[0])) > capacity
        assert full, "a sequence went into a new micro-batch though the one before had room"


def test_a_prompt_longer_than_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 65 tokens, more than the 64"):
        Plan.from_dict(two_stage_plan()).prefill_microbatches([3, 65])
