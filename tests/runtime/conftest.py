"""The small model that tests of lost devices share, and what they leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmpq.checkpoint.model_files import Checkpoint
from llmpq.spec import ModelSpec
from tests.support.lost_devices import worker_pids
from tests.support.pipelines import load_spec, tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """With a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMPQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tiny_model(tmp_path_factory.mktemp("model"), "llama-gqa")


@pytest.fixture(scope="module")
def spec(checkpoint: Checkpoint) -> ModelSpec:
    return load_spec(checkpoint)


@pytest.fixture
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, and no folder."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    before = worker_pids()  # of other tests, which share them
    yield
    assert list(folder.glob("llmpq-*/")) == []
    assert worker_pids() <= before
