"""When a worker fails: the right error, soon, that names it, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmpq.checkpoint.model_files import Checkpoint
from llmpq.runtime import launch, party
from llmpq.runtime.engine import Engine
from llmpq.runtime.launch import Program
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.worker_group import WorkerGroup
from llmpq.spec import DeviceMemoryError, UsageError, WorkerLostError
from llmpq.temporary import TemporaryFolder
from tests.support.pipelines import load_spec, make_plan, random_prompts, tiny_model

pytestmark = pytest.mark.slow

WITHIN_S = 15
LONG = SamplingParams(max_tokens=4000, ignore_eos=True)  # minutes, if nothing happens


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMPQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama-gqa", max_position_embeddings=4096)


def alive(pids: Sequence[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and not is_zombie(pid)]


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: Sequence[int]) -> None:
    until = time.monotonic() + WITHIN_S
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert alive(pids) == []


def long_plan(checkpoint: Checkpoint, **options: int):
    return make_plan(load_spec(checkpoint), [2, 1], 2, 2, max_length=4096, **options)


@pytest.mark.parametrize(
    "name, rank",
    [
        ("SIGKILL", 0),
        ("SIGKILL", 1),
        ("SIGSTOP", 1),
        pytest.param("SIGSTOP", 0, marks=pytest.mark.full),
        pytest.param("SIGSEGV", 0, marks=pytest.mark.full),
        pytest.param("SIGSEGV", 1, marks=pytest.mark.full),
    ],
)
def test_a_worker_lost_in_decode_ends_the_run(
    name: str, rank: int, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "SILENCE_S", 4.0)
    engine = Engine(long_plan(checkpoint), checkpoint, load_spec(checkpoint))
    pids = engine.pids
    lost_at = None

    def strike(generated: int) -> None:
        nonlocal lost_at
        if lost_at is None and generated > 10:  # beyond prefill
            os.kill(pids[rank], getattr(signal, name))
            lost_at = time.monotonic()

    with pytest.raises(WorkerLostError) as caught:
        engine.generate(random_prompts(5, 6, 7), LONG, strike)
    assert lost_at is not None and time.monotonic() - lost_at < WITHIN_S
    assert alive(pids) == []
    message = str(caught.value)
    assert f"stage {rank} on cpu{rank} of {socket.gethostname()} (rank {rank}, pid {pids[rank]})" in message
    assert "has not answered for 4 s" in message if name == "SIGSTOP" else f"was ended by {name}" in message
    assert ("want of memory" in message) == (name == "SIGKILL")
    assert "\n" not in message
    assert engine.closed
    with pytest.raises(WorkerLostError, match="make a new one"):
        engine.generate([[5]], LONG)


def test_an_interrupt_ends_the_workers(checkpoint: Checkpoint) -> None:
    engine = Engine(long_plan(checkpoint), checkpoint, load_spec(checkpoint))
    pids = engine.pids

    def interrupt(generated: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.generate(random_prompts(5, 6, 7), LONG, interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert alive(pids) == []


def test_workers_end_when_their_parent_is_killed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    long_plan(checkpoint).save(plan)
    script = """
import json, sys
from llmpq.checkpoint.model_files import load_spec, resolve
from llmpq.runtime import launch, party
from llmpq.runtime.engine import Engine
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import Plan
checkpoint = resolve(sys.argv[1])
engine = Engine(Plan.load(sys.argv[2]), checkpoint, load_spec(checkpoint))
print(json.dumps(engine.pids), flush=True)
engine.generate([[5, 6, 7]], SamplingParams(max_tokens=4000, ignore_eos=True))
"""
    command = [sys.executable, "-c", script, str(checkpoint.path), str(plan)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pids = json.loads(parent.stdout.readline())
        assert alive(pids) == pids
        parent.kill()
    wait_until_gone(pids)
    assert len(list(tmp_path.glob("llmpq-*/"))) == 2  # of the engine, and of its workers
    with TemporaryFolder(tmp_path) as next_one:
        assert set(tmp_path.glob("llmpq-*/")) == {next_one}


SLOW_START = "import sys, time\nif any('worker' in a for a in sys.orig_argv): time.sleep(5)\n"  # as a cold disk


@pytest.fixture
def slow_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for PYTHONPATH with which workers need seconds before they can be heard of."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_START)
    return tmp_path


def test_a_slow_start_is_no_silence(slow_start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(slow_start)
    monkeypatch.setattr(launch, "SILENCE_S", 1.0)
    started: list[object] = []
    with group("echo", "echo") as workers:
        workers.await_start(lambda step=None, /: started.append(step))
        assert len(started) == 2


def test_a_start_that_takes_too_long_is_said(slow_start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(slow_start)
    monkeypatch.setattr(party, "START_S", 1.0)
    with pytest.raises(WorkerLostError, match=r"worker 0 \(rank 0, pid \d+\) has not started within 1 s"):
        group("echo").receive()


def test_who_is_stopped_before_it_has_started_is_not_waited_for(
    slow_start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(slow_start)
    monkeypatch.setattr(launch, "SILENCE_S", 1.0)
    workers = group("echo", "echo")
    os.kill(workers.workers[1].process.pid, signal.SIGSTOP)
    with pytest.raises(
        WorkerLostError, match=r"worker 1 \(rank 1, pid \d+\) has been stopped for 1 s; it was starting"
    ):
        workers.receive()


IN_A_SCRIPT = """
import sys
from llmpq.runtime import launch, worker_group
launch.SILENCE_S = 2.0
workers = worker_group.WorkerGroup([launch.Program("worker", "tests.support.worker_modes", ("echo",), {})])
print(workers.workers[0].process.pid, flush=True)
"""


def in_a_script(rest: str, *path: Path) -> tuple[subprocess.Popen[str], int]:
    """A process with one worker, and the worker's process id."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *sys.path])}
    command = [sys.executable, "-c", IN_A_SCRIPT + rest]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_worker_ends_with_its_parent_even_before_it_can_listen(slow_start: Path) -> None:
    parent, pid = in_a_script("workers.receive()", slow_start)
    with parent:
        assert alive([pid]) == [pid]
        parent.kill()
    until = time.monotonic() + 3
    while alive([pid]) and time.monotonic() < until:
        time.sleep(0.05)
    assert alive([pid]) == []


@pytest.mark.parametrize("parent_too, seconds", [(True, 3.0), (False, 1.0)])
def test_who_was_stopped_goes_on(parent_too: bool, seconds: float) -> None:
    parent, pid = in_a_script(f"""
from threading import Timer
workers.await_start(lambda: print("started", flush=True))
Timer({seconds + 2.2}, workers.workers[0].send, ["say"]).start()
print(workers.receive()[1]["event"])
""")
    pids = [parent.pid, pid] if parent_too else [pid]
    with parent:
        assert parent.stdout is not None and parent.stdout.readline() == "started\n"
        time.sleep(0.7)  # all that there is to hear has been heard
        for each in pids:
            os.kill(each, signal.SIGSTOP)
        time.sleep(seconds)
        for each in pids:
            os.kill(each, signal.SIGCONT)
            time.sleep(0.5)  # who listens wakes before there is anything to hear
        assert parent.stdout.read() == "echo\n"
    assert parent.returncode == 0


def test_a_worker_does_not_import_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("argparse", "torch", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open('imported', 'a').write('{name}')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.syspath_prepend(tmp_path)
    with group("allocate") as workers, pytest.raises(DeviceMemoryError):
        workers.receive()
    assert not (tmp_path / "imported").exists()


def test_workers_end_with_the_last_reference() -> None:
    workers = group("echo", "echo")
    pids = [worker.process.pid for worker in workers.workers]
    assert alive(pids) == pids
    del workers
    assert alive(pids) == []


@pytest.mark.full
def test_more_devices_than_cores_start(checkpoint: Checkpoint) -> None:
    spec = load_spec(checkpoint)
    with Engine(make_plan(spec, [1, 1, 1, 0, 0, 0, 0, 0], 2, 2), checkpoint, spec) as engine:
        assert len(engine.generate(random_prompts(5, 6), SamplingParams(max_tokens=4)).sequences) == 2


def test_too_small_a_cap_is_an_error_that_names_device_and_need(tmp_path: Path) -> None:
    # 4 MB of embedding and head at least, in either stage, for 1 MiB.
    checkpoint = tiny_model(tmp_path, "llama-gqa", vocab_size=80_000)
    with pytest.raises(
        DeviceMemoryError, match=r"stage \d on cpu\d of .* ran out of memory while .* its cap is 1\.0 MiB"
    ) as e:
        Engine(
            make_plan(load_spec(checkpoint), [2, 1], 2, 2, memory_bytes=2**20), checkpoint, load_spec(checkpoint)
        ).close()
    assert e.value.exit_code == 4


def test_only_the_used_part_of_the_buffers_counts_as_memory(tmp_path: Path) -> None:
    checkpoint = tiny_model(tmp_path, "llama-gqa", intermediate_size=2048, max_position_embeddings=4096)
    spec, cap = load_spec(checkpoint), 24 * 2**20
    assert 4 * 4096 * spec.widest_activations > 2.5 * cap  # a step of a whole slot has no room
    plan = make_plan(spec, [3], 1, 1, slots=1, max_length=4096, memory_bytes=cap)
    with Engine(plan, checkpoint, spec) as engine:
        result = engine.generate(random_prompts(5), SamplingParams(max_tokens=4, ignore_eos=True))
        assert len(result.sequences[0].token_ids) == 4
        assert 0 < result.measured.memory_bytes[0] < cap
        with pytest.raises(DeviceMemoryError, match=r"computing step 5 \(4000 tokens .* its cap is 24\.0 MiB"):
            engine.generate(random_prompts(4000), SamplingParams(max_tokens=1))


def group(*modes: str) -> WorkerGroup:
    return WorkerGroup(
        [Program(f"worker {i}", "tests.support.worker_modes", (mode,), {}) for i, mode in enumerate(modes)]
    )


def test_commands_and_events_of_any_size_arrive_in_order() -> None:
    texts = ["small", "x" * 2**20, "small again"]
    with group("echo") as workers:
        for text in texts:
            workers.workers[0].send("say", text=text)
        assert [workers.receive()[1] for _ in texts] == [
            {"event": "echo", "command": "say", "text": text} for text in texts
        ]


def test_who_begins_again_has_done_nothing_yet() -> None:
    programs = [Program(f"worker {name}", "tests.support.worker_modes", ("echo",), {}, name) for name in "ab"]
    with WorkerGroup(programs) as workers:
        for worker in workers.workers:
            worker.left, worker.busy_s, worker.memory_bytes = True, 3.0, 2**20
        workers.renew(programs[::-1])
        done = [(worker.program.device, worker.rank, worker.busy_s, worker.memory_bytes) for worker in workers.workers]
    assert done == [("b", 0, 0.0, 0), ("a", 1, 0.0, 0)]


@pytest.mark.parametrize("mode", ["allocate", "grow", "renew"])
def test_memory_beyond_the_cap_is_refused(mode: str) -> None:
    with group(mode) as workers, pytest.raises(DeviceMemoryError, match=r"its cap is (64|16)\.0 MiB"):
        workers.receive()


@pytest.mark.parametrize(
    "modes, message",
    [
        (("echo", "exit"), r"worker 1 \(rank 1, pid \d+\) ended with status 7"),
        (("killed", "echo"), r"worker 0 .* was ended by SIGKILL"),
        (("defect", "echo"), "worker 0 .* failed while .*: RuntimeError: a defect"),
        (("defect", "killed"), "worker 1 .* SIGKILL"),
        (("abort", "killed"), "worker 1 .* SIGKILL"),
    ],
    ids=str,
)
def test_the_loss_named_is_the_cause(modes: tuple[str, ...], message: str) -> None:
    workers = group(*modes)
    with pytest.raises(WorkerLostError, match=message):
        workers.receive()
    assert workers.closed
    assert all(worker.process.returncode is not None for worker in workers.workers)


@pytest.mark.parametrize("modes", [("usage", "echo"), ("defect", "late-usage")], ids=str)
def test_an_error_for_the_user_comes_before_its_effects(modes: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="the model is broken"):
        group(*modes).receive()


def test_output_of_a_failed_worker_is_shown_on_stderr_only(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerLostError):
        group("defect").receive()
    out, err = capfd.readouterr()
    assert out == ""
    assert "said before" in err and "RuntimeError: a defect" in err
