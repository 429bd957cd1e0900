"""Runs of `llmpq run` on two devices to inject faults into: what they do without faults, and how one has ended.

Each run has folders of its own, and writes its answers into one of them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from bench.faults.counts import Ending
from bench.faults.files import LONGEST
from bench.faults.originals import write_originals
from llmpq import cache
from llmpq.checkpoint.model_files import open_model
from llmpq.spec import Cluster, Device, Placement, Plan, Precision, Prediction, Solution, Solved, Stage, Workload
from llmpq.temporary import remove_abandoned

PROMPTS, SLOTS = 48, 4
LENGTH = 60  # tokens of a prompt and its answer
GONE_S = 3.0  # for workers to follow a driver that was killed

Verdict = tuple[Ending, str]


@dataclass(frozen=True)
class Scene:
    """A model, a plan and prompts, and what a run without faults does with them."""

    folder: Path
    answers: dict[str, Any]  # the lines of its output by prompt
    seconds: float


class Run:
    """A started run. `prefix` goes before its command, `options` behind it."""

    def __init__(
        self,
        scene: Scene,
        folder: Path,
        *,
        cold: bool,
        prefix: Sequence[str] = (),
        plan: str = "two",
        variables: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.scene, self.folder = scene, folder
        self.temporary, self.cache, self.output = (folder / name for name in ("temporary", "cache", "output"))
        for path in (self.temporary, self.output):
            path.mkdir(parents=True)
        if not cold:
            shutil.copytree(scene.folder / "cache", self.cache)
        self.stderr = folder / "stderr"
        environment = {"TMPDIR": str(self.temporary), "LLMPQ_CACHE": str(self.cache), "OMP_NUM_THREADS": "1"}
        with self.stderr.open("wb") as stderr:
            self.driver = subprocess.Popen(
                [*prefix, *_command(scene.folder, plan, self.output / "answers.jsonl"), *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, **environment, **(variables or {})},
                start_new_session=True,
            )
        self.started_s = time.monotonic()
        self._written = 0  # answers, when the fault was injected

    def processes(self) -> list[int]:
        """Ids of those that live."""
        return processes_in(self.folder)

    def workers(self) -> list[int]:
        return [pid for pid in self.processes() if pid != self.driver.pid]

    def wait(self, random: Random) -> None:
        """Wait for a random moment: of the time that a run without faults takes, or between two answers; or the end."""
        if random.random() < 0.5:
            until = self.started_s + random.uniform(0.05, 1.1) * self.scene.seconds
            with suppress(subprocess.TimeoutExpired):
                self.driver.wait(max(0.0, until - time.monotonic()))
        else:
            wanted = random.randrange(1, PROMPTS)
            while self.driver.poll() is None and self._answers().count("\n") < wanted:
                time.sleep(0.005)
        self._written = self._answers().count("\n")

    def _answers(self) -> str:
        path = self.output / "answers.jsonl"
        return path.read_text() if path.exists() else ""

    @property
    def usual_limit_s(self) -> float:
        """Seconds for what takes none by itself: the machine may have become busy since the scene was made."""
        return 5 * self.scene.seconds + 20

    def verdict(
        self, codes: Sequence[int], named: str = "", limit_s: float | None = None, *, complete: bool = True
    ) -> Verdict:
        """How it ended: well if within `limit_s` from now, with one of `codes`, and with nothing left behind.

        A code is an exit status, or 128 and the number of a signal. What ends without 0 says why in one line, in which
        `named` occurs; unless it was killed. With code 0 there are all answers, if it is to write any (`complete`).
        """
        try:
            status = self.driver.wait(self.usual_limit_s if limit_s is None else limit_s)
        except subprocess.TimeoutExpired:
            strike(self.processes(), signal.SIGKILL)
            self.driver.wait()
            return "hung", f"still running; stderr: {self._said()[-LONGEST:]}"
        code = status if status >= 0 else 128 - status
        until = time.monotonic() + GONE_S
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.05)
        if left:
            strike(left, signal.SIGKILL)
            return "hung", f"exit code {code}, but processes are left: {left}"
        said = self._said()
        for problem in (self._check_answers(complete=complete and code == 0), self._check_folders()):
            if problem is not None:
                return problem[0], f"exit code {code}, {problem[1]}; stderr: {said[-LONGEST:]}"
        if "Traceback (most" in said:
            return "tracebacks", f"exit code {code}; stderr: {said[-2 * LONGEST :]}"
        if code not in codes:
            return "tracebacks", f"exit code {code}; stderr: {said[-LONGEST:]}"
        line = said.strip().rpartition("\n")[2]
        if status > 0 and not (line.startswith("llmpq: ") and len(line) <= LONGEST and named in line):
            return "tracebacks", f"exit code {code}, said {line[:LONGEST]!r} without {named!r}"
        return "ended_well", f"exit code {code}, {line!r}"

    def _said(self) -> str:
        return self.stderr.read_text(errors="replace")

    def _check_answers(self, complete: bool) -> Verdict | None:
        *lines, rest = self._answers().split("\n")
        if rest:
            return "lost", f"half a line at the end: {rest[-80:]!r}"
        try:
            prompts = [json.loads(line)["prompt"] for line in lines]
        except (ValueError, KeyError) as error:
            return "lost", f"a line that is none: {error}"
        if len(prompts) > len(set(prompts)):
            return "doubled", f"{len(prompts) - len(set(prompts))} answers twice"
        if wrong := [prompt for prompt, line in zip(prompts, lines, strict=True) if self.scene.answers[prompt] != line]:
            return "lost", f"{len(wrong)} other answers"
        wanted = len(self.scene.answers) if complete else self._written
        if len(prompts) < wanted:
            return "lost", f"{len(prompts)} of {wanted} answers"
        return None

    def _check_folders(self) -> Verdict | None:
        """What the next start would find."""
        remove_abandoned(self.temporary)
        if left := list(self.temporary.rglob("*")):
            return "tracebacks", f"left {left}"
        with _environment("LLMPQ_CACHE", str(self.cache)):
            for entry in self.cache.glob("*/[!.]*"):
                if cache.find(entry.parent.name, entry.name, lambda folder: True) is None:
                    return "lost", f"a damaged result in the cache: {entry}"
        for place in self.cache.glob("*/.tmp"):
            remove_abandoned(place)
        if left := list(self.cache.glob("*/.tmp/*")):
            return "tracebacks", f"left {left}"
        return None


def processes_in(folder: Path) -> list[int]:
    """Ids of the living processes of the runs in a folder: their cache lies below it."""
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_in(folder, pid)]


def _is_in(folder: Path, pid: int) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        alive = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return alive and any(variable.startswith(f"LLMPQ_CACHE={folder}/".encode()) for variable in variables)
    except OSError:
        return False


def strike(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _command(folder: Path, plan: str, output: Path) -> list[str]:
    arguments: dict[str, Path | int] = {
        "model": folder / "model",
        "plan": folder / f"{plan}.json",
        "costs": folder / "costs.json",
        "prompts": folder / "many.jsonl",
        "max-new-tokens": LENGTH - 24,
        "output": output,
    }
    options = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    return [sys.executable, "-m", "llmpq.run", *options, "--no-log", "--quiet"]


def make_scene(folder: Path) -> Scene:
    """Write what a run needs, and run it once without faults."""
    folder.mkdir()
    write_originals(folder)
    spec = open_model(str(folder / "model")).spec
    devices, bits = (Device("a", "cpu"), Device("b", "cpu")), Precision(4, 32)
    plan = Plan(
        model=spec.name,
        model_hash=spec.content_hash,
        cluster=Cluster(devices),
        workload=Workload(SLOTS, 24, LENGTH - 24),
        stages=tuple(Stage(device.name, (i, i + 1), (bits,), "a8x2") for i, device in enumerate(devices)),
        embedding=Placement(0, bits),
        head=Placement(1, bits),
        wire_dtype="float32",
        slots=SLOTS,
        max_length=LENGTH,
        prefill_microbatch=2,
        decode_microbatch=2,
    )
    apart = Cluster(tuple(replace(device, host=f"host{i}") for i, device in enumerate(devices)))
    prediction = Prediction(1.0, 1.0, 4.0, (2**20, 2**20))
    for name, cluster in (("two", plan.cluster), ("apart", apart)):
        solution = Solution("HiGHS", 2.0, 2.0, 0.1, 1.0, 2.0)
        Solved(replace(plan, cluster=cluster), prediction, solution).save(folder / f"{name}.json")
    lines = [json.dumps({"prompt": f"{i:02}: what?"}) + "\n" for i in range(PROMPTS)]
    (folder / "many.jsonl").write_text("".join(lines))
    run = Run(Scene(folder, {}, 0.0), folder / "run", cold=True)
    if run.driver.wait() != 0:
        raise RuntimeError(f"a run without faults fails: {run.stderr.read_text()}")
    seconds = time.monotonic() - run.started_s
    run.cache.rename(folder / "cache")
    lines = (run.output / "answers.jsonl").read_text().splitlines()
    return Scene(folder, {json.loads(line)["prompt"]: line for line in lines}, seconds)
