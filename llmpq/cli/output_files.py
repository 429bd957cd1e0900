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
        target = Path(path).absolute()
        place = target if target.exists() else target.parent
        if target.is_dir() or not os.access(place, os.W_OK):
            raise UsageError(f"cannot write {path}: {place} cannot be written to{remedy}")


def write_text(path: str, text: str) -> None:
    """Write a file. Raises UsageError."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
