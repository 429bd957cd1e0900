"""The texts that models are measured on: plain English that every Python brings along, or a file of the user's own.

The standard library's language reference (`pydoc_data.topics`) is there on every machine, offline: prose, examples of
code, grammar and tables. It is split by topic: quantizers and sensitivities read the first part, quality budgets are
met on the second, and figures are reported on the third, which nothing was tuned on. Topics quote each other: a
paragraph is kept where it stands first. The texts differ between Python versions; whoever stores a figure stores
`digest` of its text with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import TypeVar

from llmpq.spec import UsageError
from llmpq.spec.json_file import read_file

T = TypeVar("T")

_SHARES = {"calibration": 2, "validation": 1, "test": 1}


@cache
def _splits() -> dict[str, str]:
    """The text of each part. A topic goes whole to the part that is then furthest below its share of characters."""
    seen: set[str] = set()
    paragraphs: dict[str, list[str]] = {split: [] for split in _SHARES}
    sizes = dict.fromkeys(_SHARES, 0)
    for name in sorted(topics.topics):
        split = min(_SHARES, key=lambda split: sizes[split] / _SHARES[split])
        for paragraph in topics.topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                paragraphs[split].append(paragraph.strip("\n"))
                sizes[split] += len(words)
    return {split: "\n\n".join(kept) for split, kept in paragraphs.items()}


def calibration_text() -> str:
    """What quantizers and sensitivities read: some 180,000 characters, always the same for one Python version."""
    return _splits()["calibration"]


def validation_text() -> str:
    """What quality budgets are met on: some 90,000 characters, none of whose paragraphs is in another part."""
    return _splits()["validation"]


def evaluation_text() -> str:
    """What quality is reported on, the test part: some 90,000 characters, none of whose paragraphs is in another."""
    return _splits()["test"]


def read_text(path: str | Path) -> str:
    """The contents of a UTF-8 text file. Raises UsageError if it is missing, empty or not text."""
    try:
        text = read_file(path).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"the text {path} is not UTF-8 (byte {error.start}); convert it first") from None
    if not text.strip():
        raise UsageError(f"the text {path} is empty; give a file with at least a few sentences")
    return text


def evenly(pieces: Sequence[T], count: int) -> list[T]:
    """At most `count` of the pieces of a text, from all over it."""
    count = min(count, len(pieces))
    return [pieces[i * len(pieces) // count] for i in range(count)]


def digest(text: str) -> str:
    """16 hex digits that identify a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
