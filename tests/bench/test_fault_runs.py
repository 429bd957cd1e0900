"""bench.faults sees what it looks for: programs that end badly in each way, in the place of a run."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from bench.faults import processes
from bench.faults.counts import Counts
from bench.faults.runs import Run, Scene

ANSWERS = {prompt: json.dumps({"prompt": prompt, "text": prompt.upper()}) for prompt in "abc"}
BEGIN = """
import os, subprocess, sys, tempfile, time
from pathlib import Path
output = Path(sys.argv[sys.argv.index("--output") + 1])
a, b, c = (f'{{"prompt": "{x}", "text": "{x.upper()}"}}\\n' for x in "abc")
def write(*lines):
    output.write_text("".join(lines))
def end(code, said="llmpq: it is lost"):
    print(said, file=sys.stderr)
    sys.exit(code)
"""
CASES = {
    "all answers": ("write(a, b, c)", "ended_well"),
    "in another order": ("write(c, a, b)", "ended_well"),
    "some answers and why not all": ("write(a, b); end(5)", "ended_well"),
    "a named signal": ("os.kill(os.getpid(), 15)", "ended_well"),
    "too few answers": ("write(a, b)", "lost"),
    "none": ("pass", "lost"),
    "half a line": ("write(a, b[:-1]); end(5)", "lost"),
    "half a line between": ("write(a, b[:5], chr(10), c); end(5)", "lost"),
    "another answer": ("write(a, b, c.replace('C', 'D'))", "lost"),
    "an answer twice": ("write(a, b, b, c); end(5)", "doubled"),
    "a traceback": ("write(a, b, c); end(5, 'Traceback (most recent call last)')", "tracebacks"),
    "an exit code that is none of ours": ("end(1)", "tracebacks"),
    "no reason": ("end(5, '')", "tracebacks"),
    "another reason": ("end(5, 'llmpq: it is found')", "tracebacks"),
    "a long reason": ("end(5, 'llmpq: lost' + 500 * '!')", "tracebacks"),
    "a folder left": ("write(a, b, c); tempfile.mkdtemp()", "tracebacks"),
    "a damaged cache": ("p = Path(os.environ['LLMPQ_CACHE'], 'k', 'e'); p.mkdir(parents=True); write(a, b, c)", "lost"),
    "a process left": ("subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); end(5)", "hung"),
    "no end": ("time.sleep(60)", "hung"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_bad_end_is_seen(name: str, tmp_path: Path) -> None:
    program, ending = CASES[name]
    run = Run(
        Scene(tmp_path, ANSWERS, 0.0), tmp_path / "run", cold=True, prefix=[sys.executable, "-c", BEGIN + program]
    )
    found, what = run.verdict((0, 5, 143), "lost", limit_s=1.0 if name == "no end" else None)
    assert found == ending, what
    time.sleep(0.1)  # for what was killed to be gone
    assert run.processes() == []


@pytest.mark.parametrize(("count", "injected"), [(None, [1, 1, 1]), (4, [2, 1, 1]), (2, [1, 1])])
def test_each_kind_has_its_turn(count: int | None, injected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = dict.fromkeys(("a", "b", "c", "d"), lambda random, scene, folder: ("ended_well", ""))
    monkeypatch.setattr(processes, "FAULTS", kinds)
    monkeypatch.setattr(processes, "make_scene", lambda folder: Scene(folder, {}, 0.0))
    found = processes.inject(0, count, ("a", "c", "d"))
    assert [kind.injected for kind in found] == injected and {kind.fault for kind in found} <= {"a", "c", "d"}


def test_faults_are_counted_by_how_they_end() -> None:
    counts = Counts("pause")
    counts.add("ended_well", "fine")
    counts.add("hung", "pause 1 0: still running")
    assert (counts.injected, counts.ended_well, counts.hung, counts.lost) == (2, 1, 1, 0)
    assert counts.failures == ["hung: pause 1 0: still running"]
