"""What jobs keep in their files and in memory, and what of their input a plan is made for."""

from __future__ import annotations

import gc
import json
import tracemalloc
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmpq.checkpoint.model_files import Model, open_model
from llmpq.cli import job, job_input
from llmpq.cli.job import Asker, answer_all
from llmpq.cli.job_input import JobInput, Line
from llmpq.cli.job_output import Job, JobOutput
from llmpq.cli.prompts import read_prompt
from llmpq.report.job_progress import JobProgress
from llmpq.runtime.engine import Engine, SamplingParams
from llmpq.spec import UsageError
from tests.support.commands import write
from tests.support.jobs import read
from tests.support.pipelines import UNIFORM, make_plan

JOB = Job("a" * 8, "b" * 8)
WEIGHTS = "c" * 8


@pytest.fixture(scope="module")
def model(job_folder: Path) -> Model:
    return open_model(str(job_folder))


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
    assert many - few < (16 * 30_000 if resumed else 100_000)  # 8 bytes for each that is done; all are 3 MB


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


# ---- what a plan is made for ----


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
