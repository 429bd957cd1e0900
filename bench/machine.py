"""What a result was measured on, and how results are written: every file names device, versions, commit and date."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
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


def _commit() -> str:
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip()

    dirty = " with changes" if git("status", "--porcelain", "--", "csrc", "llmpq", "planner", "bench/*.py") else ""
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + dirty


def describe() -> dict[str, Any]:
    """Device, versions, commit and date, for the head of a result file."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "device": gpu or processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write as JSON."""
    Path(path).write_text(json.dumps(results, indent=1) + "\n")
