"""Print the folders of tests that are nearest to what differs from the commit that this branch and main have in common.

`make check` runs them. Where nothing differs: those that test the data types, the planner and the project itself.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
USUAL = ("spec", "planner", "project")
OF_FOLDER = {"csrc": "kernels", "planner": "planner", "bench": "bench", "examples": "project"}


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def folder_of(path: str) -> str | None:
    """The folder below tests/ that is about a file of the project; None: there is none."""
    top, *below = Path(path).parts
    if top in OF_FOLDER:
        return OF_FOLDER[top]
    if top in ("llmpq", "tests") and len(below) > 1:
        return below[0] if (TESTS / below[0]).is_dir() and below[0] != "support" else None
    module = Path(path).stem
    return (module if (TESTS / module).is_dir() else "cli") if top == "llmpq" else None


def changed_folders() -> list[str]:
    common = git("merge-base", "HEAD", "main") or "HEAD"
    paths = [
        *git("diff", "--name-only", common).splitlines(),
        *git("ls-files", "-o", "--exclude-standard").splitlines(),
    ]
    found = {folder for folder in map(folder_of, paths) if folder} or set(USUAL)
    return sorted(f"tests/{folder}" for folder in found | {"project"})


if __name__ == "__main__":
    print(*changed_folders())
