"""Files that a user wants written: what keeps them from it is said before work is spent on them. Text is UTF-8."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmpq.spec import UsageError
from llmpq.spec.files import temporary_beside, written_in_place

# The options that name files, of all commands.
_OUTPUTS = ("out", "output", "json_out", "trace", "html")
_INPUTS = ("model", "prompts", "plan", "costs", "cluster", "sensitivity", "lengths", "text", "refit", "log")


def check_files(arguments: Namespace, log: Path | None = None) -> None:
    """Refuse output files that cannot be written, or that are each other or an input.

    `log` is one more output; without it, that of --log is an input.

    Raises UsageError.
    """
    outputs = {name: Path(value) for name in _OUTPUTS if (value := getattr(arguments, name, None)) is not None}
    files = {name: Path(value) for name in _INPUTS if (value := getattr(arguments, name, None)) not in (None, "-")}
    if log is not None:
        files.pop("log", None)
        outputs["log"] = log
    for name, path in outputs.items():
        problem = _problem(path)
        if problem is not None:
            remedy = "; name another --log, or --no-log" if name == "log" else ""
            raise UsageError(f"cannot write {path}: {problem}{remedy}")
        for other, file in files.items():
            if _same(path, file):
                raise UsageError(f"{_option(name)} and {_option(other)} are one file, {path}; name another")
        files[name] = path


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _same(a: Path, b: Path) -> bool:
    """Whether two paths are one file, which may not be there yet; a device may be named twice."""
    with suppress(OSError):
        if a.exists() and b.exists():
            return a.is_file() and a.samefile(b)
    return os.path.realpath(a) == os.path.realpath(b)


def _problem(path: Path) -> str | None:
    """What keeps a file from being written, if anything does; found out by making one beside it."""
    try:
        if path.is_dir():
            return "it is a folder"
        if written_in_place(path):
            return None if os.access(path, os.W_OK) else "permission is denied"
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            return f"there is no folder {target.parent}"
        if target.exists() and not os.access(target, os.W_OK):
            return "permission is denied"
        for new in (temporary_beside(target), target):  # the target as well: its name may be too long
            if not new.exists():
                new.touch()
                new.unlink()
    except OSError as error:
        return error.strerror
    return None


def append_whole(descriptor: int, data: bytes, end: int) -> int:
    """Write to a file that ends at byte `end`: all of it, or nothing. Returns how many bytes. Raises OSError."""
    left = data
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except BaseException:
        with suppress(OSError):  # a pipe cannot be cut
            os.ftruncate(descriptor, end)
        raise
    return len(data)


class JsonLines:
    """A JSONL file that is written line by line: each is in it, and whole, before the next is begun.

    A context manager. A line that cannot be written is the end of the file, but of nothing else; `check` tells.
    """

    def __init__(self, path: str | None) -> None:
        """Empties the file; None: writes nowhere. Raises UsageError."""
        self._path, self._end = path, 0
        self._descriptor: int | None = None
        self._problem: OSError | None = None
        if path is not None:
            try:
                self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            except OSError as error:
                raise UsageError(f"cannot write {path}: {error.strerror}") from None

    def write(self, value: Any) -> None:
        """Add a line, unless an earlier one has failed."""
        if self._descriptor is None or self._problem is not None:
            return
        try:
            self._end += append_whole(self._descriptor, json.dumps(value).encode() + b"\n", self._end)
        except OSError as error:
            self._problem = error

    def write_all(self, values: Iterable[Any]) -> None:
        """A line for each."""
        for value in values:
            self.write(value)

    def check(self) -> None:
        """Raise UsageError if lines are missing."""
        if self._problem is not None:
            raise UsageError(
                f"cannot write {self._path} beyond byte {self._end}: {self._problem.strerror}; the rest is printed"
            )

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *details: object) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
