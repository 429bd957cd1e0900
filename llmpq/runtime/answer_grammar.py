"""The grammars of answers, as the last stage asks for them: a process of its own follows them (grammar_host.py).

A vocabulary takes memory that no plan has counted, some hundred bytes for each token, and the library that follows
grammars ends its process where there is none.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import IO, Any, NoReturn

import numpy as np
import torch

from llmpq.progress import warn_once
from llmpq.runtime import grammar_host
from llmpq.runtime.grammar import Ending, Next, check_package
from llmpq.runtime.launch import end_with_us
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import GrammarLostError

START_S = 60.0  # for the process to start, take the vocabulary and answer for the first time
ANSWER_S = 10.0  # for each answer after that
_PROGRAM = (
    "import sys; sys.path.remove('') if '' in sys.path else None; "  # the current folder
    "from llmpq.runtime import grammar_host; grammar_host.main()"
)


class GrammarHost:
    """The process, with a vocabulary. It ends with the one that has started it, or when this object is gone."""

    def __init__(self, vocabulary: str) -> None:
        """`vocabulary`: as `packed`. Raises UsageError without llguidance, GrammarLostError as `ask`."""
        check_package()
        lifeline, ours = os.pipe()
        self._lifeline = os.fdopen(ours, "wb", buffering=0)  # see end_with_us
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=(lifeline,),
            )
            end_with_us(lifeline, self._process.pid)
        finally:
            os.close(lifeline)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._commands, self._answers = self._process.stdin, self._process.stdout
        os.set_blocking(self._commands.fileno(), False)
        self._limit_s, self._until = START_S, 0.0
        self._say(vocabulary=vocabulary)

    def start(self, slot: int, params: SamplingParams) -> AnswerGrammar:
        """The grammar of the next answer in a slot."""
        asked = {name: value for name, value in params.to_dict().items() if name == params.grammar}
        return AnswerGrammar(self, slot, params.grammar, self.ask(slot=slot, sampling=asked))

    def ask(self, **command: Any) -> Next:
        """Raises GrammarLostError if the process has ended, or does not answer in time, upon which it is ended."""
        self._say(**command)
        found = grammar_host.receive(self._read)
        self._limit_s = ANSWER_S
        return found

    def _say(self, **command: Any) -> None:
        self._until = time.monotonic() + self._limit_s
        line = json.dumps(command).encode() + b"\n"
        try:
            while line:
                self._await(self._commands, select.POLLOUT)
                line = line[os.write(self._commands.fileno(), line) :]
        except BrokenPipeError:
            self._lost()

    def _read(self, count: int) -> bytes:
        """So many bytes of its answer."""
        found = b""
        while len(found) < count:
            self._await(self._answers, select.POLLIN)
            found += os.read(self._answers.fileno(), count - len(found)) or self._lost()
        return found

    def _await(self, pipe: IO[bytes], event: int) -> None:
        """Until a pipe takes or has something, or the process has ended."""
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, 1000 * (self._until - time.monotonic()))):
            self.close()
            raise GrammarLostError(f"{self._name} has not answered for {self._limit_s:.0f} s")

    def _lost(self) -> NoReturn:
        raise GrammarLostError(f"{self._name} has ended with status {self._process.wait()}")

    @property
    def _name(self) -> str:
        return f"the process that follows grammars (pid {self._process.pid})"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._commands, self._answers, self._lifeline):
            pipe.close()


class AnswerGrammar:
    """What one answer's grammar lets follow."""

    def __init__(self, host: GrammarHost, slot: int, name: str | None, first: Next) -> None:
        """`name`: of the parameter that it is."""
        self._host, self._slot, self._name, self._next = host, slot, name, first
        self._tell()

    @property
    def ended(self) -> Ending | None:
        """How the answer has ended, if nothing can follow: see Next."""
        return self._next.ended

    def allowed(self, vocab_size: int, ending: Iterable[int]) -> torch.Tensor:
        """bool [vocab_size]: whether each token may come next; those of `ending` only where the answer may end."""
        found = torch.zeros(vocab_size, dtype=torch.bool)
        bits = np.unpackbits(np.frombuffer(self._next.tokens, np.uint8), bitorder="little")[:vocab_size]
        found[: len(bits)] = torch.from_numpy(bits.astype(bool))
        for token in ending:
            if 0 <= token < vocab_size:
                found[token] = self._next.may_end
        return found

    def add(self, token: int) -> None:
        """The answer's next token."""
        if self._next.ended is None:
            self._next = self._host.ask(slot=self._slot, token=token)
            self._tell()

    def _tell(self) -> None:
        """Tell the user what has ended the answer too early."""
        if self._next.problem:
            warn_once(f"an answer ends before it keeps to its {self._name}: {self._next.problem}")
