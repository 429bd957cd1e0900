"""Output files: what keeps one from being written is said before anything is done; lines are in a file one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from llmpq.cli.output_files import JsonLines, check_files
from llmpq.spec import UsageError
from tests.spec.test_files import FULL


def test_files_that_can_be_written_and_are_apart_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "in").write_text("in")
    check_files(
        Namespace(out=str(tmp_path / "old"), output="/dev/null", trace="/dev/null", plan=str(tmp_path / "in")),
        tmp_path / "new",
    )
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old": "old", "in": "in"}


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "a", "there is no folder"),
        (tmp_path / ("x" * 256), "File name too long"),
        (Path("/proc/x"), "No such file or directory"),
    ):
        with pytest.raises(UsageError, match=f"cannot write .*: {why}"):
            check_files(Namespace(json_out=str(path)))
    with pytest.raises(UsageError, match="it is a folder; name another --log, or --no-log"):
        check_files(Namespace(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_an_input_or_another_output_is_refused(tmp_path: Path) -> None:
    given, link, hard = tmp_path / "a", tmp_path / "link", tmp_path / "hard"
    given.write_text("")
    link.symlink_to(given)
    os.link(given, hard)
    for output in (given, link, hard, tmp_path / "." / "a"):
        for option in ("plan", "costs", "prompts", "refit", "model", "log"):
            with pytest.raises(UsageError, match=f"--out and --{option} are one file, .*; name another"):
                check_files(Namespace(out=str(output), **{option: str(given)}))
    new = str(tmp_path / "new")
    with pytest.raises(UsageError, match="--json-out and --output are one file"):
        check_files(Namespace(output=new, json_out=str(tmp_path / "x" / ".." / "new")))
    with pytest.raises(UsageError, match="--log and --trace are one file"):
        check_files(Namespace(trace=new), Path(new))


def test_each_line_is_there_once_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("old\n" * 1000)
    with JsonLines(str(path)) as lines:
        for i in range(3):
            lines.write({"i": i, "text": "東\x1b"})
            assert [json.loads(line)["i"] for line in path.read_bytes().split(b"\n")[:-1]] == list(range(i + 1))
        lines.check()
    assert b"\x1b" not in path.read_bytes()
    with JsonLines(None) as nowhere:
        nowhere.write({})


def test_a_full_disk_leaves_whole_lines_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    code = f"""{FULL}
from llmpq.cli.output_files import JsonLines
with JsonLines({str(path)!r}) as lines:
    for i in range(5):
        lines.write('x' * (10 if i == 4 else 398))
    lines.check()
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"cannot write {path} beyond byte 802: File too large; the rest is printed" in found.stderr
    assert [json.loads(line) for line in path.read_text().splitlines()] == ["x" * 398] * 2
