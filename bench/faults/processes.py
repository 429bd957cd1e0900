"""Faults of processes: signals, pauses, full disks and cut links at random moments of `llmpq run` on two devices.

Half of the runs begin with an empty cache. A fault is known by its kind and number:
`python -m bench.faults.processes KIND NUMBER SEED` injects it again.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from random import Random

from bench.faults.counts import Counts
from bench.faults.hosts import ADDRESSES, Hosts, two_hosts
from bench.faults.ports import listening
from bench.faults.runs import Run, Scene, Verdict, make_scene, processes_in, strike

CUT_S = 15.0  # for both ends of a cut link to end
_CONNECTIONS = 300
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL)


def _signal_to_driver(random: Random, scene: Scene, folder: Path) -> Verdict:
    number = random.choice(_ENDING)
    run = Run(scene, folder, cold=random.random() < 0.5)
    run.wait(random)
    strike([run.driver.pid], number)
    codes = (0, 128 + number)
    return _with(run.verdict(codes, "interrupted" if number == signal.SIGINT else number.name), number.name)


def _signal_to_worker(random: Random, scene: Scene, folder: Path) -> Verdict:
    number = random.choice((*_ENDING, signal.SIGSEGV))
    run = Run(scene, folder, cold=random.random() < 0.5)
    run.wait(random)
    pid = _some_worker(random, run)
    strike(pid, number)
    # A driver that has all answers already needs no workers.
    return _with(run.verdict((0, 5), number.name), f"{number.name} to {pid}")


def _pause(random: Random, scene: Scene, folder: Path) -> Verdict:
    run = Run(scene, folder, cold=random.random() < 0.5)
    run.wait(random)
    what = random.choice(("driver", "worker", "all"))
    seconds = random.uniform(0.1, 15.0 if what != "worker" else 5.0)
    pids = {"driver": [run.driver.pid], "all": run.processes(), "worker": _some_worker(random, run)}[what]
    strike(pids, signal.SIGSTOP)
    time.sleep(seconds)
    strike(pids, signal.SIGCONT)
    return _with(run.verdict((0,)), f"{what} paused for {seconds:.1f} s")


def _stop_worker(random: Random, scene: Scene, folder: Path) -> Verdict:
    run = Run(scene, folder, cold=False)
    run.wait(random)
    pid = _some_worker(random, run)
    strike(pid, signal.SIGSTOP)
    # 120 s is the limit of a worker that has not started.
    return _with(run.verdict((0, 5), limit_s=run.usual_limit_s + 120.0), f"{pid} stopped for good")


def _lose_device(random: Random, scene: Scene, folder: Path) -> Verdict:
    """Which is not the end: all answers come, those of an undisturbed run."""
    run = Run(scene, folder, cold=False, options=("--on-loss", "replan"))
    run.wait(random)
    number = random.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGSTOP))
    pid = _some_worker(random, run)
    strike(pid, number)
    return _with(run.verdict((0,), limit_s=run.usual_limit_s + scene.seconds + 30.0), f"{number.name} to {pid}")


def _some_worker(random: Random, run: Run) -> list[int]:
    """One worker, waited for if there is none yet; none if the run has ended."""
    while run.driver.poll() is None:
        if workers := run.workers():
            return [random.choice(workers)]
        time.sleep(0.01)
    return []


def _full_disk(random: Random, scene: Scene, folder: Path) -> Verdict:
    what = random.choice(("temporary", "cache", "output"))
    room = 4096 * random.randint(1, 40)
    place = folder / what
    script = (
        f'mkdir -p "{place}" && mount -t tmpfs -o size={room} none "{place}" && "$@"; code=$?; '
        f'mkdir "{folder}/left"; cp -r "{place}/." "{folder}/left"; exit $code'
    )
    run = Run(scene, folder, cold=True, prefix=["unshare", "-rm", "sh", "-c", script, "sh"])
    run.driver.wait()
    # What was on the disk that is gone.
    shutil.rmtree(place, ignore_errors=True)
    (folder / "left").rename(place)
    codes = (0,) if what == "cache" else (0, 2)
    return _with(run.verdict(codes), f"{what} has {room} bytes")


def _file_too_large(random: Random, scene: Scene, folder: Path) -> Verdict:
    blocks = int(2 ** random.uniform(0, 8))
    run = Run(scene, folder, cold=True, prefix=["sh", "-c", f'ulimit -f {blocks} && exec "$@"', "sh"])
    return _with(run.verdict((0, 2)), f"files may have {blocks} blocks")


def _cut_link(random: Random, scene: Scene, folder: Path) -> Verdict:
    # They may not have started yet.
    return _on_two_hosts(random, scene, folder, lambda hosts: hosts.cut(random), (0, 5), CUT_S + scene.seconds)


def _slow_link(random: Random, scene: Scene, folder: Path) -> Verdict:
    rate = int(2 ** random.uniform(6, 12))

    def slow(hosts: Hosts) -> str:
        hosts.slow(rate)
        return f"cable with {rate} kbit/s"

    # Slow is not lost, but where signs of life wait too long behind what is computed.
    return _on_two_hosts(random, scene, folder, slow, (0, 5), 10 * scene.seconds + 60.0)


def _on_two_hosts(
    random: Random,
    scene: Scene,
    folder: Path,
    strike_at: Callable[[Hosts], str],
    codes: Sequence[int],
    limit_s: float,
) -> Verdict:
    """Of both ranks, which have so many seconds from the moment of the fault on."""
    with two_hosts() as hosts:
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500", "LLMPQ_SECRET": "of " * 9}
        runs = [
            Run(
                scene,
                folder / str(rank),
                cold=False,
                prefix=prefix,
                plan="apart",
                variables={"RANK": str(rank), **meeting},
            )
            for rank, prefix in enumerate(hosts.prefixes)
        ]
        runs[0].wait(random)
        what = strike_at(hosts)
        until = time.monotonic() + limit_s
        for rank, run in enumerate(runs):
            ending, seen = run.verdict(codes, limit_s=max(0.0, until - time.monotonic()), complete=rank == 0)
            if ending != "ended_well":
                for other in runs:
                    strike(other.processes(), signal.SIGKILL)
                    other.driver.wait()
                return ending, f"{what}, rank {rank}: {seen}"
        return ending, f"{what}: {seen}"


def _stranger(random: Random, scene: Scene, folder: Path) -> Verdict:
    """Who connects wherever somebody listens, from the start on; at least once, however long that takes to begin."""
    run = Run(scene, folder, cold=False)
    until = time.monotonic() + random.uniform(0.5, 1.0) * scene.seconds
    connections: list[socket.socket] = []
    abroad = set[str]()
    # Not zeros, with which gloo's ends greet each other: README says what comes of those.
    said = [b"", b"GET / HTTP/1.0\r\n\r\n", random.randbytes(2**12)]
    while run.driver.poll() is None and len(connections) < _CONNECTIONS:
        if connections and time.monotonic() > until:
            break
        for address, port in listening(run.processes()):
            if not ip_address(address).is_loopback:
                abroad.add(address)
            with suppress(OSError):
                connections.append(socket.create_connection((address, port), timeout=1))
                connections[-1].sendall(random.choice(said))
        time.sleep(0.05)
    verdict = run.verdict((0,))
    for connection in connections:
        connection.close()
    if abroad or not connections:
        return "lost", f"listened at {', '.join(sorted(abroad)) or 'no port that was found'}"
    return _with(verdict, f"{len(connections)} connections")


def _with(verdict: Verdict, what: str) -> Verdict:
    return verdict[0], f"{what}: {verdict[1]}"


FAULTS: dict[str, Callable[[Random, Scene, Path], Verdict]] = {
    "signal to the driver": _signal_to_driver,
    "signal to a worker": _signal_to_worker,
    "lost device": _lose_device,
    "pause": _pause,
    "full disk": _full_disk,
    "file too large": _file_too_large,
    "stranger": _stranger,
    "stopped worker": _stop_worker,
    "cut link": _cut_link,
    "slow link": _slow_link,
}
_LONG = ("stopped worker", "cut link", "slow link")  # what waits until a silence is a loss, or for what is sent slowly
QUICK = tuple(name for name in FAULTS if name not in _LONG)


def is_possible(name: str) -> bool:
    """Whether this machine lets one inject it."""
    if name.endswith(" link"):
        with suppress(OSError, subprocess.SubprocessError), two_hosts():
            return True
        return False
    if name != "full disk":
        return True
    tried = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return (
        shutil.which("unshare") is not None and not subprocess.run(tried, capture_output=True, check=False).returncode
    )


def inject(seed: int, count: int | None, only: Sequence[str] = ()) -> list[Counts]:
    """Inject `count` faults, as many of each kind, or of `only` these, that is possible here, one after the other.

    With `count` None it is one of each.
    """
    names = [name for name in FAULTS if name in (only or FAULTS) and is_possible(name)]
    counts = {name: Counts(name) for name in names}
    with tempfile.TemporaryDirectory() as place:
        scene = make_scene(Path(place) / "scene")
        for i in range(len(names) if count is None else count):
            name, number = names[i % len(names)], i // len(names)
            ending, what = _inject(scene, Path(place) / f"fault{i}", name, number, seed)
            counts[name].add(ending, f"{name!r} {number} {seed}: {what}")
    return [kind for kind in counts.values() if kind.injected]


def _inject(scene: Scene, folder: Path, name: str, number: int, seed: int) -> Verdict:
    try:
        return FAULTS[name](Random(f"{name} {number} {seed}"), scene, folder)
    finally:
        strike(processes_in(folder), signal.SIGKILL)  # there are some if this process was interrupted
        shutil.rmtree(folder, ignore_errors=True)


def main(name: str, number: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        print(*_inject(make_scene(Path(place) / "scene"), Path(place) / "fault", name, number, seed), sep=": ")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
