"""What a model's user should know is said once, on every way in."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llmpq import LLM
from llmpq.cli.options import read_model
from tests.support.tiny_models import save_model


def test_tied_tables_that_differ_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path, "llama-tied")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path, {"format": "pt"})
    capsys.readouterr()
    read_model(Namespace(model=str(tmp_path), load_format="auto"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llmpq: ") and "the two differ in its files" in line
    with pytest.warns(UserWarning, match="the two differ in its files"):
        LLM(str(tmp_path))
