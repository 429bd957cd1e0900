"""A tiny model, and what the commands write of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmpq.cli.main import main
from tests.support import tiny_models
from tests.support.commands import DEVICES, WORKLOAD
from tests.support.jobs import save_model_and_plan


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.save_model(folder, "llama-gqa", torch.bfloat16, max_position_embeddings=128)
    return folder


@pytest.fixture(scope="session")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What profile, sensitivity and plan write."""
    folder = tmp_path_factory.mktemp("files")
    paths = {name: str(folder / f"{name}.json") for name in ("costs", "sensitivity", "plan")}
    common = ["--model", str(model)]
    mode = ["--activations", "a8x2"]
    assert main(["profile", *common, "--devices", DEVICES, *mode, *WORKLOAD, "--out", paths["costs"]]) == 0
    assert main(["sensitivity", *common, "--out", paths["sensitivity"]]) == 0
    known = ["--costs", paths["costs"], "--sensitivity", paths["sensitivity"]]
    devices = ["--devices", DEVICES, "--all-devices"]
    assert main(["plan", *common, *devices, *known, *mode, *WORKLOAD, "--out", paths["plan"]]) == 0
    return paths


@pytest.fixture(scope="session")
def job_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What jobs run: see tests.support.jobs."""
    folder = tmp_path_factory.mktemp("job-model")
    save_model_and_plan(folder)
    return folder
