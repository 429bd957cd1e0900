"""Jobs: killed at any moment and resumed, nothing is lost and nothing is there twice; input is read as it is needed."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmpq.checkpoint.model_files import Model, open_model
from llmpq.cli import job, job_input, job_output
from llmpq.cli.job import Asker, answer_all
from llmpq.cli.job_input import JobInput, Line
from llmpq.cli.job_output import Job, JobOutput
from llmpq.cli.main import main
from llmpq.cli.prompts import read_prompt
from llmpq.report.job_progress import JobProgress
from llmpq.runtime.engine import Engine, SamplingParams
from llmpq.spec import Precision, UsageError
from tests.support import tiny_models
from tests.support.commands import write
from tests.support.pipelines import UNIFORM, load_spec, make_plan, resolve

JOB = Job("a" * 8, "b" * 8)
WEIGHTS = "c" * 8
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows conversations, and a plan with 2 slots of 64 tokens."""
    folder = tmp_path_factory.mktemp("model")
    tiny_models.save_model(folder, "llama-gqa", torch.bfloat16, max_position_embeddings=128)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    plan = make_plan(load_spec(resolve(str(folder))), [3], 2, 2, slots=2, max_length=64, precisions=UNIFORM)
    plan.save(folder / "plan.json")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return open_model(str(folder))


def command(folder: Path, prompts: str | Path, output: Path, *more: str) -> list[str]:
    known = ["--model", str(folder), "--plan", str(folder / "plan.json"), "--no-chat", "--max-new-tokens", "40"]
    return ["run", *known, "--prompts", str(prompts), "--output", str(output), "--quiet", *more]


def jsonl(path: Path, values: list[Any]) -> Path:
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results by their places, without what differs from run to run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if (response := line.get("response")) is not None:
            assert response["status_code"] == 200 and response["request_id"].startswith("req-")
            assert response["body"].pop("id")[-24:] == response.pop("request_id")[-24:]
            assert abs(response["body"].pop("created") - time.time()) < 3600
    return sorted(lines, key=lambda line: (int(line["id"].partition("-")[0]), line.get("choice", 0)))


# ---- the file of results ----


def written(path: Path, *numbers: int, answers: int = 1, resume: bool = False) -> None:
    with JobOutput(str(path), resume) as output:
        output.check(JOB, "in.jsonl")
        output.begin(WEIGHTS)
        for number in numbers:
            assert not output.has(number, line(number))
            output.write(number, line(number), [{"choice": i, "error": None} for i in range(answers)])


def line(number: int) -> bytes:
    return b"prompt %d" % number


def done(path: Path, count: int) -> list[int]:
    with JobOutput(str(path), resume=True) as output:
        output.check(JOB, "in.jsonl")
        return [number for number in range(count) if output.has(number, line(number))]


def test_cut_anywhere_a_file_has_what_was_whole_and_goes_on(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    written(whole, 1, 0, 3, answers=2)
    data = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")][1::2]
    for size in range(len(data) + 1):
        cut.write_bytes(data[:size])
        known = sorted([1, 0, 3][: sum(end <= size for end in ends)])
        assert done(cut, 4) == known
        if size % 50 in (0, 49):
            assert cut.stat().st_size == size  # looking changes nothing
            written(cut, *sorted({0, 1, 3} - set(known)), answers=2, resume=True)
            assert done(cut, 4) == [0, 1, 3] and cut.stat().st_size == len(data)


def test_a_file_that_is_not_this_jobs_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    written(path, 0, 1)
    before = path.read_bytes()

    def refused(words: str, job: Job = JOB, resume: bool = True, count: int = 2, data: bytes = line(1)) -> None:
        with pytest.raises(UsageError, match=words), JobOutput(str(path), resume) as output:
            output.check(job, "in.jsonl")
            output.has(1, data)
            output.check_count(count)

    refused("--resume goes on with a job, or name another --output", resume=False)
    refused("has results of another model", Job("f" * 8, JOB.options))
    refused("was begun with other sampling options or --no-chat", Job(JOB.model, "f" * 8))
    refused("the result of another prompt than number 2 of in.jsonl", data=b"another")
    refused("has results of 2 prompts, and in.jsonl only 1", count=1)
    with JobOutput(str(path), resume=True), pytest.raises(UsageError, match="another run writes"):
        JobOutput(str(path), resume=True)
    with JobOutput(str(path), resume=True) as output:
        output.check(JOB, "in.jsonl")
        assert not output.begin("f" * 8)  # other weights, which the user is told of
    assert path.read_bytes() == before
    path.write_bytes(before + before[: before.index(b"\n") + 1])
    refused("line 3 is a second result of prompt 1")
    for foreign in ('{"text": "mine"}', json.dumps({"id": f"0-{JOB.model}-{JOB.options}-{WEIGHTS}-{'z' * 16}"})):
        path.write_text(f"{foreign}\n")
        refused("line 1 is no result of a job")


def test_of_two_jobs_that_begin_a_file_the_later_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with JobOutput(str(path), resume=True) as later:
        written(path, 0, 1)
        before = path.read_bytes()
        later.check(JOB, "in.jsonl")
        with pytest.raises(UsageError, match="another run has begun"):
            later.begin(WEIGHTS)
    assert path.read_bytes() == before


# ---- whole jobs ----


def test_results_come_in_the_form_of_their_lines_and_are_whole_again_after_a_cut(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, output = jsonl(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    options = command(folder, prompts, output, "--temperature", "0")
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
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On standard input, of which nothing is known before it is read."""
    output, spec = tmp_path / "out.jsonl", load_spec(resolve(str(folder)))
    other = tmp_path / "other.json"
    make_plan(spec, [3], 2, 2, slots=2, max_length=64, precisions=(Precision(8, None),)).save(other)

    def run(prompts: int, *more: str, temperature: str = "1.5", plan: Path = folder / "plan.json") -> int:
        given = io.TextIOWrapper(io.BytesIO(b'"same"\n' * prompts))
        monkeypatch.setattr(sys, "stdin", given)
        options = command(folder, "-", output, "--temperature", temperature, "--seed", "5", *more)
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
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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
        assert main(command(folder, prompts, output)) == 2
    size = output.stat().st_size
    assert capfd.readouterr().err == (
        f"llmpq: cannot write {output} beyond byte {size}: No space left on device; what is done is in it, and "
        "--resume goes on\n"
    )
    assert len(read(output)) == 2
    assert main(command(folder, prompts, output, "--resume")) == 0
    assert [each["index"] for each in read(output)] == list(range(5))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.full)])
def test_killed_and_resumed_a_job_is_as_if_nothing_had_been(kills: int, folder: Path, tmp_path: Path) -> None:
    lines = [
        {"custom_id": str(i), "body": {"prompt": f"{i} " * (1 + i % 5)}} if i % 3 else {"prompt": f"p {i}"}
        for i in range(40 * kills)
    ]
    prompts, output, whole = jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    assert main(command(folder, prompts, whole)) == 0
    chance = random.Random(kills)
    resumed = [sys.executable, "-m", "llmpq", *command(folder, prompts, output, "--resume")]
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
    assert main(command(folder, prompts, output, "--resume")) == 0
    assert read(output) == read(whole)


@pytest.mark.slow
def test_a_worker_that_is_lost_ends_a_job_that_waits_for_its_input(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "llmpq", *command(folder, "-", output)],
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


# ---- what is in memory ----


@pytest.mark.parametrize("resumed", [False, True])
def test_of_a_long_input_no_more_is_in_memory_than_of_a_short_one(
    resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_input, "SAMPLE", 50)

    def peak(count: int) -> int:
        prompts, path = tmp_path / f"in-{count}.jsonl", tmp_path / f"out-{count}.jsonl"
        prompts.write_text("".join(f'"{i:09} {"x" * 100}"\n' for i in range(count)))
        if resumed:
            with JobOutput(str(path), resume=False) as output:
                output.check(JOB, "in")
                output.begin(WEIGHTS)
                for each in job_input._lines(str(prompts)):
                    output.write(each.number, each.data, [{"error": None}])
        gc.collect()
        gc.freeze()  # or garbage waits the longer, the more objects others have left in this process
        tracemalloc.start()
        with JobOutput(str(path), resume=resumed) as output:
            output.check(JOB, "in")
            given = JobInput(str(prompts), output, planned=False)
            left = sum(1 for _ in given)
            assert (given.total, given.count, left) == (count, count, 0 if resumed else count)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        gc.unfreeze()
        return most

    few, many = peak(300), peak(30_000)
    assert many - few < (16 * 30_000 if resumed else 20_000)  # 8 bytes for each prompt that is done


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    plan = make_plan(model.spec, [3], 2, 2, slots=2, max_length=64, precisions=UNIFORM)
    with Engine(plan, model.checkpoint, model.spec) as engine:
        yield engine


def hand_in(engine: Engine, model: Model, lines: Iterator[Line], output: JobOutput, max_tokens: int) -> None:
    options = Namespace(plan="plan.json", no_chat=True, max_new_tokens=None)
    asker = Asker(model, engine.plan, SamplingParams(max_tokens=max_tokens, ignore_eos=True), options)
    output.check(JOB, "in")
    output.begin(WEIGHTS)
    with engine.session() as session:
        answer_all(lines, asker, session, output, JobProgress(0, None, quiet=True), 4)


def test_a_job_reads_no_further_ahead_than_it_has_requests_in_flight(engine: Engine, model: Model) -> None:
    most_ahead = 0

    def lines(count: int) -> Iterator[Line]:
        nonlocal most_ahead
        for number in range(count):
            most_ahead = max(most_ahead, number + 1 - output.done)
            yield Line(number, f"line {number + 1}", b'{"prompt": "a"}')

    for count in (20, 400):
        with JobOutput("/dev/null", resume=False) as output:
            hand_in(engine, model, lines(count), output, max_tokens=2)
            assert output.answered == count
        assert 1 < most_ahead <= 4 + 2  # one is read, and the result of another may be on its way into the file


def test_what_is_cancelled_is_not_done(engine: Engine, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"

    def lines() -> Iterator[Line]:
        for number in range(5):
            yield Line(number, "", b'{"prompt": "a"}')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), JobOutput(str(path), resume=False) as output:
        hand_in(engine, model, lines(), output, max_tokens=60)
    assert 1 <= len(found := read(path)) < 5 and {line["finish_reason"] for line in found} == {"length"}


# ---- what a plan is made for, and what is told meanwhile ----


def test_what_has_no_room_in_a_plan_for_the_first_lines_is_told_how_to_get_it(model: Model) -> None:
    plan = make_plan(model.spec, [3], 2, 2, slots=2, max_length=20, precisions=UNIFORM)

    def ask(value: Any, **options: Any) -> int:
        given = {"plan": None, "no_chat": True, "max_new_tokens": None, **options}
        asker = Asker(model, plan, SamplingParams(), Namespace(**given))
        line = Line(7, "in, line 8", json.dumps(value).encode())
        return asker.batch(line, asker.prompt(line)).completions.sampling[0].max_tokens

    assert ask("x" * 19) == 64  # the default only limits an answer
    with pytest.raises(UsageError, match=r"line 8 has 20 tokens, .* in the plan's slots \(--max-length makes larger"):
        ask("x" * 20)
    with pytest.raises(UsageError, match="no room for 2 more in"):
        ask({"prompt": "x" * 19, "max_tokens": 2})
    with pytest.raises(UsageError, match="no room for 64 more in the plan's slots of 20"):
        ask("x" * 19, max_new_tokens=64, plan="plan.json")


def test_a_plan_is_made_for_the_first_lines_and_the_longest(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_input, "SAMPLE", 3)
    monkeypatch.setattr(job_input, "LONGEST", 1)
    source = write(tmp_path, "in.jsonl", "".join(f'"{"x" * length}"\n' for length in (3, 5, 4, 1, 30, 9)))
    with JobOutput(str(tmp_path / "out"), resume=False) as output:
        output.check(JOB, "in")
        given = JobInput(source, output, planned=False)
    prompts = [read_prompt(line.data, line.where) for line in given.sample]
    assert [len(prompt.text) for prompt in prompts] == [3, 5, 4, 30]
    batch = job.Batch(prompts, SamplingParams(max_tokens=8), model)

    def workload(max_length: int | None) -> tuple[int, int]:
        made = job._workload(Namespace(max_length=max_length, batch_size=None), model, batch)
        return made.max_length, made.batch_size

    assert workload(None) == (39, 4) and workload(50) == (50, 4)  # one token begins a text
    batch.refuse_longer(20, "--max-length")
    assert workload(20) == (20, 3)


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
