"""Traces keep to Chrome's format, hold every span once, and name what a person looks for."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import pytest
from rich.console import Console

import planner
from llmpq.report import console
from llmpq.report.chrome_trace import trace
from llmpq.spec import Plan, Prediction, Span, Workload
from tests.support.planner_instances import instance

NOTHING = Prediction(0.0, 0.0, 0.0, (0, 0))


@pytest.fixture(scope="module")
def simulated() -> tuple[Plan, planner.Simulation]:
    given = instance(4, workload=Workload(4, 10, 5), all_devices=True)
    plan = planner.solve(given).plan
    return plan, planner.simulate(plan, given.spec, given.profile, [10, 10, 10, 9], [5] * 4)


def test_a_trace_keeps_to_the_format(simulated: tuple[Plan, planner.Simulation]) -> None:
    plan, simulation = simulated
    measured = [span for span in simulation.spans if (span.kind, span.index) != ("link", 0)]  # nobody waited for those
    written = json.loads(json.dumps(trace(plan, {"predicted": simulation.spans, "measured": measured})))
    events = written["traceEvents"]
    names = {"process_name": str, "process_sort_index": int, "thread_name": str, "thread_sort_index": int}
    processes, tracks = {}, {}
    for event in events:
        assert isinstance(event["pid"], int)
        if event["ph"] == "M":
            key = "sort_index" if event["name"].endswith("sort_index") else "name"
            assert isinstance(event["args"][key], names[event["name"]])
            if event["name"] == "process_name":
                processes[event["pid"]] = event["args"]["name"]
            elif event["name"] == "thread_name":
                tracks[event["pid"], event["tid"]] = event["args"]["name"]
        else:
            assert event["ph"] == "X"
            assert event["ts"] >= 0 and event["dur"] >= 0
    assert processes == {1: "predicted", 2: "measured"}
    a, b = (stage.device for stage in plan.stages)
    of = [[name for (pid, _), name in sorted(tracks.items()) if pid == process] for process in processes]
    assert of == [
        [f"stage 0 on {a}", f"{a} to {b}", f"stage 1 on {b}", f"{b} to {a}"],
        [f"stage 0 on {a}", f"stage 1 on {b}", f"{b} to {a}"],
    ]
    steps = [event for event in events if event["ph"] == "X"]
    assert {(event["pid"], event["tid"]) for event in steps} == set(tracks)
    assert len(steps) == len(simulation.spans) + len(measured)


def test_events_are_spans_in_microseconds(simulated: tuple[Plan, planner.Simulation]) -> None:
    plan, _ = simulated
    spans = (
        Span("stage", 0, "prefill", 2, 20, 0.0, 0.25),
        Span("link", 0, "prefill", 3, 29, 0.25, 0.5),
        Span("link", 1, "decode", 4, 4, 1.5, 1.5),
    )
    events = [event for event in trace(plan, {"predicted": spans})["traceEvents"] if event["ph"] == "X"]
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in events] == [
        ("prefill 2 x 10 tokens", 1, 0.0, 250_000.0),
        ("prefill 29 tokens of 3", 2, 250_000.0, 250_000.0),
        ("decode 4 x 1 tokens", 4, 1_500_000.0, 0.0),
    ]


def rows(plan: Plan, predicted: Sequence[Span], measured: Sequence[Span]) -> list[list[str]]:
    """Of the comparison table, those that say how busy stages were."""
    out = io.StringIO()
    table = console.comparison_table(plan, NOTHING, NOTHING, predicted, measured)
    Console(file=out, width=120).print(table)
    return [line.split("  ") for line in out.getvalue().splitlines() if "busy in" in line]


def test_a_run_reports_the_utilization_of_each_stage(simulated: tuple[Plan, planner.Simulation]) -> None:
    plan, _ = simulated

    def spans(stage: int, *times: float) -> list[Span]:
        pairs = zip(times[::2], times[1::2])
        return [Span("stage", stage, "decode", 1, 1, start, end) for start, end in pairs]

    predicted = [*spans(0, 0, 9, 11, 20), *spans(1, 5, 10)]
    measured = [*spans(0, 0, 4, 4, 5, 5, 6, 8, 10), *spans(1, 5, 6)]
    found = [[cell.strip() for cell in row if cell.strip()] for row in rows(plan, predicted, measured)]
    assert found == [[f"busy in decode, {plan.stages[0].device}", "90 %", "80 %", "+12.5 %"]]
    found = [[cell.strip() for cell in row if cell.strip()] for row in rows(plan, (), measured)]
    assert found == [[f"busy in decode, {plan.stages[0].device}", "-", "80 %", "-"]]
    assert rows(plan, predicted, ()) == []


def test_of_a_long_run_the_first_steps_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    given = instance(4, workload=Workload(4, 10, 30), all_devices=True)
    plan = planner.solve(given).plan
    lengths = [10] * 4, [30] * 4
    whole = planner.simulate(plan, given.spec, given.profile, *lengths)
    monkeypatch.setattr("llmpq.spec.trace.SPANS_KEPT", 7)
    short = planner.simulate(plan, given.spec, given.profile, *lengths)
    assert short.prediction == whole.prediction
    assert len(short.spans) == 7 * len({(span.kind, span.index) for span in whole.spans}) < len(whole.spans)
    for span in short.spans:
        alike = [other for other in whole.spans if (other.kind, other.index) == (span.kind, span.index)]
        assert span in alike[:7]
