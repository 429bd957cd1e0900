"""Where results that are slow to make are kept between runs: tokenizers, quantized weights, cost tables, sensitivities.

Everything here can be deleted at any time. The place is $LLMPQ_CACHE, else $XDG_CACHE_HOME/llmpq, else ~/.cache/llmpq.
Beyond $LLMPQ_CACHE_GIB (20) the results that were used longest ago go, but none that was in the last hour.

A result is a folder KIND/KEY. One of its files, the manifest, holds size and checksum of each of the others. It is made
in a temporary folder, the manifest last, and moved to its place when it is whole. A result that is not what its
manifest says is not used. A cache that cannot be read or written is done without. Both are said once, in one line.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from llmpq.progress import warn_once
from llmpq.spec import Record, UsageError
from llmpq.temporary import TemporaryFolder, remove_abandoned

T = TypeVar("T")
R = TypeVar("R", bound=Record)

MANIFEST = "manifest.json"
_RECORD, _TEMPORARY = "record.json", ".tmp"
_CHUNK = 2**16  # bytes: what fits a core's cache is fastest
_LIMIT_GIB = 20.0
_IN_USE_S = 3600.0  # a result that was found so lately may be opened by its path yet


def folder() -> Path | None:
    """The cache's folder, which may not exist. None, which is said once, if there is no home for it."""
    named = os.environ.get("LLMPQ_CACHE")
    try:
        return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "llmpq").expanduser().absolute()
    except (RuntimeError, OSError):  # no such user, or no current folder
        warn_once("there is no home folder to keep a cache in; going on without one. Set LLMPQ_CACHE to a folder")
        return None


def find(kind: str, key: str, read: Callable[[Path], T]) -> T | None:
    """What `read` makes of the files of a result; None if there is none, or it is damaged.

    `read` may raise OSError, ValueError or UsageError: then it is damaged, too. What it returns must not need the files
    to stay where they are.
    """
    base = folder()
    if base is None:
        return None
    _tidy(base / kind)
    path = base / kind / key
    while (looked_at := _identity(path)) is not None:
        with suppress(OSError, ValueError, UsageError):
            found = read(path) if _is_whole(path) else None
            if found is not None and _identity(path) == looked_at:
                with suppress(OSError):
                    os.utime(path / MANIFEST)  # for _make_room
                return found
        if _identity(path) == looked_at:  # else another process has replaced it meanwhile
            warn_once(f"the cache {base} holds damaged results; they are made anew")
            return None
    return None


def keep(kind: str, key: str, write: Callable[[Path], object]) -> None:
    """Have `write` make the files of a result, in the folder it is given. It takes the place of what is there."""
    base = folder()
    if base is None:
        return
    place = base / kind
    try:
        (place / _TEMPORARY).mkdir(parents=True, exist_ok=True)
        _make_room(base)
        with TemporaryFolder(place / _TEMPORARY) as temporary:
            new = temporary / "new"
            new.mkdir()
            write(new)
            (new / MANIFEST).write_text(json.dumps(_checksums(new)))
            _move(new, place / key)
    except OSError as error:
        warn_once(
            f"cannot write the cache {base}: {error.strerror or error}; going on without it. Set LLMPQ_CACHE to a "
            "folder that can be written and has free space"
        )


def find_record(kind: str, key: str, record: type[R]) -> R | None:
    """The record that `keep_record` kept; None if there is none, or it is damaged."""
    return find(kind, key, lambda folder: record.load(folder / _RECORD))


def keep_record(kind: str, key: str, record: Record) -> None:
    """Keep a record as a result."""
    keep(kind, key, lambda folder: _write_record(folder / _RECORD, record))


def _write_record(path: Path, record: Record) -> None:
    path.write_text(json.dumps(record.to_dict(), indent=1) + "\n", encoding="utf-8")


@functools.cache
def _tidy(place: Path) -> None:
    """At a process's first look: remove what killed ones left."""
    remove_abandoned(place / _TEMPORARY)


@functools.cache
def _make_room(base: Path) -> None:
    """Before a process keeps its first result: remove those used longest ago, of all kinds, beyond the limit."""
    results, limit = [], _limit()
    for manifest in base.glob(f"*/*/{MANIFEST}"):
        with suppress(OSError, ValueError, TypeError, AttributeError):  # what is damaged is another's to deal with
            size = sum(size for size, _ in json.loads(manifest.read_bytes()).values())
            results.append((manifest.stat().st_mtime, size, manifest.parent))
    total, now = sum(size for _, size, _ in results), time.time()
    for used, size, path in sorted(results):
        if total <= limit or now - used < _IN_USE_S:
            return
        with suppress(OSError), TemporaryFolder(path.parent / _TEMPORARY) as temporary:
            path.rename(temporary / path.name)  # at once for those who look
        total -= size


def _limit() -> float:
    """Bytes."""
    named = os.environ.get("LLMPQ_CACHE_GIB", "")
    try:
        limit = float(named or _LIMIT_GIB)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise UsageError(f"LLMPQ_CACHE_GIB is {named!r}; it takes a number of GiB, 0 or more")
    return limit * 2**30


def _checksums(path: Path) -> dict[str, list[int]]:
    """Bytes and CRC-32 of each file below a folder, by name.

    CRC-32 finds every damage that is no one's intent, and zlib's is the fastest checksum that Python comes with.
    """
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file != path / MANIFEST)
    return {str(file.relative_to(path)): _checksum(file) for file in files}


def _checksum(path: Path) -> list[int]:
    size, crc, buffer = 0, 0, memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size, crc = size + count, zlib.crc32(buffer[:count], crc)
    return [size, crc]


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a result from another in its place; None if there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _is_whole(path: Path) -> bool:
    try:
        return bool(json.loads((path / MANIFEST).read_bytes()) == _checksums(path))
    except (OSError, ValueError):
        return False


def _move(new: Path, path: Path) -> None:
    """Put a folder in its place. Who reads what was there before goes on with it: only its name is gone."""
    for attempt in itertools.count():
        try:
            new.rename(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        with suppress(FileNotFoundError):  # another process has moved it
            path.rename(new.parent / f"old{attempt}")
