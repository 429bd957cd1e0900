"""The tool that damages files: what it counts, and that a file is known by its kind, number and seed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench.faults import files
from bench.faults.files import KINDS, damage, ending_of
from bench.faults.originals import write_originals
from llmpq.spec import DeviceMemoryError, UsageError


def test_endings_are_told_apart() -> None:
    def read(error: BaseException | None) -> str:
        def door() -> None:
            if error is not None:
                raise error

        return ending_of(door)[0]

    assert read(None) == read(UsageError("x" * 9999)) == "ended_well"
    assert read(ValueError("x")) == read(DeviceMemoryError("x")) == read(SystemExit(2)) == "tracebacks"
    assert read(files.Lost("x")) == "lost" and read(files.Doubled("x")) == "doubled"


@pytest.mark.slow
def test_whole_files_are_read_and_damage_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "cache"))
    originals = tmp_path / "originals"
    originals.mkdir()
    write_originals(originals)
    for kind in KINDS:
        assert ending_of(lambda read=kind.read: read(originals)) == ("ended_well", "read")
        found = []
        for number in (0, 0, 1, 2):
            folder = tmp_path / "files"
            shutil.copytree(originals, folder)
            damage(folder, kind, number, 0)
            path = folder / kind.file
            found.append(path.read_bytes() if path.is_file() else b"")
            shutil.rmtree(folder)
        assert found[0] == found[1] and len({*found, (originals / kind.file).read_bytes()}) > 2


@pytest.mark.slow
def test_a_damaged_file_of_each_kind_ends_well() -> None:
    counts = files.inject(0, len(KINDS))
    assert [kind.injected for kind in counts] == [1] * len(KINDS)
    assert not [failure for kind in counts for failure in kind.failures]
