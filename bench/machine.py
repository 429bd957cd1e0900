"""What a result was measured on, and how results are written: every file names device, versions, commit and date."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import torch

from llmpq.kernels import version

ROOT = Path(__file__).parent.parent


def processor() -> str:
    """The processor's name, family and model, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    name = named.get("model name", platform.machine())
    return f"{name} (family {named.get('cpu family', '?')}, model {named.get('model', '?')})"


_CODE = (".py", ".cpp", ".h", ".cu", ".cuh")
_SOURCES = ("csrc", "llmpq", "planner", "bench/*.py")


def commit(root: Path = ROOT) -> str:
    """The commit of the sources; with changes, or without git, a name of their contents as well."""

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return ""
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip()

    head, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--", *_SOURCES)
    if head and not changed:
        return head
    return f"{head} with changes {_contents(root)}" if head else f"unknown, contents {_contents(root)}"


def _contents(root: Path) -> str:
    """12 hex digits that change with the sources."""
    digest = hashlib.sha256()
    for folder, suffixes in (("csrc", _CODE), ("llmpq", (".py", ".json")), ("planner", (".py",)), ("bench", _CODE)):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in suffixes:
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def describe() -> dict[str, Any]:
    """Device, versions, commit and date, for the head of a result file."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "device": gpu or processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for distribution in distributions:
        with suppress(PackageNotFoundError):
            found[distribution] = importlib.metadata.version(distribution)
    return found


def as_json(results: dict[str, Any]) -> str:
    """JSON with a line for each field, and a line for each element of those that are lists of records."""

    def field(value: Any) -> str:
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            return "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        return json.dumps(value)

    return "{\n" + ",\n".join(f" {json.dumps(name)}: {field(value)}" for name, value in results.items()) + "\n}\n"


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write as JSON; whoever reads the file meanwhile sees all of the old one or all of the new one."""
    partial = Path(f"{path}.partial")
    partial.write_text(as_json(results))
    os.replace(partial, path)
