"""Reading JSON that somebody else may have written: whatever is wrong with the file is one UsageError."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llmpq.spec.errors import UsageError
from llmpq.spec.ranges import shown

MOST_BYTES = 2**28


def read_json(path: str | Path) -> Any:
    """The value in a JSON file, in UTF-8, UTF-16 or UTF-32, with or without a byte order mark; NaN is a number here.

    Raises UsageError, naming the file: where there is none, or a folder or device; for more than MOST_BYTES; for what
    is not JSON or nested too deeply; for a key that an object has twice.
    """
    data = read_file(path)
    if not data:
        raise UsageError(f"{path} is empty")
    try:
        return json.loads(data, object_pairs_hook=distinct)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not JSON: not text in {error.encoding} from byte {error.start} on") from None
    except RecursionError:
        raise UsageError(f"{path} is not JSON that can be read: it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    except ValueError as error:  # a number of thousands of digits, and what `distinct` raises
        raise UsageError(f"{path} cannot be read: {error}") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UsageError, as `read_json` does."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object")
    return value


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as an `object_pairs_hook`. Raises ValueError for a key that comes twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"an object has the key {shown(twice)} twice; leave one of them out")
    return value


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """A file or pipe to read from. A pipe that nobody writes to is empty, so that nothing waits for it.

    Raises UsageError, naming the file, also for what goes wrong in the block.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            mode = os.fstat(number).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
                raise UsageError(f"cannot read {path}: it is a {'folder' if stat.S_ISDIR(mode) else 'device'}, no file")
            os.set_blocking(number, True)
            with open(number, "rb", closefd=False) as file:
                yield file
        finally:
            os.close(number)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # a name that no file can have
        raise UsageError(f"cannot read {shown(str(path))}: {error}") from None


def read_file(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of what is `opened`. Raises UsageError; also for more than `most` bytes."""
    data = bytearray()  # it grows with the file: reading `most` bytes at once would take as much memory
    with opened(path) as file:
        while len(data) <= most and (block := file.read(2**20)):
            data += block
    if len(data) > most:
        raise UsageError(f"cannot read {path}: it is larger than {most} bytes")
    return bytes(data)
