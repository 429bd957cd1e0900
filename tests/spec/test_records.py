"""Every record of the specifications through JSON: exact round trips, and errors that name the field."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpq import spec as s
from llmpq.spec import (
    W16,
    Cluster,
    CostRow,
    CostTable,
    Device,
    Experts,
    InvalidField,
    LayerKind,
    Link,
    LogProb,
    ModelSpec,
    Op,
    Output,
    Placement,
    Plan,
    Precision,
    Prediction,
    Profile,
    Quality,
    Record,
    Report,
    Rope,
    Sensitivity,
    Solution,
    Solved,
    Span,
    Stage,
    UsageError,
    Workload,
    parse_devices,
)
from llmpq.spec.cluster import Isa
from llmpq.spec.layers import Block
from llmpq.tuning.run_log import PhaseRun, RunRecord, StageRun

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
printable = names.filter(str.isprintable)
counts = st.integers(1, 10**6)
seconds = st.floats(0, 1e9, allow_nan=False)
finite = st.floats(allow_nan=False, allow_infinity=False)
parts = st.integers(1, 4096)
rates = st.floats(1, 1e12)
dtypes = st.sampled_from(["float32", "float16", "bfloat16"])
precisions = st.one_of(
    st.just(W16),
    st.builds(
        Precision,
        st.sampled_from([3, 4, 8]),
        st.sampled_from([None, *s.GROUP_SIZES]),
        st.sampled_from(["sym", "asym", "offset"]),
        st.sampled_from(["rtn", "gguf"]),
    ),
)
options = precisions | st.just(s.NATIVE)  # of a unit
predictions = st.builds(Prediction, seconds, seconds, seconds, st.lists(st.integers(0, 2**40)).map(tuple))
solutions = st.builds(Solution, names, finite, finite, seconds, finite, st.none() | finite)
metrics = st.sampled_from(["perplexity", "kl"])
qualities = st.builds(Quality, metrics, finite, finite, finite, finite, finite, counts, counts)
links = st.builds(Link, names, names, seconds, rates, st.booleans())
ops = st.builds(
    Op,
    st.sampled_from(["linear", "attention", "layer_rest", "embedding", "head_rest", "step", "experts"]),
    st.integers(0, 4096),
    counts,
    counts,
    seconds,
    st.none() | precisions,
    st.sampled_from(s.ACTIVATION_MODES),
)
cost_rows = st.builds(CostRow, ops, st.just(0.0) | st.floats(1e-12, 1e6), names, names, counts)
isas = st.sampled_from(get_args(Isa))
cost_tables = st.builds(
    CostTable,
    *(names, names, parts, st.none() | isas, counts),
    *(st.lists(cost_rows, max_size=3, unique_by=lambda row: row.op).map(tuple), names, names),
    *(st.floats(1e-3, 9), st.floats(1, 9), seconds),
)
some_links = st.lists(links, max_size=2, unique_by=lambda link: (link.source, link.target)).map(tuple)
profiles = st.builds(Profile, st.dictionaries(names, cost_tables, max_size=2), some_links)
sensitivities = st.builds(
    Sensitivity,
    names,
    names,
    names,
    names,
    st.dictionaries(names, st.dictionaries(precisions.map(str), seconds, max_size=3), max_size=3),
)
workloads = st.one_of(
    st.builds(Workload, counts, counts, counts),
    st.builds(Workload, counts, st.just(5), counts, st.integers(5, 99)),
    st.builds(Workload.of_lengths, counts, st.lists(st.tuples(counts, counts), min_size=1, max_size=4)),
)
factors = st.floats(1e-3, 1e3)


@st.composite
def draw_ropes(draw: st.DrawFn, pairs: int | None = None) -> Rope:
    pairs = pairs or draw(st.integers(1, 4))
    divisors = st.just(()) | st.tuples(*[factors] * pairs)
    dynamic = draw(st.none() | factors)
    return Rope(draw(factors), 2 * pairs, draw(divisors), draw(divisors), draw(counts), dynamic, draw(factors))


ropes = draw_ropes()
experts = st.builds(Experts, st.integers(9, 99), st.integers(1, 9), counts, st.booleans(), counts, st.booleans())


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    labels = draw(st.lists(printable, min_size=1, max_size=3, unique=True))
    devices = []
    for label in labels:
        kind = draw(st.sampled_from(["cpu", "cuda"]))
        isa = draw(st.none() | isas) if kind == "cpu" else None
        memory = draw(st.none() | st.integers(4096, 2**50))
        places = (draw(st.integers(0, 7)), draw(parts), isa, memory, draw(printable))
        devices.append(Device(label, kind, *places, draw(seconds), draw(st.floats(1, 100)), draw(parts)))
    ends = st.sampled_from(labels)
    of_devices = st.builds(Link, ends, ends, seconds, rates)
    chosen = st.lists(of_devices, max_size=3, unique_by=lambda link: (link.source, link.target))
    return Cluster(tuple(devices), tuple(draw(chosen)))


ADDED = ("pre", "post", "parallel", "parallel_one_norm")  # to the stream, as experts are
layer_kinds = st.builds(LayerKind, st.none() | counts, st.none() | draw_ropes(1), st.none() | experts)


@st.composite
def model_specs(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.integers(1, 8))
    kinds = draw(st.lists(layer_kinds, min_size=1, max_size=4))
    mixed = any(kind.experts is not None for kind in kinds)
    return ModelSpec(
        name=draw(names),
        content_hash=draw(names),
        num_layers=draw(st.integers(len(kinds), 80)),
        hidden_size=draw(counts),
        num_heads=kv_heads * draw(st.integers(1, 8)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(counts),
        intermediate_size=draw(counts),
        vocab_size=draw(counts),
        max_positions=draw(counts),
        dtype=draw(dtypes),
        tied_embeddings=draw(st.booleans()),
        embedding_dim=draw(counts),
        norm_eps=draw(st.floats(0, 0.5)),
        norm=draw(st.sampled_from(["rms", "layer"])),
        activation=draw(st.sampled_from(["silu", "relu", "gelu", "gelu_tanh"])),
        gated_mlp=draw(st.booleans()),
        final_norm=draw(st.booleans()),
        position_offset=draw(st.none() | counts),
        eos_token_ids=tuple(draw(st.lists(counts, max_size=3))),
        bos_token_id=draw(st.none() | counts),
        layer_kinds=tuple(kinds),
        block=draw(st.sampled_from([block for block in get_args(Block) if not mixed or block in ADDED])),
        biases=tuple(draw(st.lists(st.sampled_from(["qkv", "out", "up", "head"]), unique=True))),
        qk_norm=draw(st.sampled_from([None, "head", "row"])),
        attention_scale=draw(st.none() | factors),
        attention_cap=draw(st.none() | factors),
        attention_sinks=draw(st.booleans()),
        alibi=draw(st.booleans()),
        embedding_norm=draw(st.booleans()),
        embedding_scale=draw(factors),
        logit_scale=draw(factors),
        logit_cap=draw(st.none() | factors),
        stored=draw(st.just({}) | precisions.map(lambda stored: {"embedding": {"table": stored}})),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    cluster = draw(clusters())
    stages, end = [], 0
    devices = cluster.devices[: draw(st.integers(1, len(cluster.devices)))]

    for device in devices:
        of_layers = tuple(draw(st.lists(options, max_size=4)))
        mode = device.activations(draw(st.sampled_from(s.ACTIVATION_MODES)))
        stages.append(Stage(device.name, (end, end + len(of_layers)), of_layers, mode, draw(dtypes)))
        end += len(of_layers)
    return Plan(
        draw(names),
        draw(names),
        cluster,
        draw(workloads),
        tuple(stages),
        Placement(0, draw(options)),
        Placement(len(stages) - 1, draw(options)),
        draw(dtypes),
        draw(counts),
        draw(counts),
        draw(counts),
        draw(counts),
    )


log_probs = st.builds(
    LogProb,
    st.floats(-99, 0),
    st.lists(counts, max_size=2).map(tuple),
    st.lists(st.floats(-99, 0), max_size=2).map(tuple),
)
outputs = st.builds(
    Output,
    st.text(max_size=9),
    st.text(max_size=9),
    st.lists(counts, max_size=3).map(tuple),
    names,
    log_probs=st.none() | st.lists(log_probs, max_size=2).map(tuple),
)
reports = st.builds(
    Report, names, clusters(), plans(), predictions, predictions, st.lists(outputs, max_size=2).map(tuple)
)
spans = st.tuples(seconds, seconds).flatmap(
    lambda ends: st.builds(
        Span,
        st.sampled_from(["stage", "link"]),
        st.integers(0, 9),
        st.sampled_from(["prefill", "decode"]),
        counts,
        counts,
        st.just(min(ends)),
        st.just(max(ends)),
    )
)


def requests_within(span: st.SearchStrategy[float]) -> st.SearchStrategy[s.RequestTimes]:
    return st.tuples(span, span, span, counts).map(lambda t: s.RequestTimes(*sorted(t[:3]), t[3]))


def latencies_of(requests: st.SearchStrategy[s.RequestTimes]) -> st.SearchStrategy[s.Latency]:
    return st.lists(requests, min_size=1, max_size=3).map(s.Latency.of)


request_times = requests_within(seconds)
demands = st.builds(s.Demand, st.floats(1e-3, 1e3), st.none() | st.floats(1e-3, 1e3), max_tpot_s=st.none())

some_names = st.lists(names).map(tuple)
takeovers: dict[str, Any] = {
    **dict.fromkeys(("planning_s", "loading_s"), seconds),
    **dict.fromkeys(("requests", "tokens", "kept", "loaded"), counts),
    "changed": some_names,
}

RECORDS: dict[type[Record], st.SearchStrategy[Any]] = {
    s.Attained: st.builds(
        s.Attained,
        demands.map(lambda demand: dataclasses.replace(demand, max_ttft_s=1e6)),
        rates,
        latencies_of(requests_within(st.floats(0, 1e5))),  # which keep the limit
    ),
    Cluster: clusters(),
    CostRow: cost_rows,
    CostTable: cost_tables,
    s.Demand: demands,
    Device: clusters().map(lambda cluster: cluster.devices[0]),
    s.DeviceLoss: st.builds(s.DeviceLoss, device=names, reason=names, restarted=some_names, **takeovers),
    s.DeviceReturn: st.builds(s.DeviceReturn, devices=some_names, out_s=seconds, **takeovers),
    Experts: experts,
    s.Latency: latencies_of(request_times),
    LayerKind: layer_kinds,
    Link: links,
    LogProb: log_probs,
    ModelSpec: model_specs(),
    Op: ops,
    Output: outputs,
    Placement: st.builds(Placement, st.integers(0, 9), options),
    Plan: plans(),
    Prediction: predictions,
    Profile: profiles,
    Quality: qualities,
    Report: reports,
    s.RequestTimes: request_times,
    Rope: ropes,
    Sensitivity: sensitivities,
    Solution: solutions,
    Solved: st.builds(Solved, plans(), predictions, solutions, st.none() | qualities),
    Span: spans,
    Stage: plans().map(lambda plan: plan.stages[0]),
    Workload: workloads,
}
phase_runs = st.builds(PhaseRun, counts, seconds, seconds)
stage_runs = st.builds(
    StageRun, names, names, names, st.floats(1e-3, 9), seconds, counts, phase_runs, phase_runs, counts, counts
)
lengths = st.lists(counts, max_size=3).map(tuple)
LOGGED: dict[type[Record], st.SearchStrategy[Any]] = {
    PhaseRun: phase_runs,
    StageRun: stage_runs,
    RunRecord: st.builds(
        RunRecord,
        *(names, names, names, names, lengths, lengths),
        st.lists(stage_runs, max_size=2).map(tuple),
        predictions,
        predictions,
    ),
}
EVERY = RECORDS | LOGGED
every_record = pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)


def test_all_records_of_the_specification_are_tested() -> None:
    exported = {value for value in vars(s).values() if isinstance(value, type) and issubclass(value, Record)}
    assert exported - {Record} == set(RECORDS)


@every_record
@given(data=st.data())
def test_json_round_trip_is_exact(cls: type[Record], data: st.DataObject) -> None:
    record = data.draw(EVERY[cls])
    text = json.dumps(record.to_dict())
    again = cls.from_dict(json.loads(text))
    assert again == record
    assert json.dumps(again.to_dict()) == text
    assert again.digest() == record.digest()


@every_record
@given(data=st.data())
def test_a_missing_or_unknown_field_is_named(cls: type[Record], data: st.DataObject) -> None:
    record = data.draw(EVERY[cls])
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is f.default_factory is dataclasses.MISSING  # type: ignore[arg-type]
    ]
    for name in required:
        value = record.to_dict()
        del value[name]
        with pytest.raises(InvalidField, match=f"^{name}: is missing"):
            cls.from_dict(value)
    with pytest.raises(InvalidField, match=f"^colour: is not a field of {cls.__name__}"):
        cls.from_dict({**record.to_dict(), "colour": 1})


@every_record
@given(data=st.data())
def test_a_value_of_another_type_is_named(cls: type[Record], data: st.DataObject) -> None:
    value = data.draw(EVERY[cls]).to_dict()
    name = data.draw(st.sampled_from([f.name for f in dataclasses.fields(cls)]))
    wrong: Any = {"a": 1} if isinstance(value[name], list) else [1]
    with pytest.raises(InvalidField, match=rf"^{name}(\[0\])?: is "):  # [0]: of a list that may be absent
        cls.from_dict({**value, name: wrong})


@given(precisions)
def test_precision_is_the_inverse_of_its_text(precision: Precision) -> None:
    assert Precision.parse(str(precision)) == precision


def test_digest_changes_with_a_field() -> None:
    assert Workload(8, 32, 32).digest() != Workload(8, 32, 33).digest()


# ---- files ----


def test_files_round_trip_and_bad_files_are_usage_errors(tmp_path: Path) -> None:
    path, cluster = tmp_path / "cluster.json", parse_devices("cpu;cuda:0")
    cluster.save(path)
    assert Cluster.load(path) == cluster
    path.write_text(path.read_text().replace("llmpq.cluster/1", "llmpq.cluster/9"))
    with pytest.raises(UsageError, match=r"cluster.json: schema: is 'llmpq.cluster/9'; .* reads 'llmpq.cluster/1'"):
        Cluster.load(path)
    path.write_text('{"devices"')
    with pytest.raises(UsageError, match=r"cluster.json is not JSON"):
        Cluster.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"cluster.json is not JSON"):
        Cluster.load(path)
    path.write_text("[]")
    with pytest.raises(UsageError, match=r"cluster.json: .*is \[\], expected an object"):
        Cluster.load(path)
    with pytest.raises(UsageError, match=r"cannot read .*missing\.json: No such file"):
        Cluster.load(tmp_path / "missing.json")
    with pytest.raises(UsageError, match=r"cannot write .*x\.json: No such file"):
        cluster.save(tmp_path / "nowhere" / "x.json")


def test_a_field_of_either_kind_is_read_as_the_one_it_is_and_refused_in_the_words_of_the_last() -> None:
    for option in (s.NATIVE, Precision(4, 32), W16):
        placement = Placement(0, option)
        assert Placement.from_dict(json.loads(json.dumps(placement.to_dict()))) == placement
    with pytest.raises(InvalidField, match="precision: is 'natively', expected a precision such as 'w4-"):
        Placement.from_dict({"stage": 0, "precision": "natively"})
    with pytest.raises(InvalidField, match="precision: is 4, expected a string"):
        Placement.from_dict({"stage": 0, "precision": 4})
