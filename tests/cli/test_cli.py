"""The command line from end to end on a tiny model, and what it says of bad input: one line and the right exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import planner
from llmpq.checkpoint.model_files import open_model
from llmpq.cli.main import main
from llmpq.spec import W16, Precision, Profile, Report, Sensitivity, Solved, busy
from llmpq.tuning import refitting, run_log, trial_runs
from tests.support import tiny_models

DEVICES = "cpu:memory=64MiB;cpu:isa=portable,memory=64MiB,name=small"
WORKLOAD = ["--prompt-len", "12", "--output-len", "8", "--batch-size", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.save_model(folder, "llama-gqa", torch.bfloat16, max_position_embeddings=128)
    return folder


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What profile, sensitivity and plan write."""
    folder = tmp_path_factory.mktemp("files")
    paths = {name: str(folder / f"{name}.json") for name in ("costs", "sensitivity", "plan")}
    common = ["--model", str(model)]
    mode = ["--activations", "a8x2"]
    assert main(["profile", *common, "--devices", DEVICES, *mode, *WORKLOAD, "--out", paths["costs"]]) == 0
    assert main(["sensitivity", *common, "--out", paths["sensitivity"]]) == 0
    known = ["--costs", paths["costs"], "--sensitivity", paths["sensitivity"]]
    devices = ["--devices", DEVICES, "--all-devices"]
    assert main(["plan", *common, *devices, *known, *mode, *WORKLOAD, "--out", paths["plan"]]) == 0
    return paths


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
    prompts = ["--prompt", "one two", "--prompt", "three", "--prompt", "four"]  # two waves
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
    ):
        assert main(["eval", "--model", str(model), "--max-tokens", "60", *which]) == 0
        results.append(json.loads(capfd.readouterr().out))
    assert [result.get("activations") for result in results] == ["a16", "a16", "a8x2", "a8", None, "a16"]
    full, exact, near, coarse, planned, alone = (result["perplexity"] for result in results)
    assert alone == pytest.approx(exact, rel=1e-6)
    plan = Solved.load(files["plan"]).plan
    quantized = any(plan.precision(unit) != W16 for unit in ("embedding", *(f"layer.{i}" for i in range(3)), "head"))
    assert [("kl" in result) for result in results] == [False, True, True, True, quantized, False]
    for compared in (result for result in results if "kl" in result):
        assert compared["reference_perplexity"] == pytest.approx(full, rel=1e-6)
        assert compared["tokens"] == 59 and 0 < compared["kl"] <= compared["kl_999"] and compared["top1_agreement"] > 0
    assert exact == pytest.approx(full, rel=0.02)
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
        ["--model", quantized, "--bits", "native"],
    ):
        capfd.readouterr()
        assert main(["eval", "--max-tokens", "60", *which, *([] if "--bits" not in which else EXACT)]) == 0
        found.append(json.loads(capfd.readouterr().out).get("kl"))
    made, read, floating, alone, itself = found
    assert made == read and floating == pytest.approx(made, rel=0.05) and alone is None
    assert itself == pytest.approx(0, abs=1e-3) and made > 10 * itself
    tiny_models.save_model(tmp_path / "other", "llama-gqa", vocab_size=300)
    assert main(["eval", "--model", original, "--reference", str(tmp_path / "other")]) == 2
    assert "300 tokens" in capfd.readouterr().err


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_bad_input_is_one_line_and_exit_code_2(
    files: dict[str, str], model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    unknown = tmp_path / "unknown"
    tiny_models.save_model(unknown, "llama-gqa", torch.bfloat16)
    write(unknown, "config.json", json.dumps({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
    other = tmp_path / "other"
    tiny_models.save_model(other, "llama-mha", torch.bfloat16)
    truncated = tmp_path / "truncated"
    tiny_models.save_model(truncated, "llama-gqa", torch.bfloat16)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    plan = json.loads(Path(files["plan"]).read_text())["plan"]
    bare = write(tmp_path, "bare.json", json.dumps(plan))
    longest = max(range(2), key=lambda i: len(plan["stages"][i]["precisions"]))  # a stage may have the LM head alone
    plan["stages"][longest]["precisions"][0] = "w5-g32-sym-rtn"
    newer = dict(plan, schema="llmpq.plan/99")
    tiny = ["--model", str(model)]
    cases = {
        "no such model": (["run", "--model", str(tmp_path / "nowhere")], "nowhere"),
        "unknown architecture": (["run", "--model", str(unknown)], "MambaForCausalLM"),
        "truncated weights": (["run", "--model", str(truncated)], "model.safetensors"),
        "plan of another model": (["run", "--model", str(other), "--plan", files["plan"]], "another model"),
        "plan with a wrong field": (
            ["run", *tiny, "--plan", write(tmp_path, "bits.json", json.dumps(plan))],
            f"stages[{longest}].precisions[0]",
        ),
        "plan of a newer version": (
            ["run", *tiny, "--plan", write(tmp_path, "newer.json", json.dumps(newer))],
            "llmpq.plan/99",
        ),
        "no such plan": (["run", *tiny, "--plan", str(tmp_path / "none.json")], "none.json"),
        "not JSON": (["run", *tiny, "--plan", write(tmp_path, "text.json", "hello")], "not JSON"),
        "no prompts": (["run", *tiny, "--prompts", write(tmp_path, "empty.jsonl", "\n")], "no prompts"),
        "malformed prompts": (
            ["run", *tiny, "--prompts", write(tmp_path, "bad.jsonl", '{"text": 1}\n\n[]\n')],
            "none of 2 prompts can be run; the first: ",
        ),
        "empty prompt": (["run", *tiny, "--prompt", " "], "prompt 1 is empty"),
        "long prompt": (["run", *tiny, "--prompt", "x" * 200], "128 tokens"),
        "unwritable output": (["run", *tiny, "--json-out", str(tmp_path / "no" / "r.json")], "r.json"),
        "unwritable page": (["explain", *tiny, files["plan"], "--html", str(tmp_path / "no" / "p.html")], "p.html"),
        "explained without a prediction": (["explain", *tiny, bare], "bare.json predicts nothing"),
        "devices": (["run", *tiny, "--devices", "tpu:0"], "tpu"),
        "device option": (["run", *tiny, "--devices", "cpu:memory=lots"], "lots"),
        "bits": (["run", *tiny, "--bits", "3", "--min-bits", "4"], "--min-bits"),
        "activations beside a plan": (["eval", *tiny, "--plan", files["plan"], "--activations", "a8"], "--activations"),
        "sampling": (["run", *tiny, "--temperature", "-1"], "temperature"),
        "no log": (
            ["profile", "--refit", files["costs"], "--log", str(tmp_path / "no.log"), "--out", str(tmp_path / "c")],
            "no.log",
        ),
        "log unused": (["profile", *tiny, "--devices", "cpu", "--log", "x", "--out", str(tmp_path / "c")], "--refit"),
        "refit of nothing measured": (
            ["profile", "--refit", files["costs"], "--prompt-len", "8", "--out", str(tmp_path / "c")],
            "--prompt-len",
        ),
        "broken log": (
            [
                "profile",
                "--refit",
                files["costs"],
                "--log",
                write(tmp_path, "x.log", "{}\n"),
                "--out",
                str(tmp_path / "c"),
            ],
            "x.log: line 1: schema",
        ),
        "no text": (["eval", *tiny, "--text", str(tmp_path / "no.txt")], "no.txt"),
    }
    for name, (arguments, expected) in cases.items():
        assert main(arguments) == 2, name
        message = capfd.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("llmpq: ") and expected in message, (name, message)


def test_too_little_memory_is_exit_code_3_and_says_how_much(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    devices = "cpu:memory=8MiB,name=tiny"
    assert main(["run", "--model", str(model), "--devices", devices, "--prompt", "one", "--max-new-tokens", "8"]) == 3
    message = capfd.readouterr().err
    assert re.search(r"tiny lacks [\d.]+ [KMG]iB", message), message
    assert re.search(r"\n  \d+ % more memory on every device would do \([\d.e+]+ tokens/s\)", message), message


def test_usage_errors_are_one_line_and_exit_code_2(capfd: pytest.CaptureFixture[str]) -> None:
    for option, value in (("--bits", "5"), ("--activations", "a4")):
        assert main(["run", option, value]) == 2
        (message,) = capfd.readouterr().err.splitlines()
        assert message.startswith("llmpq: ") and option in message and value in message
        assert message.endswith("see `llmpq run --help`")


def test_runs_unchanged_under_torchrun_with_prompts_from_stdin(
    files: dict[str, str], model: Path, tmp_path: Path
) -> None:
    prompts = ["one two", "three", "four five six"]  # more than the plan's two slots: they run in waves
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    arguments = ["-m", "llmpq.run", "--model", str(model), "--plan", files["plan"], "--prompts", "-"]
    arguments += ["--max-new-tokens", "4", "--quiet", "--json-out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    reports = []
    for name, launcher in (("alone", [sys.executable]), ("torchrun", torchrun)):
        report = tmp_path / f"{name}.json"
        command = [*launcher, *arguments, str(report)]
        result = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("> ") >= 3
        reports.append(Report.load(report))
    alone, distributed = reports
    assert [o.prompt for o in distributed.outputs] == prompts
    assert distributed.outputs == alone.outputs


def test_random_weights_need_a_configuration_only(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    report = tmp_path / "report.json"
    arguments = ["--model", str(tmp_path), "--load-format", "dummy", "--devices", "cpu", "--prompt", "abc", "--quiet"]
    options = ["--bits", "4", "--activations", "a8", "--max-new-tokens", "3", "--json-out", str(report)]
    assert main(["run", *arguments, *options]) == 0
    result = Report.load(report)
    assert len(result.outputs[0].token_ids) == 3
    assert result.plan.precision("head") == Precision(4, 32)
    assert result.plan.stages[0].activations == "a8"


def test_a_cap_below_what_the_plan_needs_is_exit_code_4(
    files: dict[str, str], model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = json.loads(Path(files["plan"]).read_text())["plan"]
    for device in plan["cluster"]["devices"]:
        device["memory_bytes"] = 4096
    arguments = ["--model", str(model), "--plan", write(tmp_path, "plan.json", json.dumps(plan)), "--prompt", "one"]
    assert main(["run", *arguments, "--max-new-tokens", "4", "--quiet"]) == 4
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("llmpq: ") and "cap" in message and "MiB" in message


def children(pid: int) -> dict[int, str]:
    """Process ids and command lines of a process's children."""
    found = subprocess.run(
        ["ps", "-ww", "-o", "pid=", "-o", "args=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout
    return {int(line.split()[0]): line for line in found.splitlines()}


def test_costs_of_another_kind_of_device_are_refused(
    files: dict[str, str], model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    known = ["--costs", files["costs"], "--sensitivity", files["sensitivity"], "--out", str(tmp_path / "plan.json")]
    for device, wanted in (
        ("cpu:slowdown=2", r"1 threads, \w+ and a slowdown of 1, but it has 1 threads, .* and a slowdown of 2"),
        ("cpu:threads=2", r"1 threads, \w+ and a slowdown of 1, but it has 2 threads"),
        ("cpu:name=small,isa=avx2", r"the costs of small .* 1 threads, portable .* has 1 threads, avx2 "),
    ):
        assert main(["plan", "--model", str(model), "--devices", device, *known, *WORKLOAD]) == 2
        error = capfd.readouterr().err
        assert re.search(wanted, error), error


def test_a_log_that_cannot_be_written_is_refused_before_anything_is_done(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    nowhere = ["run", "--model", str(tmp_path / "nowhere"), "--quiet"]  # what is wrong if the log is not
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "runs.jsonl").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    named = str(tmp_path / "no" / "x.jsonl")
    for more, message in (
        (["--log", str(tmp_path)], "it is a folder; name another --log, or --no-log"),
        (["--log", named], f"cannot write {named}: there is no folder .*; name another --log, or --no-log"),
        (["--no-log"], "nowhere"),
        (["--dry-run"], "nowhere"),
    ):
        assert main([*nowhere, *more]) == 2
        error = capfd.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1
        assert ("--no-log" in error) == ("--no-log" in message)
    for folder, why in (("cache", "Is a directory"), ("file/cache", "Not a directory")):
        caplog.clear()
        monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / folder))
        assert main(nowhere) == 2
        assert "nowhere" in capfd.readouterr().err
        (line,) = caplog.messages
        assert line.startswith(f"cannot write {tmp_path / folder / 'runs.jsonl'}: {why}; this run is not logged.")


@pytest.mark.slow
def test_a_run_with_a_damaged_cache_says_so_in_one_line_and_writes_the_same(
    files: dict[str, str], model: Path, tmp_path: Path
) -> None:
    cache, plan, answers = tmp_path / "cache", str(tmp_path / "plan.json"), []
    known = ["--model", str(model), "--costs", files["costs"]]
    widths = ["--devices", DEVICES, "--all-devices", "--bits", "4", "--activations", "a8x2"]
    assert main(["plan", *known, *widths, *WORKLOAD, "--sensitivity", files["sensitivity"], "--out", plan]) == 0
    arguments = [*known, "--plan", plan, "--prompt", "one", "--quiet"]
    for damage in (False, True, False):
        weights = sorted(cache.glob("quantized/*/qweight.npy"))
        for path in weights if damage else ():
            path.write_bytes(path.read_bytes()[:-8])
        run = subprocess.run(
            [sys.executable, "-m", "llmpq.run", *arguments, "--output", str(tmp_path / "out.jsonl")],
            env={**os.environ, "LLMPQ_CACHE": str(cache), "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        said = f"the cache {cache} holds damaged results; they are made anew\n" if damage else ""
        assert (run.returncode, run.stderr) == (0, said)
        answers.append((tmp_path / "out.jsonl").read_text())
        assert {path.name for path in tmp_path.iterdir()} == {"cache", "plan.json", "out.jsonl"}
    assert len(weights) > 4 and answers[0] == answers[1] == answers[2]


def test_a_lost_worker_is_exit_code_5_and_leaves_no_process(files: dict[str, str], model: Path) -> None:
    arguments = ["--model", str(model), "--plan", files["plan"], "--prompt", "one", "--prompt", "two", "--quiet"]
    run = subprocess.Popen(
        [sys.executable, "-m", "llmpq.run", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    workers: dict[int, str] = {}
    until = time.monotonic() + 60
    while len(workers) < 2 and run.poll() is None and time.monotonic() < until:
        workers = {pid: line for pid, line in children(run.pid).items() if "llmpq.runtime.worker" in line}
        time.sleep(0.05)
    victim = next(pid for pid, line in workers.items() if "--rank 1" in line)
    os.kill(victim, signal.SIGKILL)
    struck = time.monotonic()
    _, err = run.communicate(timeout=60)
    assert run.returncode == 5, err
    assert time.monotonic() - struck < 15
    assert "stage 1" in err and str(victim) in err and "SIGKILL" in err and "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
