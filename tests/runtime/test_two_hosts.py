"""A pipeline on two hosts, in network namespaces with a cable between them: it runs; and nothing that happens to one of
them, or to the cable, leaves the other waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from select import select

import pytest

from bench.faults.hosts import ADDRESSES, Hosts, two_hosts
from llmpq.checkpoint.model_files import open_model, resolve
from llmpq.report.starting import start_commands
from llmpq.runtime.engine import Engine
from llmpq.runtime.peers import interface_of
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import Prediction, Report, Solution, Solved
from tests.support.pipelines import load_spec, make_plan, tiny_model

pytestmark = pytest.mark.slow

GENERATING = "generating 4000 tokens"
WITHIN_S = 30.0  # 15 on a machine that does nothing else


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with ExitStack() as stack:
        try:
            found = stack.enter_context(two_hosts())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this system gives no network namespaces: {error}")
        yield found


@pytest.fixture
def healed(hosts: Hosts) -> Iterator[Hosts]:
    yield hosts
    hosts.heal()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a plan of two stages for two hosts."""
    folder = tmp_path_factory.mktemp("files")
    checkpoint = tiny_model(folder / "model", "llama-gqa", max_position_embeddings=4096)
    plan = make_plan(load_spec(checkpoint), [2, 1], 2, 2, max_length=4096)
    # Slow, so that a run is never over before what is to happen to it.
    devices = tuple(replace(device, host=f"host{i}", slowdown=20) for i, device in enumerate(plan.cluster.devices))
    plan = replace(plan, cluster=replace(plan.cluster, devices=devices))
    solution = Solution("none", 1.0, 1.0, 0.0, 0.0, None)
    Solved(plan, Prediction(1.0, 1.0, 1.0, (1, 1)), solution).save(folder / "plan.json")
    return folder / "model", folder / "plan.json"


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(hosts: Hosts, files: tuple[Path, Path]) -> Iterator[Start]:
    """Starts `llmpq run` as one rank on its host, as the README says."""
    processes: list[subprocess.Popen[str]] = []

    def run(rank: int, *options: str, **variables: str) -> subprocess.Popen[str]:
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": "29500",
            "LLMPQ_SECRET": "what both hosts were told",
        } | variables
        path = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-m", "llmpq", "run", "--model", str(files[0]), "--plan", str(files[1])]
        processes.append(
            subprocess.Popen(
                [*hosts.prefixes[rank], *command, "--prompt", "one two", "--no-log", *options],
                env={**os.environ, "PYTHONPATH": path, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.wait()


def wait_for(words: str, process: subprocess.Popen[str], within_s: float) -> None:
    """Until it has said so on stderr."""
    assert process.stderr is not None
    said, until, descriptor = "", time.monotonic() + within_s, process.stderr.fileno()
    while words not in said:
        assert select([descriptor], [], [], max(0.0, until - time.monotonic()))[0], f"not said in time, but {said}"
        data = os.read(descriptor, 2**16)
        assert data, f"it has ended: {said}"
        said += data.decode()


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of its children."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def both_at_work(start: Start) -> list[subprocess.Popen[str]]:
    """Both ranks, in the middle of a long run."""
    processes = [start(rank, "--max-new-tokens", "4000") for rank in range(2)]
    wait_for(GENERATING, processes[0], 60)  # the others are loaded then, and say nothing
    return processes


def ended(process: subprocess.Popen[str], within_s: float = WITHIN_S) -> tuple[int, str]:
    """Exit code, and the one line that it says at last."""
    _, err = process.communicate(timeout=within_s)
    assert "Traceback" not in err.rpartition("---\n")[2], err
    return process.returncode, err.splitlines()[-1]


@pytest.mark.parametrize("kbit_per_s", [None, pytest.param(256, marks=pytest.mark.full)])
def test_two_hosts_generate_what_one_does(
    kbit_per_s: int | None, start: Start, files: tuple[Path, Path], tmp_path: Path, healed: Hosts
) -> None:
    if kbit_per_s is not None:
        healed.slow(kbit_per_s)
    report = tmp_path / "report.json"
    options = ("--max-new-tokens", "6", "--json-out", str(report))
    processes = [start(rank, *options) for rank in range(2)]
    assert [process.wait(timeout=90) for process in processes] == [0, 0], [p.communicate() for p in processes]
    (output,) = Report.load(report).outputs
    plan = Solved.load(files[1]).plan
    devices = tuple(replace(device, host="localhost", slowdown=1) for device in plan.cluster.devices)
    with Engine(
        replace(plan, cluster=replace(plan.cluster, devices=devices)),
        resolve(str(files[0])),
        load_spec(resolve(str(files[0]))),
    ) as engine:
        prompt = open_model(str(files[0])).tokenizer.encode_chat("one two")
        alone = engine.generate([prompt], SamplingParams(max_tokens=6)).sequences[0]
    assert output.token_ids == alone.token_ids and len(alone.token_ids) > 0


@pytest.fixture
def printed(hosts: Hosts, files: tuple[Path, Path]) -> Iterator[list[subprocess.Popen[str]]]:
    """A long run, by the commands that `llmpq plan` prints for its hosts: torchrun on each."""
    plan = Solved.load(files[1]).plan
    devices = [replace(device, host=host) for device, host in zip(plan.cluster.devices, ADDRESSES, strict=True)]
    plan = replace(plan, cluster=replace(plan.cluster, devices=tuple(devices)))
    options = ["--model", str(files[0]), "--plan", str(files[1]), "--prompt", "one two", "--max-new-tokens", "4000"]
    torchrun = f"exec {sys.executable} -m torch.distributed.run "
    processes = []
    for (address, _, command), prefix in zip(
        (line.partition(": ") for line in start_commands(plan, [*options, "--no-log"])), hosts.prefixes
    ):
        assert address == ADDRESSES[len(processes)]
        variable, _, command = command.partition(" ")
        command = f"export {variable}; {command.replace('torchrun ', torchrun, 1)}"
        processes.append(
            subprocess.Popen(
                [*prefix, "sh", "-c", command],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def below(pid: int, depth: int) -> list[int]:
    """Process ids of its children, or of theirs."""
    found = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return found if depth == 1 else [child for each in found for child in below(each, depth - 1)]


@pytest.mark.full
@pytest.mark.parametrize("what", ["worker", "rank", "cable"])
def test_torchrun_on_two_hosts_as_printed(what: str, printed: list[subprocess.Popen[str]], healed: Hosts) -> None:
    wait_for(GENERATING, printed[0], 90)
    ranks = [below(process.pid, 1)[0] for process in printed]
    everything = [pid for process in printed for depth in (1, 2) for pid in below(process.pid, depth)]
    if what == "cable":
        healed.silence()
        named = ["rank 1 on", "rank 0 on"]
    else:
        os.kill(below(ranks[1], 1)[0] if what == "worker" else ranks[1], signal.SIGKILL)
        named = ["was ended by SIGKILL" if what == "worker" else "rank 1 on"] * 2
    cut_at = time.monotonic()
    for process, name in zip(printed, named, strict=True):
        _, err = process.communicate(timeout=WITHIN_S - (time.monotonic() - cut_at))
        assert process.returncode == 1
        said = [line for line in err.splitlines() if line.startswith("llmpq: ")]
        assert (said and name in said[-1]) or (what == "rank" and process is printed[1]), err
    assert not any(Path(f"/proc/{pid}").exists() for pid in everything)


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.full), 1])
def test_a_killed_worker_is_named_on_both_hosts(lost: int, start: Start) -> None:
    processes = both_at_work(start)
    (worker,) = workers(processes[lost])
    os.kill(worker, signal.SIGKILL)
    for process in processes:
        code, line = ended(process)
        assert code == 5
        assert f"stage {lost} on cpu{lost} of" in line and f"({ADDRESSES[lost]}) (rank {lost}, pid" in line
        assert "was ended by SIGKILL" in line


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.full), 1])
def test_a_killed_rank_is_named_on_the_other_host(lost: int, start: Start) -> None:
    processes = both_at_work(start)
    left = workers(processes[lost])
    processes[lost].kill()
    code, line = ended(processes[1 - lost])
    assert code == 5
    assert f"rank {lost} on" in line and ADDRESSES[lost] in line
    assert not any(Path(f"/proc/{pid}").exists() for pid in left)


@pytest.mark.full
def test_a_cut_cable_is_noticed_at_both_ends(start: Start, healed: Hosts) -> None:
    processes = both_at_work(start)
    healed.silence()
    cut_at = time.monotonic()
    for rank, process in enumerate(processes):
        code, line = ended(process, WITHIN_S - (time.monotonic() - cut_at))
        assert code == 5
        assert (
            f"rank {1 - rank} on" in line and f"{ADDRESSES[1 - rank]}" in line and "has not answered for 10 s" in line
        )


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.full), 1])
def test_a_rank_that_never_comes_is_not_waited_for(rank: int, start: Start) -> None:
    code, line = ended(start(rank, LLMPQ_MEETING_S="3"))
    assert code == 5
    assert f"rank {1 - rank}" in line and f"has not come to {ADDRESSES[0]}:29500 within 3 s" in line


def test_an_error_of_one_rank_is_told_to_the_other(start: Start, tmp_path: Path) -> None:
    processes = [start(0), start(1, "--model", str(tmp_path / "nothing"))]
    code, line = ended(processes[1], 60)
    assert code == 2 and "nothing" in line
    code, line = ended(processes[0])
    assert code == 5
    assert "rank 1 on" in line and ADDRESSES[1] in line and "nothing" in line


@pytest.mark.full
@pytest.mark.parametrize("what", ["model", "plan"])
def test_ranks_agree_on_model_and_plan_before_they_load(
    what: str, start: Start, files: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / what
    if what == "model":
        other = tiny_model(other, "llama-gqa", max_position_embeddings=4096, rms_norm_eps=1e-3).path
    else:
        solved = Solved.load(files[1])
        replace(solved, plan=replace(solved.plan, decode_microbatch=1)).save(other)
    processes = [start(0), start(1, f"--{what}", str(other))]
    code, line = ended(processes[1], 60)
    assert code == 2 and f"rank 0 has another {what} (" in line and str(other) in line
    code, line = ended(processes[0])
    assert code == 5 and f"rank 0 has another {what} (" in line and ADDRESSES[1] in line


@pytest.mark.full
def test_a_signal_to_one_rank_ends_the_other(start: Start) -> None:
    processes = both_at_work(start)
    processes[1].terminate()
    assert ended(processes[1])[0] == 143
    code, line = ended(processes[0])
    assert code == 5 and "rank 1 on" in line and "SIGTERM" in line


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.2") == interface_of("::1") == "lo"
    assert interface_of("192.0.2.1") is None
