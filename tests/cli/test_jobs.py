"""Jobs: killed at any moment and resumed, nothing is lost and nothing is there twice."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmpq.cli import job_output
from llmpq.cli.main import main
from llmpq.report.job_progress import JobProgress
from llmpq.runtime.engine import Engine
from llmpq.spec import Precision
from tests.support.jobs import command, jsonl, read
from tests.support.pipelines import load_spec, make_plan, resolve

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
LINES = [
    {"prompt": "one"},
    {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": CHAT},
    {"custom_id": "text", "body": {"prompt": "go", "max_tokens": 3, "n": 2, "seed": 5, "logprobs": 1}},
    {"custom_id": "wrong", "body": {"prompt": "go", "tools": [1]}},
    "not JSON",
    {"prompt": "x" * 70},
    {"prompt": "two", "n": 3, "temperature": 2, "seed": 1},
    {"prompt": "one"},
]


def test_results_come_in_the_form_of_their_lines_and_are_whole_again_after_a_cut(
    job_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, output = jsonl(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    options = command(job_folder, prompts, output, "--temperature", "0")
    options.remove("--no-chat")
    assert main(options) == 6
    found = read(output)
    assert capfd.readouterr().err.splitlines()[-1].startswith("llmpq: 3 of 8 prompts were not answered; the first: ")
    assert [(each.get("index"), each.get("custom_id")) for each in found] == [
        *((0, None), (None, "chat"), (None, "text"), (None, "wrong"), (4, None), (5, None)),
        *[(6, None)] * 3,
        (7, None),
    ]
    chat, text = found[1]["response"]["body"], found[2]["response"]["body"]
    assert chat["object"] == "chat.completion" and chat["usage"]["total_tokens"] == len("hi;") + 3
    (choice,) = chat["choices"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length"
    assert [len(told["top_logprobs"]) for told in choice["logprobs"]["content"]] == [2] * 3
    assert text["object"] == "text_completion" and [each["index"] for each in text["choices"]] == [0, 1]
    assert text["choices"][0]["seed"] == 5 and text["usage"]["prompt_tokens"] == 2
    assert [len(each["logprobs"]["tokens"]) for each in text["choices"]] == [3, 3]
    assert found[3]["response"] is None and "tools is not supported" in found[3]["error"]["message"]
    assert "expected a JSON object" in found[4]["error"] and "has 71 tokens" in found[5]["error"]
    assert [each["choice"] for each in found[6:9]] == [0, 1, 2] and found[0]["text"] == found[9]["text"]

    assert main(options) == 2  # it would be overwritten
    assert "holds something; --resume goes on with a job" in capfd.readouterr().err
    kept = output.read_bytes()
    with monkeypatch.context() as patch:
        patch.delattr(Engine, "__init__")  # nothing is left to do
        assert main([*options, "--resume"]) == 6 and output.read_bytes() == kept
    ends = kept.splitlines(keepends=True)
    output.write_bytes(b"".join(ends[:-2]) + ends[-1][:30])
    assert main([*options, "--resume"]) == 6 and read(output) == found
    output.write_bytes(b"".join(each for each in ends if b"not supported" not in each))
    assert main([*options, "--resume"]) == 6 and read(output) == found  # no request at all is left
    assert "llmpq: 3 of 8 prompts were not answered" in capfd.readouterr().err


@pytest.mark.slow
def test_a_job_says_what_it_did_and_goes_on_as_it_began(
    job_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On standard input, of which nothing is known before it is read."""
    output, spec = tmp_path / "out.jsonl", load_spec(resolve(str(job_folder)))
    other = tmp_path / "other.json"
    make_plan(spec, [3], 2, 2, slots=2, max_length=64, precisions=(Precision(8, None),)).save(other)

    def run(prompts: int, *more: str, temperature: str = "1.5", plan: Path = job_folder / "plan.json") -> int:
        given = io.TextIOWrapper(io.BytesIO(b'"same"\n' * prompts))
        monkeypatch.setattr(sys, "stdin", given)
        options = command(job_folder, "-", output, "--temperature", temperature, "--seed", "5", *more)
        options.remove("--quiet")
        options[options.index("--plan") + 1] = str(plan)
        return main(options)

    assert run(3) == 0
    told = capfd.readouterr()
    assert re.search(r"3 prompts: 3 answered, 0 not; \d+ tokens in [\d.]+ s, [\d,.]+ tokens/s", told.out)
    assert "no chat template: plain continuation" in told.err
    assert len({tuple(each["token_ids"]) for each in read(output)}) == 3  # each has a seed of its own
    assert run(3, "--resume", temperature="1") == 2
    assert "was begun with other sampling options" in capfd.readouterr().err
    assert run(2, "--resume") == 2
    assert "has results of 3 prompts, and standard input only 2" in capfd.readouterr().err
    assert run(4, "--resume", plan=other) == 0 and [each["index"] for each in read(output)] == [0, 1, 2, 3]
    told = capfd.readouterr()
    assert "was begun with other bit widths or activations" in told.err and "4 prompts: 4 answered, 0 not" in told.out
    output.write_bytes(b"".join(each for each in output.read_bytes().splitlines(True) if b'"id": "0-' not in each))
    assert run(2, "--resume", plan=other) == 2  # one was left to do
    assert "has results of 4 prompts, and standard input only 2" in capfd.readouterr().err


def test_a_full_disk_ends_a_job_that_can_go_on(
    job_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, output = jsonl(tmp_path / "in.jsonl", ["a", "b", "c", "d", "e"]), tmp_path / "out.jsonl"
    jsonl(prompts, [json.dumps(text) for text in "abcde"])
    append, room = job_output.append_whole, iter(range(2))

    def full(*arguments: Any) -> int:
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(job_output, "append_whole", full)
        assert main(command(job_folder, prompts, output)) == 2
    size = output.stat().st_size
    assert capfd.readouterr().err == (
        f"llmpq: cannot write {output} beyond byte {size}: No space left on device; what is done is in it, and "
        "--resume goes on\n"
    )
    assert len(read(output)) == 2
    assert main(command(job_folder, prompts, output, "--resume")) == 0
    assert [each["index"] for each in read(output)] == list(range(5))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.full)])
def test_killed_and_resumed_a_job_is_as_if_nothing_had_been(kills: int, job_folder: Path, tmp_path: Path) -> None:
    lines = [
        {"custom_id": str(i), "body": {"prompt": f"{i} " * (1 + i % 5)}} if i % 3 else {"prompt": f"p {i}"}
        for i in range(40 * kills)
    ]
    prompts, output, whole = jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    assert main(command(job_folder, prompts, whole)) == 0
    chance = random.Random(kills)
    resumed = [sys.executable, "-m", "llmpq", *command(job_folder, prompts, output, "--resume")]
    for kill in range(kills):
        process = subprocess.Popen(resumed)
        at_least = output.stat().st_size + 1 if output.exists() else 1
        if kill % 4 == 3:  # while it starts
            time.sleep(chance.uniform(0, 3))
        else:
            while process.poll() is None and (not output.exists() or output.stat().st_size < at_least):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.05))
        assert process.poll() is None, "it was too quick to be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < len(output.read_text().splitlines()) < len(lines)
    assert main(command(job_folder, prompts, output, "--resume")) == 0
    assert read(output) == read(whole)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_hundred_thousand_prompts_take_no_more_memory_than_a_thousand(job_folder: Path, tmp_path: Path) -> None:
    """Of the job's own process, and of its worker."""
    plan = job_folder / "many-slots.json"
    make_plan(
        load_spec(resolve(str(job_folder))), [3], 32, 32, slots=64, max_length=64, precisions=(Precision(8, None),)
    ).save(plan)

    def peak_bytes(count: int) -> int:
        prompts, output = tmp_path / f"{count}.jsonl", tmp_path / f"{count}.out"
        prompts.write_text("".join(f'"{i}"\n' for i in range(count)))
        options = command(job_folder, prompts, output, "--max-new-tokens", "2", "--plan", str(plan))
        job = subprocess.Popen([sys.executable, "-m", "llmpq", *options])
        _, status, used = os.wait4(job.pid, 0)  # and of the processes that it waits for: the largest
        job.returncode = os.waitstatus_to_exitcode(status)
        with output.open() as lines:
            assert job.returncode == 0 and sum(1 for _ in lines) == count
        return 1024 * used.ru_maxrss

    few, many = peak_bytes(1_000), peak_bytes(100_000)
    assert many < few + 2**24


@pytest.mark.slow
def test_a_worker_that_is_lost_ends_a_job_that_waits_for_its_input(job_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "llmpq", *command(job_folder, "-", output)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(b'"a"\n"b"\n')
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not (output.exists() and len(output.read_text().splitlines()) == 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    assert process.wait(30) == 5
    assert process.stderr.read().decode().startswith("llmpq: stage 0 on cpu0")
    process.stdin.close()


def test_progress_tells_speed_and_time_left_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with JobProgress(10, 1010, interval_s=30, clock=lambda: now[0]) as shown:
        for now[0] in (10.0, 29.0, 50.0, 60.0, 81.0):
            shown.add(100)
    assert capsys.readouterr().err.splitlines() == [
        "13 of 1,010 prompts, 6.0 tokens/s, 4 h 37 min left",
        "15 of 1,010 prompts, 6.2 tokens/s, 4 h 29 min left",
    ]
    assert JobProgress(0, None, quiet=True).text == "0 prompts"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--resume"], "--resume is for --prompts with --output"),
        (["--resume", "--prompts", "p", "--output", "o", "--trace", "t"], "with --output, without --trace"),
        (["--max-length", "9", "--prompt", "x"], "--max-length is for --prompts with --output, without --prompt"),
        (["--resume", "--prompts", "p", "--output", "/dev/null"], "--resume reads --output, and /dev/null is no file"),
    ],
    ids=str,
)
def test_what_only_jobs_have_is_refused_elsewhere(
    options: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *options]) == 2
    assert words in capfd.readouterr().err
