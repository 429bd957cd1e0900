"""Models of a hub: what is downloaded, and what is said where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from llmpq.checkpoint.model_files import resolve

READ = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
OTHERS = [
    "README.md",
    "consolidated.safetensors",
    "original/model.safetensors",
    "fp16/model.safetensors",
    "metal/x.json",
]


@pytest.mark.parametrize(("load_format", "wanted"), [("auto", READ + WEIGHTS), ("dummy", READ + WEIGHTS[2:])])
def test_of_a_hub_model_the_weights_are_downloaded_once(
    load_format: Any, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(model: str, **patterns: Any) -> str:
        """By the hub's own rule, of a repository that has the weights several times, as Mistral's and gpt-oss have."""
        for name in filter_repo_objects(READ + WEIGHTS + OTHERS, **patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(json.dumps(model))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name", load_format).path == tmp_path
    found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(found) == sorted(wanted)


def test_a_hub_model_without_a_hub_is_refused(tmp_path: Path) -> None:
    script = (
        "from llmpq.checkpoint.model_files import resolve\n"
        "from llmpq.spec import UsageError\n"
        "try:\n    resolve('owner/name')\n"
        "except UsageError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert "owner/name: no model hub is reachable and there is no local copy; give a local folder" in result.stdout
    assert result.stdout.count("\n") == 1
