"""A command that is asked to end does: the right exit code, one line, no process and no folder left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.tiny_models import save_model

pytestmark = pytest.mark.slow

LENGTHS = ("--prompt-len", "8", "--output-len", "8")
FULL = pytest.mark.full
SIGNALS = [
    signal.SIGTERM,
    signal.SIGHUP,
    pytest.param(signal.SIGINT, marks=FULL),
    pytest.param(signal.SIGQUIT, marks=FULL),
]


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_signals,
    )


def _heed_signals() -> None:
    """Who runs these tests may ignore some: nohup does, and shells in the background."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("wait_s", [0.1, pytest.param(4.0, marks=FULL)])
def test_a_signal_ends_a_command_and_its_workers(number: signal.Signals, wait_s: float, tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama-tied")
    temporary, cache = tmp_path / "temporary", tmp_path / "cache"
    temporary.mkdir()
    command = (
        "profile",
        "--model",
        str(tmp_path / "model"),
        "--devices",
        "cpu;cpu",
        *LENGTHS,
        "--out",
        str(tmp_path / "costs"),
    )
    with start(*(sys.executable, "-m", "llmpq", *command), TMPDIR=str(temporary), LLMPQ_CACHE=str(cache)) as process:
        while len(workers := children(process.pid)) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(wait_s)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    said = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert process.returncode == 128 + number
    assert (out, err.splitlines()[-1:]) == ("", [f"llmpq: {said}"])
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert list(temporary.iterdir()) == []


SWALLOWING = """
import signal, sys, tempfile, time
from llmpq.cli import signals
signals._GRACE_S = signals._EXIT_S = 0.5
folder = tempfile.TemporaryDirectory()
print(folder.name, flush=True)
def swallow(work):
    while True:
        try:
            work()
        except BaseException:
            pass
with signals.raised():
    # Twice: the exception may come between two tries.
    swallow(lambda: swallow(lambda: (print("ready", flush=True), time.sleep(60))))
"""


def test_a_library_that_swallows_the_exception_does_not_keep_the_process() -> None:
    with start(sys.executable, "-c", SWALLOWING) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir() and process.stdout.readline() == "ready\n"
        process.terminate()
        _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert err == "llmpq: ended by SIGTERM\n"
    assert not folder.exists()


def test_an_ignored_signal_stays_ignored() -> None:
    script = "import os, signal\nfrom llmpq.cli import signals\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    script += "with signals.raised(): os.kill(os.getpid(), signal.SIGHUP)\nprint('on')"
    with start(sys.executable, "-c", script) as process:
        assert process.communicate(timeout=20) == ("on\n", "")
