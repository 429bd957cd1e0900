"""How files are written: whole, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from llmpq.spec.errors import UsageError

TEMPORARY = ".llmpq-"  # that names of files begin with until they are whole


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file so that it is the old one or the new one, whatever happens. Raises UsageError.

    What cannot be replaced is written where it is: a pipe or device, what is open as /dev/stdout or the like, and a
    file in a folder that may not be written.
    """
    try:
        if written_in_place(path):
            Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
        else:
            _replace(Path(os.path.realpath(path)), text)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def written_in_place(path: str | Path) -> bool:
    """Whether `write_text` writes into the file itself. Raises OSError."""
    target = Path(path)
    if not target.exists():
        return False
    is_open = os.path.abspath(path).startswith(("/dev/", "/proc/"))
    return is_open or not target.is_file() or not os.access(os.path.dirname(os.path.realpath(path)), os.W_OK)


def temporary_beside(target: Path) -> Path:
    """A name in the same folder that nobody else has; short, whatever the target's is."""
    return target.with_name(f"{TEMPORARY}{secrets.token_hex(6)}")


def _replace(target: Path, text: str) -> None:
    temporary = temporary_beside(target)
    try:
        with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # before it has the name; else a crash may leave an empty file under it
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
