"""Files are written whole or not at all, with the modes that a user expects, and where they cannot be, in place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmpq.spec import UsageError
from llmpq.spec.files import write_text

FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"  # of a file: as if the disk were full


def test_a_file_is_replaced_with_its_mode_and_behind_its_link(tmp_path: Path) -> None:
    path, link, new = tmp_path / "a", tmp_path / "link", tmp_path / "new"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path.name)
    before = os.umask(0o027)
    try:
        write_text(link, "größer \udc80")
        write_text(new, "")
    finally:
        os.umask(before)
    assert path.read_text(encoding="utf-8") == "größer \\udc80" and link.is_symlink()
    assert [file.stat().st_mode & 0o777 for file in (path, new)] == [0o640, 0o640]
    assert sorted(tmp_path.iterdir()) == [path, link, new]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    code = f"{FULL}; from llmpq.spec.files import write_text; write_text({str(path)!r}, 'x' * 2000)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"UsageError: cannot write {path}: File too large" in found.stderr
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_replaced_is_written_where_it_is(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    write_text(f"/dev/fd/{writing}", "through a pipe")
    assert os.read(reading, 100) == b"through a pipe"
    with pytest.raises(UsageError, match="cannot write /dev/full: No space left on device"):
        write_text("/dev/full", "x")
    for path in (tmp_path, tmp_path / "no" / "a", tmp_path / ("x" * 300)):
        with pytest.raises(UsageError, match="cannot write"):
            write_text(path, "x")
