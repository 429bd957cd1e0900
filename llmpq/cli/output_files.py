"""Files that a user wants written: refused before work is spent on them; errors are one line. Text is UTF-8."""

from __future__ import annotations

import os
from pathlib import Path

from llmpq.spec import UsageError


def check_writable(*paths: str | Path | None, instead: str = "") -> None:
    """Refuse output files that cannot be written before minutes of work are spent on their content.

    `instead` says what else could be done. Raises UsageError.
    """
    remedy = f"; {instead}" if instead else ""
    for path in paths:
        if path is None:
            continue
        problem = _problem(Path(path).absolute())
        if problem is not None:
            raise UsageError(f"cannot write {path}: {problem}{remedy}")


def _problem(target: Path) -> str | None:
    """What keeps a file from being written, if anything does."""
    if target.is_dir():
        return "it is a folder"
    if not target.parent.is_dir():
        return f"there is no folder {target.parent}"
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        return "permission is denied"
    return None


def write_text(path: str, text: str) -> None:
    """Write a file. Raises UsageError."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
