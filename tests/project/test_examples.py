"""Every example runs, is short, and says what is true."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import planner
from llmpq.checkpoint.model_files import open_model
from llmpq.cli.main import build_parser
from llmpq.report.chrome_trace import trace
from llmpq.spec import Device, Plan, Precision, Profile, Sensitivity, Span, Workload, parse_devices

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: str, cwd: Path = ROOT) -> list[str]:
    """Lines that an example prints, as its reader would start it: the project installed, from anywhere."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=cwd, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_all_are_short_begin_with_what_they_show_and_are_tested() -> None:
    tested = Path(__file__).read_text()
    assert len(EXAMPLES) >= 5
    for path in EXAMPLES:
        text = path.read_text()
        assert len(text.splitlines()) <= 60, path.name
        assert text.startswith('"""'), path.name
        assert f'"{path.name}"' in tested, path.name


@pytest.mark.parametrize("name", ["plan_by_hand", "read_trace"])
def test_planning_needs_no_torch(name: str) -> None:
    code = f"import sys; sys.path.insert(0, 'examples'); import {name}; assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


def test_plan_by_hand_places_every_layer_within_the_budget() -> None:
    *stages, last = run("plan_by_hand.py")
    found = [re.fullmatch(r"(fast|slow): layers (\d+) to (\d+), bits \[([\d, ]+)\]", line) for line in stages]
    split = [match.groups() for match in found if match]
    assert {device for device, *_ in split} == {"fast", "slow"}
    layers = [layer for _, first, end, _ in split for layer in range(int(first), int(end) + 1)]
    assert layers == list(range(16))
    bits = [int(width) for *_, widths in split for width in widths.split(", ")]
    loss = {3: 4.0, 4: 1.0, 8: 0.01, 16: 0.0}
    said = re.fullmatch(r"[\d.]+ tokens/s, sensitivity ([\d.]+) of 20", last)
    assert said is not None
    of_layers = sum(loss[width] * (layer + 2) / 10 for layer, width in enumerate(bits))
    assert of_layers - 0.005 <= float(said[1]) <= 20


@pytest.mark.slow
def test_compare_devices_gains_by_more_and_loses_by_less() -> None:
    lines = run("compare_devices.py")
    speeds = {what: float(speed) for what, speed in re.findall(r"^(.+): ([\d.]+) tokens/s", "\n".join(lines), re.M)}
    now = speeds["as it is"]
    gap = 0.005
    assert speeds["a second fast device"] > now
    for what in ("10 % more memory on fast", "10 % more memory on slow", "10 % more sensitivity allowed"):
        assert speeds[what] >= now * (1 - gap), what
    for what in ("10 % less sensitivity allowed", "without fast"):
        assert speeds[what] <= now * (1 + gap), what
    assert "without slow: no plan" in lines


def test_a_custom_cost_table_is_read_and_no_plan_beats_the_memory_it_describes(tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    (command,) = run("custom_cost_table.py", str(costs), cwd=tmp_path)
    given = build_parser().parse_args(shlex.split(command)[1:])
    assert given.costs == str(costs)
    cluster, profile = parse_devices(given.devices), Profile.load(given.costs)
    spec = open_model(given.model).spec
    work = Workload(given.batch_size, given.prompt_len, given.output_len)
    omega = {u: {f"w{bits}-g32-sym-rtn": 8.0 - bits for bits in (3, 4, 8)} for u in spec.units}
    sensitivity = Sensitivity(spec.name, spec.content_hash, "synthetic", "none", omega)
    limits = planner.Constraints(activations=given.activations, gap=0.01)
    plan = planner.solve(planner.Problem(spec, cluster, work, profile, sensitivity, limits))
    bytes_per_s = {"board": 25e9, "laptop": 60e9}
    read_s = {
        stage.device: sum(
            spec.unit_bytes(unit, plan.plan.precision(unit)) for unit in plan.plan.units_of(i) if unit != "embedding"
        )
        / bytes_per_s[stage.device]
        for i, stage in enumerate(plan.plan.stages)
    }
    assert len(read_s) == 2  # neither holds the model
    steps = given.output_len - 1  # prefill gives the first token; every other one reads all weights anew
    assert plan.prediction.decode_s >= steps * 0.98 * sum(read_s.values())  # norms and biases are not linears


def test_read_trace_adds_up_the_seconds_of_stages(tmp_path: Path) -> None:
    lines = run("read_trace.py")
    assert len(lines) == 4 and all(re.search(r"prefill .*busy \d+ %; decode .*busy \d+ %", line) for line in lines)
    device = Device("alone", "cpu")
    plan = Plan.single(open_model("demo").spec, device, Precision(4, 32), slots=2, max_length=16)
    spans = [
        Span("stage", 0, "prefill", 1, 8, 0.0, 0.010),
        Span("stage", 0, "prefill", 1, 8, 0.030, 0.040),
        Span("stage", 0, "decode", 2, 2, 0.050, 0.051),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(trace(plan, {"measured": spans})))
    (line,) = run("read_trace.py", str(path))
    assert line.startswith("measured, stage 0 on ")
    assert line.endswith("prefill 20.00 ms in 2 steps, busy 50 %; decode 1.00 ms in 1 steps, busy 100 %")


@pytest.mark.slow
def test_plan_and_run_answers_from_two_devices() -> None:
    lines = run("plan_and_run.py")
    stages = [re.fullmatch(r"(first|second): (\d+) layers, ([\w, ]+) bits, ([\d.]+) MiB", line) for line in lines[:2]]
    found = [match.groups() for match in stages if match]
    assert sorted(device for device, *_ in found) == ["first", "second"]
    assert sum(int(layers) for _, layers, *_ in found) == open_model("demo").spec.num_layers
    assert all(float(size) <= 80 for *_, size in found)
    assert lines[2] == "> What is the capital of France?" and "Paris" in lines[3]
    assert "> Name three countries in Europe." in lines
