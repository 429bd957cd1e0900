"""Everything that can go wrong in a way its user can act on, one class for each documented exit code.

A message is one line: what is wrong, and what to do about it. The command line prints it and exits with
`exit_code`; a traceback is kept for defects of llmpq itself.
"""

from __future__ import annotations

import re

LINE = 500  # characters of a message at most


def one_line(text: str, limit: int = LINE) -> str:
    """`text` in one line of at most `limit` printable characters: others are escaped, a longer one's middle is cut."""
    if len(text) > 8 * limit:  # before it is looked at in whole
        text = text[: 4 * limit] + text[-4 * limit :]
    joined = re.sub(r"\s*[\r\n]+\s*", " ", text.strip())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)
    if len(line) <= limit:
        return line
    end = limit // 3
    return f"{line[: limit - end - 5]} ... {line[-end:]}"


class LlmpqError(Exception):
    """The base of all errors that are reported to the user without a traceback.

    A message may hold what others wrote; `one_line` makes it fit for a terminal.
    """

    exit_code = 1
    rank: int | None = None  # of the worker that reported it, or was lost

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class UsageError(LlmpqError):
    """Bad input: an option, a file, a model, a plan. Exit code 2."""

    exit_code = 2


class InfeasibleError(LlmpqError):
    """No plan meets memory caps and quality budget. Exit code 3. `relaxations`: each would make one possible."""

    exit_code = 3

    def __init__(self, message: str, relaxations: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.relaxations = relaxations


class DeviceMemoryError(LlmpqError):
    """A device needed more memory than its cap while it ran. Exit code 4."""

    exit_code = 4


class WorkerLostError(LlmpqError):
    """A worker process died or stopped answering. Exit code 5."""

    exit_code = 5


class GrammarLostError(WorkerLostError):
    """The process that follows the grammars of answers died or stopped answering; no device is lost. Exit code 5."""


class PromptError(LlmpqError):
    """Some prompts have no answer; the outputs of a run say why, and hold the answers to the others. Exit code 6."""

    exit_code = 6


class HostError(LlmpqError):
    """This host lacks something that runs need, as `llmpq doctor` has found. Exit code 7."""

    exit_code = 7


class NotMeasuredError(LlmpqError):
    """A cost was asked for outside what a cost table holds; it refuses rather than extrapolates. Exit code 2."""

    exit_code = 2
