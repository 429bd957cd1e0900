"""Correcting cost tables by runs: what made the runs differ from their predictions is found again."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from llmpq.spec import CostRow, CostTable, InvalidField, Op, Prediction, Profile
from llmpq.tuning.refitting import mean_error, refit, runs_of
from llmpq.tuning.run_log import PhaseRun, RunRecord, StageRun

STEP_S = 40e-6
OVERHEAD = 10_000_000
LAYER = Op("linear", 8, 64, 64)


def table(device: str, kernels: str = "k") -> CostTable:
    rows = (CostRow(Op("step"), STEP_S, "cpu", "float32", 0), CostRow(LAYER, 1e-3, "cpu", "float32", 0))
    return CostTable(device, kernels, 1, "avx2", OVERHEAD, rows)


PROFILE = Profile({"wide": table("one kind"), "narrow": table("another kind")}, ())


def phase(costs: CostTable, truth: tuple[float, float], layers: int, steps: int) -> PhaseRun:
    """Of a stage of so many layers, as a table predicts it and as it is by the true numbers of PROFILE's tables."""
    factor, step_s = truth
    predicted = steps * (costs.seconds(Op("step")) + layers * costs.seconds(LAYER))
    return PhaseRun(steps, predicted, steps * (step_s + factor * layers * 1e-3))


def record(costs: Profile, truths: dict[str, tuple[float, float]], layers: int, steps: int, more: int = 0) -> RunRecord:
    """A run on the devices of `truths`; `more`: bytes that it takes beyond what PROFILE's overhead predicts."""
    stages = tuple(
        StageRun(
            name="any",
            device=costs.tables[name].device,
            kernels=costs.tables[name].kernels,
            scale=costs.tables[name].scale,
            step_s=costs.tables[name].seconds(Op("step")),
            overhead_bytes=costs.tables[name].overhead_bytes,
            prefill=phase(costs.tables[name], truth, 10 * layers, 1),
            decode=phase(costs.tables[name], truth, layers, steps),
            predicted_bytes=50_000_000 + costs.tables[name].overhead_bytes,
            measured_bytes=50_000_000 + OVERHEAD + more,
        )
        for name, truth in truths.items()
    )
    nothing = Prediction(0.0, 0.0, 0.0, ())
    return RunRecord("2026-01-01", "m", "h", "", (8,), (steps + 1,), stages, nothing, nothing)


TRUTHS = {"wide": (1.25, 90e-6), "narrow": (0.8, 0.0)}
RECORDS = [record(PROFILE, TRUTHS, layers, steps) for layers, steps in ((3, 20), (1, 64), (7, 5))]


def numbers(costs: Profile, name: str) -> tuple[float, float]:
    """Seconds of a step and of a layer."""
    return costs.tables[name].seconds(Op("step")), costs.tables[name].seconds(LAYER)


def test_the_factor_and_the_seconds_of_a_step_are_found_exactly() -> None:
    fitted = refit(PROFILE, RECORDS)
    assert numbers(fitted, "wide") == pytest.approx((90e-6, 1.25e-3))
    assert numbers(fitted, "narrow") == pytest.approx((0.0, 0.8e-3), abs=1e-9)
    for name in TRUTHS:
        runs = runs_of(PROFILE.tables[name], RECORDS)
        assert len(runs) == 3
        assert mean_error(PROFILE.tables[name], runs) > 0.1
        assert mean_error(fitted.tables[name], runs) == pytest.approx(0.0, abs=1e-6)


def test_the_mean_error_is_that_of_the_seconds_at_work() -> None:
    costs = PROFILE.tables["wide"]
    run = dataclasses.replace(
        RECORDS[0].stages[0],
        prefill=PhaseRun(1, STEP_S + 1e-3, 2 * (STEP_S + 1e-3)),
        decode=PhaseRun(10, 10 * (STEP_S + 1e-3), 8 * (STEP_S + 1e-3)),
    )
    assert mean_error(costs, [run]) == pytest.approx((0.5 + 0.25) / 2)
    assert mean_error(costs, []) == 0.0


def test_noise_in_the_runs_is_averaged_out() -> None:
    noise = np.random.default_rng(0)

    def disturbed(run: PhaseRun) -> PhaseRun:
        return dataclasses.replace(run, measured_s=run.measured_s * noise.uniform(0.97, 1.03))

    records = [record(PROFILE, {"wide": (1.25, 1e-3)}, layers, steps) for layers in range(1, 9) for steps in (4, 30)]
    noisy = [
        dataclasses.replace(
            r,
            stages=tuple(
                dataclasses.replace(s, prefill=disturbed(s.prefill), decode=disturbed(s.decode)) for s in r.stages
            ),
        )
        for r in records
    ]
    step_s, layer_s = numbers(refit(PROFILE, noisy), "wide")
    assert layer_s == pytest.approx(1.25e-3, rel=0.02)
    assert step_s == pytest.approx(1e-3, rel=0.1)


def relative_squares(runs: list[StageRun], factor: float, step_s: float) -> float:
    """What the fit makes least, by its definition."""
    phases = [p for run in runs for p in (run.prefill, run.decode)]
    predicted = [factor * (p.predicted_s - p.steps * STEP_S) + step_s * p.steps for p in phases]
    return sum((have / p.measured_s - 1) ** 2 for have, p in zip(predicted, phases, strict=True))


@pytest.mark.parametrize("step_s", [60e-6, -400e-6], ids=["free", "at the limit"])
def test_no_other_pair_of_numbers_fits_better(step_s: float) -> None:
    truth = (1.1, step_s)
    records = [record(PROFILE, {"wide": truth}, layers, 10) for layers in (1, 2, 5)]
    records[0] = record(PROFILE, {"wide": (1.3, step_s)}, 1, 10)  # so that no pair fits all
    runs = runs_of(PROFILE.tables["wide"], records)
    found_step, found_layer = numbers(refit(PROFILE, records), "wide")
    best = relative_squares(runs, found_layer / 1e-3, found_step)
    grid = itertools.product(np.linspace(0.3, 2.0, 171), np.linspace(0.0, 500e-6, 101))
    assert best <= min(relative_squares(runs, factor, each) for factor, each in grid) + 1e-12
    assert found_step >= 0
    assert (found_step == 0) == (step_s < 0)


def test_runs_that_are_all_alike_change_operations_and_steps_by_one_factor() -> None:
    alike = [record(PROFILE, {"wide": (1.0, STEP_S)}, 2, 10)] * 3
    stage = alike[0].stages[0]
    both = dataclasses.replace(stage.decode, measured_s=1.5 * stage.decode.predicted_s)
    alike = [dataclasses.replace(r, stages=(dataclasses.replace(stage, prefill=both, decode=both),)) for r in alike]
    assert numbers(refit(PROFILE, alike), "wide") == pytest.approx((1.5 * STEP_S, 1.5e-3))


def test_a_table_is_changed_by_enough_runs_on_its_own_device_and_kernels_only() -> None:
    assert refit(PROFILE, RECORDS[:2]) == PROFILE
    assert refit(PROFILE, RECORDS[:2], least_runs=2) != PROFILE
    others = Profile({"wide": table("a third kind"), "narrow": table("another kind", kernels="newer")}, ())
    assert refit(others, RECORDS) == others
    one = [dataclasses.replace(r, stages=r.stages[:1]) for r in RECORDS]
    fitted = refit(PROFILE, one)
    assert fitted.tables["narrow"] == PROFILE.tables["narrow"]
    assert fitted.tables["wide"] != PROFILE.tables["wide"]


def test_stages_without_measurements_do_not_count() -> None:
    seen, unseen = RECORDS[0].stages
    nothing = PhaseRun(0, 0.0, 0.0)
    unseen = dataclasses.replace(unseen, prefill=nothing, decode=nothing)
    records = [dataclasses.replace(RECORDS[0], stages=(seen, unseen))] * 3
    assert len(runs_of(PROFILE.tables["wide"], records)) == 3 and not runs_of(PROFILE.tables["narrow"], records)
    assert refit(PROFILE, records).tables["narrow"] == PROFILE.tables["narrow"]


@pytest.mark.parametrize("field, value", [("scale", 0.0), ("scale", float("inf")), ("step_s", -1.0)])
def test_a_logged_stage_has_sensible_numbers(field: str, value: float) -> None:
    with pytest.raises(InvalidField, match=field):
        dataclasses.replace(RECORDS[0].stages[0], **{field: value})
    with pytest.raises(InvalidField, match="measured_s"):
        PhaseRun(1, 1.0, -1.0)


def test_old_runs_count_for_a_corrected_table_as_new_ones_do() -> None:
    once = refit(PROFILE, RECORDS)
    assert once.tables["wide"].scale == pytest.approx(1.25)
    new = [record(once, TRUTHS, layers, steps) for layers, steps in ((2, 30), (5, 9), (1, 50))]
    for records in (RECORDS, new, [*RECORDS, *new]):
        again = refit(once, records)
        for name in TRUTHS:
            assert numbers(again, name) == pytest.approx(numbers(once, name), abs=1e-9)
            assert again.tables[name].scale == pytest.approx(once.tables[name].scale)
            assert again.tables[name].overhead_bytes == once.tables[name].overhead_bytes


@pytest.mark.parametrize(
    ("more", "overhead"),
    [
        # The least that all runs stay within.
        ([1000 * i for i in range(10)], OVERHEAD + 9000),
        ([-4_000_000] * 10, OVERHEAD - 4_000_000),
        ([-2 * OVERHEAD] * 10, 0),
    ],
    ids=["more", "less", "less than none"],
)
def test_the_overhead_becomes_what_runs_needed(more: list[int], overhead: int) -> None:
    records = [record(PROFILE, {"wide": (1.0, STEP_S)}, 2, 10, extra) for extra in more]
    once = refit(PROFILE, records)
    assert once.tables["wide"].overhead_bytes == overhead
    assert once.tables["narrow"].overhead_bytes == OVERHEAD
    predicted_anew = [record(once, {"wide": (1.0, STEP_S)}, 2, 10, extra) for extra in more]
    assert refit(once, predicted_anew).tables["wide"].overhead_bytes == overhead
