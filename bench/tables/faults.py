"""The table of injected faults and how they ended."""

from __future__ import annotations

from typing import Any

from bench import markdown

_ENDINGS = ("injected", "ended_well", "hung", "lost", "doubled", "tracebacks")


def faults(results: dict[str, Any]) -> list[str]:
    """A row for each kind; files are of one kind here."""
    files = [kind for kind in results["faults"] if kind["fault"].startswith("damaged ")]
    rows = [kind for kind in results["faults"] if kind not in files]
    if any(kind["injected"] for kind in files):
        rows.insert(0, {"fault": "damaged file"} | {name: sum(kind[name] for kind in files) for name in _ENDINGS})
    header = ["fault", "injected", "ended well", "hung", "lost", "doubled", "ended otherwise"]
    return markdown.table(header, [[kind["fault"], *(str(kind[name]) for name in _ENDINGS)] for kind in rows])
