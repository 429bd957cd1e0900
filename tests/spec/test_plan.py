"""Plans: what each refuses and by which name, the models that it runs on, and its micro-batches."""

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
    InvalidField,
    ModelSpec,
    Placement,
    Plan,
    Precision,
    Stage,
    UsageError,
    Workload,
    parse_devices,
)
from tests.support.specs import tiny_model


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
        assert resized.new_tokens == max_length
        assert (resized.stages, resized.embedding, resized.head) == (plan.stages, plan.embedding, plan.head)
        assert all(device.memory_bytes is None for device in resized.cluster.devices)


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
