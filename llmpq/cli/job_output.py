"""The results of a job: a JSONL file that is added to as prompts are done, and that another run can go on with.

Each line has an `id`: the prompt's place, and digests of the model, of the options, of the plan's weights and of the
prompt's line. So a file says by itself what is done and for which job, and nothing beside it has to be kept in step.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import stat
import threading
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from llmpq.cli.output_files import append_whole
from llmpq.spec import UsageError
from llmpq.spec.json_file import opened

_DIGEST = "([0-9a-f]{8})"
_ID = re.compile(f"([0-9]{{1,9}})-{_DIGEST}-{_DIGEST}-{_DIGEST}-([0-9a-f]{{16}})")


class Job(NamedTuple):
    """What the results of a job depend on beside its prompts, as digests."""

    model: str
    options: str


def digest(value: Any, size: int = 4) -> str:
    """Of bytes, or of what JSON can write: `size` bytes in hexadecimal."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.blake2b(data, digest_size=size).hexdigest()


class JobOutput:
    """The file at `path`. A context manager; its methods may be called from any thread.

    answered, failed: how many prompts have an answer, and an error in its place; `first_error` is the first of these.
    """

    def __init__(self, path: str, resume: bool) -> None:
        """Read what an earlier run has left, if `resume`. Nothing is changed before `begin`.

        Raises UsageError if there are results and nothing is said of them, or if they are not a job's.
        """
        self.answered, self.failed = 0, 0
        self.first_error = ""
        self._path, self._end, self._weights = path, 0, ""
        self._lines = array("Q")  # by its place the digest of each prompt that is done; 0: it is not
        self._marks: set[tuple[str, str, str]] = set()  # digests of model, options and weights
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        if not os.path.isfile(path):
            if resume and os.path.exists(path):
                raise UsageError(f"--resume reads --output, and {path} is no file; leave --resume out")
            return
        self._descriptor = self._open()
        try:
            if resume:
                self._read()
            elif os.path.getsize(path):
                raise UsageError(f"{path} holds something; --resume goes on with a job, or name another --output")
        except BaseException:
            self.close()
            raise

    @property
    def done(self) -> int:
        """How many prompts have a result."""
        return self.answered + self.failed

    def check(self, job: Job, source: str) -> None:
        """Raise UsageError if the results are another job's."""
        for model, options, _ in self._marks:
            if model != job.model:
                raise UsageError(f"{self._path} has results of another model; give that one, or another --output")
            if options != job.options:
                raise UsageError(
                    f"{self._path} was begun with other sampling options or --no-chat; give the same, or another "
                    "--output"
                )
        self._job, self._source = job, source

    def has(self, index: int, line: bytes) -> bool:
        """Whether a prompt is done. Raises UsageError if what is done in its place is another line."""
        known = self._lines[index] if index < len(self._lines) else 0
        if not known:
            return False
        if known != _number(line):
            raise UsageError(
                f"{self._path} has the result of another prompt than number {index + 1} of {self._source}; give the "
                "prompts that it was begun with, or another --output"
            )
        return True

    def check_count(self, prompts: int) -> None:
        """Raise UsageError if there are results of more prompts than there are."""
        if len(self._lines) > prompts:
            raise UsageError(
                f"{self._path} has results of {len(self._lines)} prompts, and {self._source} only {prompts}; give the "
                "prompts that it was begun with, or another --output"
            )

    def begin(self, weights: str) -> bool:
        """Write from now on, of a plan whose weights have this digest; whether all results so far are of such a plan.

        A line that was cut off goes. Raises UsageError.
        """
        self._weights = weights
        if self._descriptor is None:
            self._descriptor = self._open()
            found = os.fstat(self._descriptor)
            if stat.S_ISREG(found.st_mode) and found.st_size:
                raise UsageError(f"another run has begun {self._path}; name another --output, or go on with --resume")
        elif os.fstat(self._descriptor).st_size > self._end:
            try:
                os.ftruncate(self._descriptor, self._end)
            except OSError as error:
                raise UsageError(f"cannot write {self._path}: {error.strerror}") from None
        return all(known == weights for _, _, known in self._marks)

    def go_on(self, weights: str) -> None:
        """Write from now on of a plan whose weights have this digest."""
        with self._lock:
            self._weights = weights

    def write(self, index: int, line: bytes, results: Sequence[Mapping[str, Any]], error: str | None = None) -> None:
        """Add what became of a prompt: one result, or one for each of its answers, the first of them last.

        So a prompt whose first answer is there is done. Raises UsageError; the lines before are whole then.
        """
        with self._lock:
            identity = f"{index}-{self._job.model}-{self._job.options}-{self._weights}-{_number(line):016x}"
            text = "".join(json.dumps({**result, "id": identity}) + "\n" for result in reversed(results))
            if self._descriptor is None:
                raise ValueError("the file is not open")
            try:
                self._end += append_whole(self._descriptor, text.encode(), self._end)
            except OSError as problem:
                raise UsageError(
                    f"cannot write {self._path} beyond byte {self._end}: {problem.strerror}; what is done is in it, "
                    "and --resume goes on"
                ) from None
            self._count(error)

    def _count(self, error: str | None) -> None:
        self.answered += error is None
        self.failed += error is not None
        self.first_error = self.first_error or error or ""

    def _open(self) -> int:
        """Open it to add to it, a file for this process alone. Raises UsageError."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(f"cannot write {self._path}: {error.strerror}") from None
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise UsageError(f"another run writes {self._path}; wait for it, or name another --output") from None
            except OSError:  # a file system without locks
                pass
        return descriptor

    def _read(self) -> None:
        """Take in the results that are there, but for those of the last prompt if it is not whole."""
        end = 0
        with opened(self._path) as file:
            for number, line in enumerate(file, 1):
                end += len(line)
                if line.endswith(b"\n"):
                    self._take(line, number, end)

    def _take(self, line: bytes, number: int, end: int) -> None:
        try:
            value = json.loads(line)
            found = _ID.fullmatch(value["id"])
            error = value.get("error")
        except (ValueError, TypeError, KeyError, RecursionError):
            found = None
        if found is None:
            raise UsageError(
                f"{self._path}, line {number} is no result of a job; name another --output, or leave that line out"
            )
        if value.get("choice", 0):
            return
        place, *marks, prompt = found.groups()
        index = int(place)
        self._lines.frombytes(bytes(max(0, index + 1 - len(self._lines)) * self._lines.itemsize))
        if self._lines[index]:
            raise UsageError(f"{self._path}, line {number} is a second result of prompt {index + 1}; leave one out")
        self._lines[index] = int(prompt, 16)
        self._marks.add((marks[0], marks[1], marks[2]))
        self._count(error.get("message", "") if isinstance(error, dict) else error)
        self._end = end

    def close(self) -> None:
        """Write no more."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                with suppress(OSError):
                    os.close(descriptor)

    def __enter__(self) -> JobOutput:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def _number(line: bytes) -> int:
    """The digest of a prompt's line, which is not 0."""
    return int(digest(line, 8), 16) or 1
