"""The command line from end to end on a tiny model."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

import planner
from llmpq.checkpoint.model_files import open_model
from llmpq.cli.main import main
from llmpq.spec import W16, Demand, Profile, Report, Sensitivity, Solved, busy
from llmpq.tuning import refitting, run_log, trial_runs
from tests.support import tiny_models
from tests.support.commands import DEVICES, WORKLOAD, write


def test_the_commands_write_files_that_the_next_one_reads(files: dict[str, str], model: Path) -> None:
    costs = Profile.load(files["costs"])
    assert set(costs.tables) == {"cpu0", "small"}
    timed = {row.op for table in costs.tables.values() for row in table.rows if row.op.kind == "linear"}
    assert {op.activations for op in timed if op.precision != W16} == {"a8x2"}
    omega = Sensitivity.load(files["sensitivity"])
    plan = Solved.load(files["plan"])
    assert omega.model_hash == plan.plan.model_hash
    assert len(plan.plan.stages) == 2  # --all-devices
    assert plan.solution.omega <= plan.solution.omega_budget * (1 + 1e-9)


def test_a_plan_for_lengths_from_a_file_at_the_least_cost(
    files: dict[str, str], model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, common = str(tmp_path / "plan.json"), ["plan", "--model", str(model), "--activations", "a8x2"]
    known = ["--costs", files["costs"], "--sensitivity", files["sensitivity"], "--batch-size", "2", "--out", out]
    lines = '{"prompt_len": 12, "output_len": 3}\n{"prompt": "one", "completion": "two"}\n'
    lengths = ["--lengths", write(tmp_path, "lengths.jsonl", lines)]
    priced = DEVICES.replace("=64MiB", "=64MiB,price=2").replace("price=2,name", "price=1,name")
    asked = ["--objective", "cost", "--prefill-microbatch", "1"]
    assert main([*common, "--devices", priced, *known, *lengths, *asked]) == 0
    solved = Solved.load(out)
    plan = solved.plan
    assert plan.workload.output_lens[0] == plan.workload.output_len == 3 and plan.workload.prompt_lens[0] == 12
    assert plan.prefill_microbatch == 1
    assert solved.solution.objective == pytest.approx(solved.cost_per_million_tokens)
    printed = capfd.readouterr().out
    assert "a million tokens cost" in printed and "prompts of " in printed and " to 12 (" in printed
    for wrong, message in (
        ([*lengths, "--prompt-len", "4"], "--lengths replaces --prompt-len and --output-len"),
        ([*lengths, "--objective", "cost"], "cpu0, small have no price"),
        (["--decode-microbatch", "3"], "micro-batches of 3 sequences are asked for in decode, of a batch of 2"),
    ):
        assert main([*common, "--devices", DEVICES, *known, *wrong]) == 2
        assert message in capfd.readouterr().err


def test_a_plan_for_requests_that_come_at_random(
    files: dict[str, str], model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, common = str(tmp_path / "plan.json"), ["plan", "--model", str(model), "--activations", "a8x2"]
    known = ["--devices", DEVICES, "--costs", files["costs"], "--sensitivity", files["sensitivity"]]
    asked = [*common, *known, *WORKLOAD, "--out", out, "--max-ttft", "5", "--max-tpot", "1", "--rate"]
    assert main([*asked, "max"]) == 0
    online = Solved.load(out).online
    assert online is not None and online.demand == Demand(5.0, max_tpot_s=1.0)
    printed = " ".join(capfd.readouterr().out.split())
    assert f"up to {online.requests_per_s:.3g} requests/s within the limits" in printed and "no bound" in printed
    assert main([*asked, f"{100 * online.requests_per_s:.0f}"]) == 3
    assert f"{online.requests_per_s:.3g} are attainable" in " ".join(capfd.readouterr().err.split())


def test_explain_names_the_bottleneck_and_the_alternatives(
    files: dict[str, str], model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    known, html = ["--costs", files["costs"], "--sensitivity", files["sensitivity"]], tmp_path / "page.html"
    assert main(["explain", "--model", str(model), files["plan"], *known, "--html", str(html)]) == 0
    out = capfd.readouterr().out
    assert "Stages, of one micro-batch" in out and "single" in out and "without small" in out
    assert "Throughput over quality" in out
    plan = Solved.load(files["plan"])
    assert f"{plan.prediction.tokens_per_s:.1f}" in out
    assert f"{plan.prediction.tokens_per_s:.1f} tokens/s" in html.read_text()


def test_run_writes_the_report_and_prints_completions_only_when_quiet(
    files: dict[str, str], model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report_file, output_file = tmp_path / "report.json", tmp_path / "out.jsonl"
    arguments = ["run", "--model", str(model), "--plan", files["plan"], "--prompt", "one two", "--prompt", "three"]
    arguments += ["--max-new-tokens", "6", "--json-out", str(report_file), "--output", str(output_file), "--quiet"]
    assert main(arguments) == 0
    captured = capfd.readouterr()
    report = Report.load(report_file)
    assert [o.prompt for o in report.outputs] == ["one two", "three"]
    assert all(1 <= len(o.token_ids) <= 6 and o.finish_reason in ("stop", "length") for o in report.outputs)
    assert report.plan == Solved.load(files["plan"]).plan
    assert report.measured.prefill_s > 0 and len(report.measured.memory_bytes) == 2
    assert report.predicted.prefill_s > 0
    assert [json.loads(line) for line in output_file.read_text().splitlines()] == [o.to_dict() for o in report.outputs]
    assert captured.err == ""
    assert captured.out.count("> ") >= 2 and "Predicted" not in captured.out


def test_run_says_how_busy_the_stages_were_and_writes_a_trace_of_both(
    files: dict[str, str], model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace_file = tmp_path / "trace.json"
    arguments = ["run", "--model", str(model), "--plan", files["plan"], "--costs", files["costs"], "--prompt", "one"]
    arguments += ["--max-new-tokens", "6", "--trace", str(trace_file), "--no-log"]
    assert main(arguments) == 0
    out = capfd.readouterr().out
    for stage in Solved.load(files["plan"]).plan.stages:
        assert re.search(rf"busy in decode, {stage.device} +\d+ % +\d+ %", out)
    events = json.loads(trace_file.read_text())["traceEvents"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert set(processes.values()) == {"predicted", "measured"}
    stages, links = (
        [
            Counter((e["tid"], e["name"]) for e in events if e["pid"] == pid and e.get("cat", "").startswith(kind))
            for pid in processes
        ]
        for kind in ("stage", "link")
    )
    assert stages[0] == stages[1] and stages[0]  # the same steps on the same tracks
    assert links[1] <= links[0] and links[1]  # of those that the next stage waited for


def test_runs_are_logged_and_costs_corrected_by_them(
    files: dict[str, str], model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log, refitted = tmp_path / "runs.jsonl", tmp_path / "refitted.json"
    arguments = ["run", "--model", str(model), "--plan", files["plan"], "--costs", files["costs"], "--quiet"]
    prompts = ["--prompt", "one two", "--prompt", "three", "--prompt", "four"]  # more than the slots
    for length in ("3", "5", "4"):
        assert main([*arguments, *prompts, "--max-new-tokens", length, "--log", str(log)]) == 0
    costs, plan, records = Profile.load(files["costs"]), Solved.load(files["plan"]).plan, run_log.read(log)
    assert main([*arguments, *prompts, "--max-new-tokens", "2", "--no-log"]) == 0
    assert run_log.read(log) == records and len(records) == 3
    for record in records:
        assert len(record.prompt_lens) == len(record.output_lens) == 3
        assert [stage.device for stage in record.stages] == [costs.tables[stage.name].device for stage in record.stages]
        expected = planner.simulate(plan, open_model(str(model)).spec, costs, record.prompt_lens, record.output_lens)
        assert record.predicted == expected.prediction
        for i, stage in enumerate(record.stages):
            for found, phase in ((stage.prefill, "prefill"), (stage.decode, "decode")):
                assert (found.steps, found.predicted_s) == (
                    busy(expected.spans, i, phase).steps,
                    busy(expected.spans, i, phase).seconds,
                )
                assert found.measured_s > 0
    capfd.readouterr()
    assert main(["profile", "--refit", files["costs"], "--log", str(log), "--out", str(refitted)]) == 0
    assert Profile.load(refitted) == refitting.refit(costs, records) != costs
    out = capfd.readouterr().out
    assert "cpu0" in out and "small" in out and "needed" not in out
    corrected = [*arguments[:-2], str(refitted), "--quiet"]
    assert main([*corrected, *prompts, "--max-new-tokens", "4", "--log", str(log)]) == 0
    assert run_log.read(log)[-1].stages[0].scale == Profile.load(refitted).tables[records[0].stages[0].name].scale
    log.write_text(log.read_text().splitlines()[0] + "\n")
    assert main(["profile", "--refit", files["costs"], "--log", str(log), "--out", str(refitted)]) == 0
    assert Profile.load(refitted) == costs
    assert "small is left as it was: it has 1 runs in the log, and 3 are needed" in capfd.readouterr().out


def test_profile_corrects_costs_by_runs_of_its_own(
    model: Path, files: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "calibrated.json"
    arguments = ["profile", "--model", str(model), "--devices", DEVICES, *WORKLOAD, "--activations", "a8x2"]
    assert main([*arguments, "--calibrate", "--out", str(out)]) == 0
    measured, corrected = Profile.load(files["costs"]), Profile.load(out)
    assert corrected.links == measured.links
    for name, table in measured.tables.items():
        assert corrected.tables[name].scale != 1.0 == table.scale
        assert len(corrected.tables[name].rows) == len(table.rows)
    assert "Costs corrected by runs" in capfd.readouterr().out


def test_a_plan_can_be_rehearsed(
    model: Path,
    files: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial_runs, "CLOSE", 1e3)
    out = tmp_path / "plan.json"
    known = ["--costs", files["costs"], "--sensitivity", files["sensitivity"], "--activations", "a8x2"]
    arguments = ["plan", "--model", str(model), "--devices", DEVICES, *known, *WORKLOAD, "--out", str(out)]
    assert main([*arguments, "--rehearse", "2"]) == 0
    assert "rehearsing plan 2 of 2" in capfd.readouterr().err
    plan, planned = Solved.load(out).plan, Solved.load(files["plan"]).plan
    assert plan.cluster == planned.cluster  # with the caps that are enforced


def test_dry_run_plans_and_stops(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--model", str(model), "--devices", DEVICES, "--bits", "4", "--all-devices", "--dry-run"]
    arguments += ["--activations", "a8"]
    assert main([*arguments, "--prompt", "one two", "--max-new-tokens", "8"]) == 0
    out = capfd.readouterr().out
    assert "4x" in out and "in a8" in out and "small" in out and "predicted" in out
    assert "measured" not in out


EXACT = ["--activations", "a16"]


def test_eval_prints_nothing_but_json(files: dict[str, str], model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = []
    modes = (["--activations", mode] for mode in ("a16", "a8x2", "a8"))
    for which in (
        ["--bits", "16"],
        *(["--bits", "8", *mode] for mode in modes),
        ["--plan", files["plan"]],
        ["--bits", "8", "--activations", "a16", "--perplexity-only"],
        ["--kv-bits", "8"],
    ):
        assert main(["eval", "--model", str(model), "--max-tokens", "60", *which]) == 0
        results.append(json.loads(capfd.readouterr().out))
    assert [result.get("activations") for result in results] == ["a16", "a16", "a8x2", "a8", None, "a16", "a16"]
    assert [result.get("kv_bits") for result in results] == [16, 16, 16, 16, None, 16, 8]
    full, exact, near, coarse, planned, alone, cached = (result["perplexity"] for result in results)
    assert alone == pytest.approx(exact, rel=1e-6)
    plan = Solved.load(files["plan"]).plan
    quantized = any(plan.precision(unit) != W16 for unit in ("embedding", *(f"layer.{i}" for i in range(3)), "head"))
    assert [("kl" in result) for result in results] == [False, True, True, True, quantized, False, True]
    for compared in (result for result in results if "kl" in result):
        # The reference keeps keys and values in 32 bits.
        assert compared["reference_perplexity"] == pytest.approx(full, rel=1e-3)
        assert compared["tokens"] == 59 and 0 < compared["kl"] <= compared["kl_999"] and compared["top1_agreement"] > 0
    assert exact == pytest.approx(full, rel=0.02)
    assert full != cached == pytest.approx(full, rel=0.02)
    assert near == pytest.approx(exact, rel=1e-3)
    assert coarse == pytest.approx(exact, rel=0.02)
    assert len({exact, near, coarse}) == 3
    assert planned > 1


def test_eval_compares_a_quantized_folder_with_the_model_that_it_was_made_from(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quantized, original = str(tmp_path / "quantized"), str(model)
    assert main(["quantize", "--model", original, "--bits", "4", "--quantizer", "rtn", "--out", quantized]) == 0
    found = []
    for which in (
        ["--model", original, "--bits", "4"],
        ["--model", quantized, "--bits", "native", "--reference", original],
        ["--model", quantized, "--reference", original],
        ["--model", quantized],
    ):
        capfd.readouterr()
        assert main(["eval", "--max-tokens", "60", *which, *([] if "--bits" not in which else EXACT)]) == 0
        found.append(json.loads(capfd.readouterr().out).get("kl"))
    made, read, floating, alone = found
    assert made == read and floating == pytest.approx(made, rel=0.05) and alone is None
    assert main(["eval", "--model", quantized, "--bits", "native"]) == 2
    assert "name the one that it was made from with --reference" in capfd.readouterr().err
    tiny_models.save_model(tmp_path / "other", "llama-gqa", vocab_size=300)
    assert main(["eval", "--model", original, "--reference", str(tmp_path / "other")]) == 2
    assert "300 tokens" in capfd.readouterr().err
