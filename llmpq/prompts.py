"""Prompts from a JSONL file or standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llmpq.spec import UsageError


def read_prompts(source: str) -> list[str]:
    """The prompts of a JSONL file, one object with a "prompt" to a line; "-" is standard input. Raises UsageError."""
    where = "standard input" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text()
    except OSError as error:
        raise UsageError(f"cannot read the prompts file {where}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the prompts file {where} is not UTF-8 text") from None
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line ends
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise UsageError(f'{where}, line {number}: expected a JSON object such as {{"prompt": "some text"}}')
        prompts.append(prompt)
    if not prompts:
        raise UsageError(f'{where} holds no prompts; write one JSON object such as {{"prompt": "some text"}} to a line')
    return prompts
