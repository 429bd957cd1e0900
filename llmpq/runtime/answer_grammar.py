"""The grammars of answers, as the last stage asks for them: a process of its own follows them (grammar_host.py).

A vocabulary takes memory that no plan has counted, some hundred bytes for each token, and the library that follows
grammars ends its process where there is none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from llmpq.runtime import grammar_host
from llmpq.runtime.grammar import Ending, Next, check_package
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import WorkerLostError

_PROGRAM = (
    "import sys; sys.path.remove('') if '' in sys.path else None; "  # the current folder
    "from llmpq.runtime import grammar_host; grammar_host.main()"
)


class GrammarHost:
    """The process, with a vocabulary. It ends with the one that has started it, or when this object is gone."""

    def __init__(self, vocabulary: str) -> None:
        """`vocabulary`: as `packed`. Raises UsageError without llguidance."""
        check_package()
        command = [sys.executable, "-c", _PROGRAM]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._say(vocabulary=vocabulary)

    def start(self, slot: int, params: SamplingParams) -> AnswerGrammar:
        """The grammar of the next answer in a slot."""
        asked = {name: value for name, value in params.to_dict().items() if name == params.grammar}
        return AnswerGrammar(self, slot, self.ask(slot=slot, sampling=asked))

    def ask(self, **command: Any) -> Next:
        """Raises WorkerLostError if the process has ended."""
        self._say(**command)
        found = None if self._process.stdout is None else grammar_host.receive(self._process.stdout)
        return self._lost() if found is None else found

    def _say(self, **command: Any) -> None:
        try:
            if self._process.stdin is not None:
                self._process.stdin.write(json.dumps(command).encode() + b"\n")
                self._process.stdin.flush()
        except OSError:
            self._lost()

    def _lost(self) -> Next:
        raise WorkerLostError(f"the process that follows grammars has ended with status {self._process.wait()}")

    def close(self) -> None:
        """Have the process end."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what it has not read, if it has ended
                    pipe.close()
        self._process.wait()


class AnswerGrammar:
    """What one answer's grammar lets follow."""

    def __init__(self, host: GrammarHost, slot: int, first: Next) -> None:
        self._host, self._slot, self._next = host, slot, first

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
