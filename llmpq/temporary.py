"""Temporary folders that go even if their process is killed: then the next one that makes some removes them."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from llmpq.spec import UsageError

_PREFIX, _LOCK = "llmpq-", ".lock"


class TemporaryFolder:
    """A new folder at `path`, for this user only. A context manager; `close`, `del` and the process's end remove it.

    A locked file beside it shows that its process lives: the system gives the lock up when the process ends, however it
    does. Raises OSError.
    """

    def __init__(self, parent: Path) -> None:
        remove_abandoned(parent)
        descriptor, lock = _locked_file(parent)
        self.path = lock.with_suffix("")
        self._close = weakref.finalize(self, _close, descriptor, lock, os.getpid())
        try:
            self.path.mkdir(mode=0o700)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Remove the folder."""
        self._close()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def working_folder() -> TemporaryFolder:
    """A folder for the files of one run, where the system keeps such. Raises UsageError."""
    with writing_there():
        return TemporaryFolder(Path(tempfile.gettempdir()))


@contextmanager
def writing_there() -> Iterator[None]:
    """An OSError of files in a working folder becomes a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write temporary files: {error.strerror}; set TMPDIR to a folder with free space"
        ) from None


def remove_abandoned(parent: Path) -> None:
    """Remove the folders there whose processes were killed, as far as they are this user's."""
    for lock in parent.glob(f"{_PREFIX}*{_LOCK}"):
        with suppress(OSError):
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(lock)
            finally:
                os.close(descriptor)


def _locked_file(parent: Path) -> tuple[int, Path]:
    while True:
        descriptor, name = tempfile.mkstemp(_LOCK, _PREFIX, parent)
        with suppress(OSError):  # some file systems know no locks: nothing there looks abandoned
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Before it was locked, it looked like that of a dead process.
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)


def _close(descriptor: int, lock: Path, owner: int) -> None:
    """Not in a forked process."""
    if os.getpid() == owner:
        _remove(lock)
    os.close(descriptor)


def _remove(lock: Path) -> None:
    """The folder first: what is left of it is still found by its lock."""
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    lock.unlink(missing_ok=True)
