"""A plugin of pytest for runs that may be cut short: tests that passed before are not run again.

    LLMPQ_TEST_RECORD=FILE LLMPQ_TEST_SOURCES=NAME python -m pytest -p tests.support.resume ...

FILE gets a line of JSON as soon as a test has ended: how, in how many seconds, and why if it did not pass. Lines of
other sources than NAME count for nothing. Under pytest-xdist a process whose CUDA context is lost is replaced, so that
the tests after the one that lost it are judged by themselves.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest

_KEPT = 3000  # characters at the end of a reason
_LOST = ("an illegal memory access", "unspecified launch failure", "misaligned address", "device-side assert")
_SIZE = "LLMPQ_TEST_RECORD_BYTES"  # of what was there at first; a process that begins later must find the same tests
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def _path() -> Path:
    return Path(os.environ["LLMPQ_TEST_RECORD"])


def _sources() -> str:
    return os.environ.get("LLMPQ_TEST_SOURCES", "")


def pytest_configure() -> None:
    if not _IS_WORKER:
        os.environ[_SIZE] = str(_path().stat().st_size if _path().exists() else 0)


def passed() -> set[str]:
    """The tests that passed or were skipped when they were last run."""
    if not (size := int(os.environ[_SIZE])):
        return set()
    last = {}
    with _path().open("rb") as record:
        for line in record.read(size).splitlines():
            with suppress(ValueError):  # of a line that was cut off
                row = json.loads(line)
                if row["sources"] == _sources():
                    last[row["test"]] = row["outcome"]
    return {test for test, outcome in last.items() if outcome != "failed"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = passed()
    if done := [item for item in items if item.nodeid in known]:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in known]


@pytest.hookimpl(trylast=True)  # what tells the controlling process comes first
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    reason = "" if report.passed else str(report.longrepr)
    if not _IS_WORKER and (report.when == "call" or not report.passed):
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        row |= {"reason": reason[-_KEPT:]} if reason else {}
        with _path().open("a") as record:
            record.write(json.dumps(row | {"sources": _sources()}) + "\n")
    if _IS_WORKER and report.failed and any(words in reason for words in _LOST):
        os._exit(1)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """That no test is left is no failure."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and passed():
        session.exitstatus = pytest.ExitCode.OK
