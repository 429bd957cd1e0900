"""The process that follows grammars for the last stage: see answer_grammar.py, which starts it and talks to it.

Its commands are JSON, one to a line, on its standard input: "vocabulary", a text of `packed`; "sampling", whose grammar
the next answer in a "slot" keeps to; "token", the next one of the answer in a "slot". Upon the last two it answers with
a Next, as `sent` writes it. It ends with its input.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
from typing import IO

from llmpq.runtime.grammar import Ending, Grammar, Grammars, Next, unpacked
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import UsageError

_HEAD = struct.Struct("<BBI")
_ENDINGS: tuple[Ending | None, ...] = (None, "stop", "length")
_NONE = Next(b"", False, "length")  # of a grammar that is none here: versions of the library may differ


def send(found: Next, out: IO[bytes]) -> None:
    out.write(_HEAD.pack(found.may_end, _ENDINGS.index(found.ended), len(found.tokens)) + found.tokens)
    out.flush()


def receive(source: IO[bytes]) -> Next | None:
    """What `send` has sent; None at the end."""
    head = source.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    may_end, ended, length = _HEAD.unpack(head)
    return Next(source.read(length), bool(may_end), _ENDINGS[ended])


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))  # a stage's cap is for its own memory
    grammars: Grammars | None = None
    answers: dict[int, Grammar] = {}
    for line in sys.stdin.buffer:
        command = json.loads(line)
        if "vocabulary" in command:
            grammars = Grammars(unpacked(command["vocabulary"]))
            continue
        slot = command["slot"]
        if "token" in command:
            answer = answers.get(slot)
            found = _NONE if answer is None else answer.add(command["token"])
        else:
            answers.pop(slot, None)
            found = _NONE
            try:
                if grammars is not None:
                    answers[slot] = grammars.start(SamplingParams.from_dict(command["sampling"]))
                    found = answers[slot].next
            except UsageError as error:
                print(f"a grammar that was taken before is none here: {error}", file=sys.stderr)
        send(found, sys.stdout.buffer)
