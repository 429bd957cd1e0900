"""One contender as a process: it loads a model once, then answers one command a line.

    python -m bench.end_to_end.child MODULE JOB

MODULE is a module beside this one whose `load(job)` makes a Runner; JOB is a Job as JSON. A command is a JSON object:
`do` names a method of Runner, the rest are its arguments. The answer is the method's value as a line of JSON, or
{"error": reason}; the first line answers the loading. What libraries print goes to standard error. The end of the
commands is the end.

This imports the standard library only: a rival may live in an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol, TextIO

from bench.reasons import reason


@dataclass(frozen=True)
class Job:
    """What a contender loads. Of the files, each reads the one in its format."""

    model: str  # as `llmpq --model` takes it
    folder: str  # transformers' form, float32 or float16, with a tokenizer
    gguf: str
    work: str  # where a contender keeps the forms that it makes itself
    threads: int
    options: dict[str, Any] = field(default_factory=dict)
    quantizer: str = "rtn"  # of ours


class Runner(Protocol):
    """A loaded model."""

    def prepare(self, batch: int, length: int) -> None:
        """Make ready for batches of so many sequences of at most `length` tokens, new ones included."""

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> dict[str, Any]:
        """Continue equally long prompts greedily by `output` tokens each, past any end of sequence.

        prefill_s: until each sequence has its first new token; decode_s: from then to the last one.
        """

    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """For each window the log-probabilities (nats) of its tokens but the first."""


COMMANDS = ("prepare", "generate", "score")


def serve(runner: Runner, commands: Iterable[str], answers: TextIO) -> None:
    """Answer commands until there are no more. One that fails is answered by why."""
    for line in commands:
        command = json.loads(line)
        do = command.pop("do")
        try:
            if do not in COMMANDS:
                raise ValueError(f"there is no command {do!r}")
            answer = getattr(runner, do)(**command)
        except Exception as error:  # whatever it is, the other side lists it
            answer = {"error": reason(error)}
        print(json.dumps(answer), file=answers, flush=True)


def main(module: str, job: str) -> None:
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # engines that print must not answer
        try:
            runner: Runner = import_module(module).load(Job(**json.loads(job)))
        except Exception as error:
            print(json.dumps({"error": reason(error)}), file=answers, flush=True)
            return
        print("{}", file=answers, flush=True)
        serve(runner, sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
