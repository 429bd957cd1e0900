"""The input of a job: lines that are read as they are needed."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

from llmpq.cli.job_output import JobOutput
from llmpq.cli.prompts import no_prompts, read_lines
from llmpq.spec import UsageError

SAMPLE = 1000  # the first prompts, for which a plan is made where none is given
LONGEST = 32  # and of a file so many of its longest lines


class Line(NamedTuple):
    """Of the input, one that is not empty."""

    number: int  # from 0
    where: str  # for messages
    data: bytes


class JobInput:
    """The prompts of a file, or of standard input, that have no result yet: an iterator that reads as it goes on.

    sample: the first prompts, done or not, and of a file the longest; one is enough where a plan is given. total: how
    many there are, None if that is not known before all are read. left: whether there are any to be done. count: how
    many have been read.
    """

    def __init__(self, source: str, output: JobOutput, planned: bool) -> None:
        """Raises UsageError if there are none, or if they are not those that `output` has results of."""
        self._output, self.count = output, 0
        self.total: int | None = None
        longest: list[Line] = []
        if os.path.isfile(source):
            self._checked = 0
            longest = heapq.nlargest(LONGEST, map(self._check, _lines(source)), key=lambda line: len(line.data))
            self.total = self._checked
            output.check_count(self.total)
        lines = _lines(source)
        first = list(islice(lines, 1 if planned else SAMPLE))
        if not first:
            raise UsageError(no_prompts(source))
        self.sample = first if planned else first + [line for line in longest if line.number >= SAMPLE]
        undone = self._undone(chain(first, lines))
        next_one = list(islice(undone, 1))
        self.left = bool(next_one)
        self._rest = chain(next_one, undone)

    def __iter__(self) -> Iterator[Line]:
        return self._rest

    def _check(self, line: Line) -> Line:
        self._output.has(line.number, line.data)
        self._checked += 1
        return line

    def _undone(self, lines: Iterable[Line]) -> Iterator[Line]:
        for line in lines:
            self.count += 1
            if not self._output.has(line.number, line.data):
                yield line


def _lines(source: str) -> Iterator[Line]:
    for index, (where, data) in enumerate(read_lines(source)):
        yield Line(index, where, data)
