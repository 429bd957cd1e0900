"""The log of runs: what it says of a run, that lines of several writers stay whole, and what is said of broken ones."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import planner
from llmpq.runtime.engine import Generated, RunResult
from llmpq.spec import CostRow, CostTable, Op, Plan, Prediction, Profile, Span, UsageError
from llmpq.spec.formatting import format_split
from llmpq.tuning import run_log
from llmpq.tuning.run_log import PhaseRun, RunRecord
from tests.support.pipelines import make_plan
from tests.support.planner_instances import model

SPEC = model(3, content_hash="0123")


def cost_table(device: str, step_s: float) -> CostTable:
    return CostTable(device, "k", 1, None, 77, (CostRow(Op("step"), step_s, "cpu", "float32", 0),), scale=1.5)


COSTS = Profile({"cpu0": cost_table("fast", 1e-5), "cpu1": cost_table("slow", 2e-5)}, ())


def spans(factor: float) -> tuple[Span, ...]:
    """Two steps of prefill and one of decode on both stages, some links."""
    steps = [
        Span("stage", 0, "prefill", 1, 5, 0.0, 1.0),
        Span("link", 0, "prefill", 1, 5, 1.0, 1.5),
        Span("stage", 0, "prefill", 1, 6, 1.0, 3.0),
        Span("stage", 1, "prefill", 1, 5, 1.5, 2.0),
        Span("stage", 1, "prefill", 1, 6, 3.5, 4.0),
        Span("stage", 0, "decode", 2, 2, 4.0, 4.25),
        Span("stage", 1, "decode", 2, 2, 5.0, 5.125),
    ]
    return tuple(replace(span, start_s=factor * span.start_s, end_s=factor * span.end_s) for span in steps)


def make_record() -> tuple[Plan, RunRecord]:
    plan = make_plan(SPEC, [2, 1], 1, 2)
    simulation = planner.Simulation(Prediction(4.0, 1.125, 0.78, (100, 200)), spans(1.0), ())
    generated = (Generated((3, 4), "length"), Generated((5, 1), "stop"))
    result = RunResult(generated, Prediction(8.0, 2.25, 0.39, (110, 190)), spans(2.0))
    return plan, RunRecord.of(plan, COSTS, [5, 6], simulation, result)


def test_a_record_has_measured_and_predicted_seconds_of_each_stage() -> None:
    plan, record = make_record()
    assert (record.model, record.model_hash) == ("tiny", "0123")
    assert (record.prompt_lens, record.output_lens) == ((5, 6), (2, 2))
    first, last = record.stages
    assert (first.name, first.device, first.kernels, first.scale, first.overhead_bytes) == (
        "cpu0",
        "fast",
        "k",
        1.5,
        77,
    )
    assert (first.step_s, last.step_s) == (1e-5, 2e-5)
    assert (first.prefill, first.decode) == (PhaseRun(2, 3.0, 6.0), PhaseRun(1, 0.25, 0.5))
    assert (last.prefill, last.decode) == (PhaseRun(2, 1.0, 2.0), PhaseRun(1, 0.125, 0.25))
    assert [(s.predicted_bytes, s.measured_bytes) for s in record.stages] == [(100, 110), (200, 190)]
    assert record.predicted.tokens_per_s == 0.78 and record.measured.tokens_per_s == 0.39
    # Precisions of make_plan: 4, 8 and 16 bits in turn, by layer; the embedding has the first, the head the second.
    assert record.split == format_split(plan) == "cpu0: embedding 4, 4 8; cpu1: 16, head 8"


def test_appended_records_are_read_in_order(tmp_path: Path) -> None:
    _, record = make_record()
    log = tmp_path / "runs.jsonl"
    records = [replace(record, date=str(i)) for i in range(3)]
    for each in records:
        run_log.append(each, log)
    assert run_log.read(log) == tuple(records)
    assert len(log.read_text().splitlines()) == 3


WRITER = """
import sys
from pathlib import Path
from dataclasses import replace
from llmpq.tuning import run_log
log, name = Path(sys.argv[1]), sys.argv[2]
record, = run_log.read(Path(sys.argv[3]))
for i in range(100):
    run_log.append(replace(record, model=f"{name} {i}", prompt_lens=tuple(range(2000))), log)
"""


def test_runs_that_end_at_the_same_time_do_not_mix_their_lines(tmp_path: Path) -> None:
    _, record = make_record()
    run_log.append(record, tmp_path / "one.jsonl")
    log = tmp_path / "runs.jsonl"
    command = [sys.executable, "-c", WRITER, str(log)]
    writers = [subprocess.Popen([*command, name, str(tmp_path / "one.jsonl")]) for name in ("a", "b")]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    found = [r.model for r in run_log.read(log)]
    for name in ("a", "b"):
        assert [model for model in found if model.startswith(name)] == [f"{name} {i}" for i in range(100)]
    assert len(found) == 200


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2 is not JSON; remove the line"),
        ("\udcff", "line 2 is not JSON; remove the line"),
        ("[1]", "line 2: .*is \\[1\\], expected an object; remove the line"),
        ('{"schema": "llmpq.run/9"}', "line 2: schema: is 'llmpq.run/9'; .* reads 'llmpq.run/1'"),
        (None, "line 2: stages\\[0\\].prefill.steps: is 'many', expected int"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str | None, expected: str) -> None:
    _, record = make_record()
    log = tmp_path / "runs.jsonl"
    run_log.append(record, log)
    if line is None:
        value = record.to_dict()
        value["stages"][0]["prefill"]["steps"] = "many"
        line = json.dumps(value)
    with log.open("a", errors="surrogateescape") as file:
        file.write(line + "\n")
    with pytest.raises(UsageError, match=f"runs.jsonl: {expected}"):
        run_log.read(log)


def test_a_log_that_cannot_be_read_or_written_is_a_usage_error(tmp_path: Path) -> None:
    _, record = make_record()
    with pytest.raises(UsageError, match=r"cannot read .*none\.jsonl: No such file"):
        run_log.read(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match=r"cannot write .*runs\.jsonl: No such file.*--no-log"):
        run_log.append(record, tmp_path / "nowhere" / "runs.jsonl")


def test_the_usual_log_lies_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "cache"))
    assert run_log.default_log() == run_log.writable_default_log() == tmp_path / "cache" / "runs.jsonl"
