"""Temporary folders: gone when they are closed, or when their process is dead, and never before."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from llmpq.runtime.engine import Engine
from llmpq.spec import UsageError
from llmpq.temporary import TemporaryFolder, remove_abandoned, working_folder
from tests.support.pipelines import load_spec, make_plan, tiny_model


def test_a_folder_is_there_until_it_is_closed(tmp_path: Path) -> None:
    folder = TemporaryFolder(tmp_path)
    assert folder.path.parent == tmp_path and folder.path.stat().st_mode & 0o777 == 0o700
    (folder.path / "file").write_text("")
    with TemporaryFolder(tmp_path) as other:
        assert other != folder.path and folder.path.is_dir()
    assert not other.exists() and folder.path.is_dir()
    folder.close()
    folder.close()
    dropped = TemporaryFolder(tmp_path)
    if os.fork() == 0:
        dropped.close()
        os._exit(0)
    os.wait()
    assert dropped.path.is_dir()
    del dropped
    assert not list(tmp_path.iterdir())


def test_only_what_is_one_s_own_and_abandoned_is_removed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in ("llmpq-dead.lock", "llmpq-alone.lock", "other.lock"):
        (tmp_path / name).write_text("")
    for name in ("llmpq-dead", "llmpq-unlocked", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "llmpq-link.lock").symlink_to(precious)
    (tmp_path / "llmpq-link").symlink_to(precious)
    if os.geteuid() == 0:
        (tmp_path / "llmpq-foreign.lock").write_text("")
        (tmp_path / "llmpq-foreign").mkdir()
        os.chown(tmp_path / "llmpq-foreign.lock", 65534, 65534)
    before = {path.name for path in tmp_path.iterdir()}
    with TemporaryFolder(tmp_path) as alive:
        remove_abandoned(tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
    assert left == before - {"llmpq-dead.lock", "llmpq-dead", "llmpq-alone.lock"} | {alive.name, f"{alive.name}.lock"}


def test_no_place_for_a_working_folder_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="cannot write temporary files: No such file or directory; set TMPDIR"):
        working_folder()


def test_a_run_without_room_for_its_files_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint = tiny_model(tmp_path / "model", "llama-gqa")
    spec = load_spec(checkpoint)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        with pytest.raises(UsageError, match="cannot write temporary files: File too large; set TMPDIR"):
            Engine(make_plan(spec, [2, 1], 1, 1), checkpoint, spec)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
