"""The process that follows grammars for the last stage: see answer_grammar.py, which starts it and talks to it.

Its commands are JSON, one to a line, on its standard input. First "vocabulary", a text of `packed`. Then "sampling",
whose grammar the next answer in a "slot" keeps to; "token", the next one of the answer in a "slot". Upon these two it
answers with a Next, as `send` writes it. It ends with its input.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
from collections.abc import Callable
from typing import IO, Any

from llmpq.runtime.grammar import ENDINGS, Grammar, Grammars, Next, unpacked
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import UsageError

_HEAD = struct.Struct("<BBII")


def send(found: Next, out: IO[bytes]) -> None:
    problem = found.problem.encode()
    head = _HEAD.pack(found.may_end, ENDINGS.index(found.ended), len(found.tokens), len(problem))
    out.write(head + found.tokens + problem)
    out.flush()


def receive(read: Callable[[int], bytes]) -> Next:
    """What `send` has sent. `read` returns the next bytes, as many as it is asked for."""
    may_end, ended, length, problem_length = _HEAD.unpack(read(_HEAD.size))
    return Next(read(length), bool(may_end), ENDINGS[ended], read(problem_length).decode())


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))  # a stage's cap is for its own memory
    first = sys.stdin.buffer.readline()
    if not first:
        return
    grammars, answers = Grammars(unpacked(json.loads(first)["vocabulary"])), dict[int, Grammar]()
    for line in sys.stdin.buffer:
        send(_next(json.loads(line), grammars, answers), sys.stdout.buffer)


def _next(command: dict[str, Any], grammars: Grammars, answers: dict[int, Grammar]) -> Next:
    """What may follow in a slot, upon a command; `answers` are those in the slots."""
    slot = command["slot"]
    if "token" in command:
        return answers[slot].add(command["token"])
    try:
        answers[slot] = grammars.start(SamplingParams.from_dict(command["sampling"]))
    except UsageError as error:  # it was taken before, but versions of the library may differ
        return Next(b"", False, "length", str(error))
    return answers[slot].next
