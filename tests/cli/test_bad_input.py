"""What the command line says of bad input and of what is lost: one line and the right exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from llmpq.cli.main import main
from llmpq.spec import Precision, Report
from tests.support import tiny_models
from tests.support.commands import DEVICES, WORKLOAD, write


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
    online = ["plan", *tiny, "--devices", DEVICES, "--out", str(tmp_path / "p"), "--rate"]
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
        "a rate alone": ([*online, "2"], "--rate takes --max-ttft"),
        "no rate": ([*online, "0", "--max-ttft", "1"], "neither a number above 0 nor max"),
        "a rate that is rehearsed": ([*online, "max", "--max-ttft", "1", "--rehearse", "2"], "with --rehearse"),
        "activations beside a plan": (["eval", *tiny, "--plan", files["plan"], "--activations", "a8"], "--activations"),
        "a cache beside a plan": (["eval", *tiny, "--plan", files["plan"], "--kv-bits", "8"], "--kv-bits"),
        "no one cache to measure": (
            ["eval", *tiny, "--kv-bits", "auto"],
            "--kv-bits auto leaves open what",
        ),
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
    for option, value in (("--bits", "5"), ("--activations", "a4"), ("--kv-bits", "4")):
        assert main(["run", option, value]) == 2
        (message,) = capfd.readouterr().err.splitlines()
        assert message.startswith("llmpq: ") and option in message and value in message
        assert message.endswith("see `llmpq run --help`")


def test_runs_unchanged_under_torchrun_with_prompts_from_stdin(
    files: dict[str, str], model: Path, tmp_path: Path
) -> None:
    prompts = ["one two", "three", "four five six"]  # more than the plan's two slots
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    file, alone, distributed = write(tmp_path, "in.jsonl", lines), tmp_path / "alone.json", tmp_path / "torchrun.json"
    arguments = ["--model", str(model), "--plan", files["plan"], "--max-new-tokens", "4", "--quiet"]
    assert main(["run", *arguments, "--prompts", file, "--json-out", str(alone)]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "llmpq.run", *arguments, "--prompts", "-", "--json-out", str(distributed)]
    result = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("> ") >= 3
    outputs = Report.load(distributed).outputs
    assert [output.prompt for output in outputs] == prompts
    assert outputs == Report.load(alone).outputs


def test_random_weights_need_a_configuration_only(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    report = tmp_path / "report.json"
    arguments = ["--model", str(tmp_path), "--load-format", "dummy", "--devices", "cpu", "--prompt", "abc", "--quiet"]
    options = ["--bits", "4", "--activations", "a8", "--kv-bits", "8", "--max-new-tokens", "3"]
    assert main(["run", *arguments, *options, "--json-out", str(report)]) == 0
    result = Report.load(report)
    assert len(result.outputs[0].token_ids) == 3
    assert result.plan.precision("head") == Precision(4, 32)
    assert (result.plan.stages[0].activations, result.plan.stages[0].kv_bits) == ("a8", 8)


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
    files: dict[str, str],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cache, plan, answers = tmp_path / "cache", str(tmp_path / "plan.json"), []
    known = ["--model", str(model), "--costs", files["costs"]]
    widths = ["--devices", DEVICES, "--all-devices", "--bits", "4", "--activations", "a8x2"]
    assert main(["plan", *known, *widths, *WORKLOAD, "--sensitivity", files["sensitivity"], "--out", plan]) == 0
    arguments = [*known, "--plan", plan, "--prompt", "one", "--quiet"]
    monkeypatch.setenv("LLMPQ_CACHE", str(cache))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    capfd.readouterr()
    for damage in (False, True, False):
        weights = sorted(cache.glob("quantized/*/qweight.npy"))
        for path in weights if damage else ():
            path.write_bytes(path.read_bytes()[:-8])
        command = ["run", *arguments, "--output", str(tmp_path / "out.jsonl")]
        if damage:  # in a process of its own: in this one pytest takes what is logged
            subprocess.run([sys.executable, "-m", "llmpq", *command], env=environment, check=True)
        else:
            assert main(command) == 0
        said = f"the cache {cache} holds damaged results; they are made anew\n" if damage else ""
        assert capfd.readouterr().err == said
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
