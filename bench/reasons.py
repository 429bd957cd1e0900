"""Why something is missing, in a line. The standard library only: it is imported beside other people's engines."""

from __future__ import annotations


def reason(error: Exception) -> str:
    """One line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"
