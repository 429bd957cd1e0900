"""Progress on stderr: lines of plain text where it goes to a file, a moving line on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from llmpq.progress import counted
from llmpq.report.progress_bar import progress

PROGRAM = """
from llmpq.progress import counted
from llmpq.report.progress_bar import progress
with progress() as notify:
    notify("[solving]")
    done = counted(notify, "measuring", 4)
    for _ in range(4):
        done()
print("result")
"""


def test_in_a_file_each_step_is_one_plain_line(capfd: pytest.CaptureFixture[str]) -> None:
    with progress() as notify:
        notify("opening the model")
        done = counted(notify, "measuring", 3)
        for _ in range(3):
            done()
        notify("solving [for bits]")
    captured = capfd.readouterr()
    assert captured.err == "opening the model ...\nmeasuring ...\nsolving [for bits] ...\n"
    assert captured.out == ""


def test_quiet_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=True) as notify:
        notify("opening the model", 0.5)
    assert capfd.readouterr() == ("", "")


def test_shares_are_those_of_the_steps_that_are_done() -> None:
    seen: list[tuple[str, float | None]] = []
    done = counted(lambda text, share=None, /: seen.append((text, share)), "measuring", 4)
    for _ in range(4):
        done("a name")
    assert seen == [("measuring", share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]


def test_on_a_terminal_the_share_is_shown_and_nothing_is_left() -> None:
    """Results do not go through the terminal here: stdout is a pipe."""
    main, terminal = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=environment | {"TERM": "xterm"},
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    os.close(terminal)
    shown = os.read(main, 1 << 16).decode()
    os.close(main)
    assert result.returncode == 0 and result.stdout == b"result\n"
    assert "measuring" in shown and "100%" in shown
    assert shown.rstrip().endswith("\x1b[2K")  # the line is erased
