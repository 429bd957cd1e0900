"""Processes that are asked: those that do not answer are an answer, too, and none of them stays."""

from __future__ import annotations

import os
import sysconfig
import time
from pathlib import Path

import pytest

from llmpq.doctor.probing import Probe, asking

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
MODULES = {
    "broken_extension" + SUFFIX: "this is no library",
    "crashing.py": "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n",
    "leaving.py": "import os\nos._exit(0)\n",
    "chatting.py": "print('a library says something')\n",
    "lazy.py": "import time\ntime.sleep(600)\n",
}


@pytest.mark.parametrize(
    ("module", "limit_s", "problem"),
    [
        ("not_there", 60, "ModuleNotFoundError: No module named 'not_there'"),
        ("broken_extension", 60, "ImportError: {folder}/broken_extension"),
        ("crashing", 60, "the process that was to find out was ended by SIGILL"),
        ("leaving", 60, "the process that was to find out has ended without an answer"),
        ("lazy", 0.5, "no answer within "),
        ("chatting", 60, ""),
    ],
)
def test_what_an_import_does_is_said_in_words(module: str, limit_s: float, problem: str, tmp_path: Path) -> None:
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    with asking("module", module, environment={"PYTHONPATH": path}) as probe:
        answer = probe.answer(time.monotonic() + limit_s)
    assert answer.problem.startswith(problem.format(folder=tmp_path)) if problem else not answer.problem
    assert "\n" not in answer.problem and answer.late == (module == "lazy")
    with pytest.raises(ProcessLookupError):  # whatever it has done, it is gone
        os.killpg(probe._process.pid, 0)


def test_an_answer_that_was_there_in_time_is_read_later() -> None:
    """Others may have been waited for until then."""
    with Probe(["echo", '{"isa": "avx2"}']) as probe:
        probe._process.wait()
        assert probe.answer(time.monotonic() - 1).values == {"isa": "avx2"}


def test_what_a_process_has_started_ends_with_it(tmp_path: Path) -> None:
    started = tmp_path / "started"
    command = ["sh", "-c", f"sleep 600 & echo $! > {started}; wait"]
    with Probe(command) as probe:
        while not (started.exists() and started.read_text().strip()):
            time.sleep(0.01)
        assert "no answer" in probe.text(time.monotonic()).problem
    status = Path(f"/proc/{started.read_text().strip()}/status")
    for _ in range(500):  # its own parent may not have heard of its end yet
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.01)
    raise AssertionError("it still runs")
