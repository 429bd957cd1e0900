"""The texts that models are measured on: plain English that every Python brings along, or a file of the user's own.

The standard library's language reference (`pydoc_data.topics`) is there on every machine, offline. Its topics
are split once: sensitivities are measured on some of them and perplexity on others, so that a plan is never judged on
the text it was tuned on. The texts differ between Python versions; whoever stores a figure stores `digest` of its text
with it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from pydoc_data import topics

from llmpq.spec import UsageError
from llmpq.spec.json_file import read_file

# Long topics that are mostly prose. Neither list repeats a topic of the other.
_CALIBRATION = ("execmodel", "objects", "exceptions", "naming", "import")
_EVALUATION = ("types", "attribute-access", "calls", "with", "class", "raise", "try", "function", "assignment")

_SENTENCES = re.compile(r"[A-Z“\"*][^|>=]*[.:]", re.DOTALL)


def _prose(topic: str) -> str:
    """The paragraphs of a topic that are running text: no headings, code, grammar or lists."""
    paragraphs = (" ".join(part.split()) for part in topics.topics.get(topic, "").split("\n\n"))
    return "\n\n".join(p for p in paragraphs if len(p) > 80 and _SENTENCES.fullmatch(p))


def calibration_text() -> str:
    """English prose for measuring sensitivities, some 25,000 characters; always the same for one Python version."""
    return "\n\n".join(filter(None, map(_prose, _CALIBRATION)))


def evaluation_text() -> str:
    """English prose for perplexity, some 70,000 characters; shares no topic with `calibration_text`."""
    return "\n\n".join(filter(None, map(_prose, _EVALUATION)))


def read_text(path: str | Path) -> str:
    """The contents of a UTF-8 text file. Raises UsageError if it is missing, empty or not text."""
    try:
        text = read_file(path).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"the text {path} is not UTF-8 (byte {error.start}); convert it first") from None
    if not text.strip():
        raise UsageError(f"the text {path} is empty; give a file with at least a few sentences")
    return text


def digest(text: str) -> str:
    """16 hex digits that identify a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
