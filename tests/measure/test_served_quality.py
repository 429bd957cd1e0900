"""Where a plan's quality is measured: on CPUs of this host, with its own KV caches."""

from __future__ import annotations

from dataclasses import replace

from llmpq.measure.served_quality import on_this_host
from llmpq.spec import W16, Cluster, Device, KvBits, Placement, Plan, Precision
from tests.support.planner_instances import model


def test_a_stage_for_each_run_of_layers_with_caches_of_one_width() -> None:
    spec, widths = model(5), [Precision(bits, 32) for bits in (8, 3, 4, 8, 3, 4)]
    devices = tuple(Device(f"cuda{i}", "cuda", index=i) for i in range(4))
    one = Plan.single(spec, devices[0], W16, slots=3, max_length=20, dtype="bfloat16")
    (whole,) = one.stages
    layers: tuple[tuple[int, int, KvBits], ...] = ((0, 0, 8), (0, 2, 16), (2, 3, 16), (3, 5, 8))
    stages = tuple(
        replace(whole, device=device.name, layers=(a, b), precisions=whole.precisions[a:b], kv_bits=bits)
        for device, (a, b, bits) in zip(devices, layers, strict=True)
    )
    plan = replace(one, cluster=Cluster(devices), stages=stages, head=Placement(3, W16)).with_precisions([*widths, W16])
    here = on_this_host(plan, spec, 64)
    assert [(*stage.layers, stage.kv_bits) for stage in here.stages] == [(0, 3, 16), (3, 5, 8)]
    assert [here.precision(unit) for unit in spec.units] == [*widths, W16]
    assert {device.kind for device in here.cluster.devices} == {"cpu"} and (here.slots, here.max_length) == (1, 64)
    alike = replace(plan, stages=tuple(replace(stage, kv_bits=8) for stage in stages))
    assert [(*stage.layers, stage.kv_bits) for stage in on_this_host(alike, spec, 64).stages] == [(0, 5, 8)]
