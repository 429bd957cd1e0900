"""Steps within a time: what each gets, and that one's end is not another's."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.timebox import FAILED, NOT_RUN, PASSED, TIMEOUT, Command, Step, TimeBox


def python(code: str, **options: str) -> Command:
    return Command((sys.executable, "-c", code), **options)  # type: ignore[arg-type]


def step(name: str, *commands: Command, share: float = 1, limit: float = 60, **options: object) -> Step:
    return Step(name, share, limit, lambda: commands, **options)  # type: ignore[arg-type]


class Calls:
    """Time boxes in one state folder."""

    def __init__(self, folder: Path) -> None:
        self.state, self.results = folder / "state", folder / "results"

    def __call__(
        self, *steps: Step, seconds: float = 60, sources: str = "a", skip: Sequence[str] = (), rehearse: bool = False
    ) -> dict[str, str]:
        box = TimeBox(seconds, self.state, self.results, ["found.txt"], sources, rehearse=rehearse)
        box.run(steps, skip=skip)
        self.lines, self.code = box.summary(steps)
        written = json.loads((self.results / "gpu_all.json").read_text())
        assert {row["step"]: row["state"] for row in written["steps"]} == {
            name: outcome.state for name, outcome in box.outcomes.items()
        }
        return {name: outcome.state for name, outcome in box.outcomes.items()}

    @property
    def log(self) -> str:
        return (self.results / "gpu_all.log").read_text()


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    return Calls(tmp_path)


def test_no_step_keeps_another_from_running(calls: Calls, tmp_path: Path) -> None:
    survivor = f"import os, time; os.fork() or (time.sleep(3), open({str(tmp_path / 'alive')!r}, 'w')); time.sleep(60)"

    def broken() -> Sequence[Command]:
        raise OSError("no such thing")

    states = calls(
        step("fails", python("raise SystemExit(3)"), python("print('said later')")),
        step("hangs", python(survivor), limit=1),
        Step("cannot begin", 1, 60, broken),
        step("absent", Command(("no-such-program",))),
        step("works", python("print('fine')")),
    )
    assert states == {
        "fails": FAILED,
        "hangs": TIMEOUT,
        "cannot begin": FAILED,
        "absent": FAILED,
        "works": PASSED,
    }
    assert calls.code == 1
    assert [line.split()[0] for line in calls.lines] == ["fails", "hangs", "cannot", "absent", "works"]
    for text in ("[fails] said later", "[works] fine", "[fails] exit code 3", "no-such-program is not on PATH"):
        assert text in calls.log
    time.sleep(3)
    assert not (tmp_path / "alive").exists()  # what a step started has ended with it


def test_a_step_gets_what_others_leave_but_not_their_shares(calls: Calls) -> None:
    say = Command((sys.executable, "-c", "import sys; print('has', sys.argv[1])", "{seconds}"))
    calls(step("a", say, share=10, limit=500), step("b", say, share=60, limit=50), seconds=100)
    assert "[a] has 35" in calls.log or "[a] has 36" in calls.log  # 100 - 60, and a tenth to end in
    assert "[b] has 45" in calls.log or "[b] has 44" in calls.log  # its limit
    assert calls.code == 0


def test_what_no_time_is_left_for_is_not_run(calls: Calls) -> None:
    states = calls(step("slow", python("import time; time.sleep(2)")), step("late", python("")), seconds=4)
    assert states == {"slow": PASSED, "late": NOT_RUN}
    assert calls.code == 1


def test_a_step_is_known_to_have_passed_until_the_sources_change(calls: Calls) -> None:
    steps = (step("right", python("print('ran')")), step("wrong", python("print('ran'); raise SystemExit(1)")))
    calls(*steps)
    assert calls(*steps, skip=["right", "wrong"]) == {"right": PASSED, "wrong": FAILED}
    assert "[right] ran" not in calls.log and "[wrong] ran" in calls.log
    calls(*steps)  # by name
    assert "[right] ran" in calls.log
    calls(*steps, sources="b", skip=["right", "wrong"])
    assert "[right] ran" in calls.log


def test_others_go_on_beside_a_step_in_the_background(calls: Calls, tmp_path: Path) -> None:
    """Each waits for a file of the other's: neither ends before the other has begun."""
    code = "import sys, time, pathlib as p; p.Path({0!r}).touch()\nwhile not p.Path({1!r}).exists(): time.sleep(0.01)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    states = calls(
        step("background", python(code.format(a, b)), background=True),
        step("beside", python(code.format(b, a))),
        step("after", python(f"import os; assert os.path.exists({a!r})"), needs=("background",)),
    )
    assert states == {"background": PASSED, "beside": PASSED, "after": PASSED}


def test_a_step_without_what_it_needs_is_not_run(calls: Calls) -> None:
    states = calls(
        step("build", python("raise SystemExit(1)"), background=True),
        step("needs it", python(""), needs=("build",)),
        step("waits for it", python(""), after=("build",)),
    )
    assert states == {"build": FAILED, "needs it": NOT_RUN, "waits for it": PASSED}
    assert any("build did not pass" in line for line in calls.lines)


def test_what_steps_find_is_copied_even_from_one_that_ran_out_of_time(calls: Calls) -> None:
    found = calls.state / "found.txt"
    code = f"import time; print('said', flush=True); open({str(found)!r}, 'a').write('half'); time.sleep(60)"
    calls(step("hangs", python(code, output="said.txt"), limit=1))
    assert (calls.results / "found.txt").read_text() == "half"
    assert (calls.state / "said.txt").read_text() == "said\n"


def test_a_rehearsal_runs_what_stands_for_the_commands(calls: Calls) -> None:
    command = Command((sys.executable, "-c", "print('real')"), (sys.executable, "-c", "print('rehearsed')"))
    states = calls(step("a", command, Command(("no-such-program",))), rehearse=True)
    assert states == {"a": PASSED}
    assert "[a] rehearsed" in calls.log and "real" not in calls.log


def test_a_command_has_its_environment(calls: Calls) -> None:
    command = Command((sys.executable, "-c", "import os; print(os.environ['GIVEN'])"), env=(("GIVEN", "value"),))
    calls(step("a", command))
    assert "[a] value" in calls.log
    assert "GIVEN" not in os.environ
