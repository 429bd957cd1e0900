"""What the tests of the command line have in common."""

from __future__ import annotations

from pathlib import Path

DEVICES = "cpu:memory=64MiB;cpu:isa=portable,memory=64MiB,name=small"
WORKLOAD = ["--prompt-len", "12", "--output-len", "8", "--batch-size", "2"]


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)
