"""The table of model families."""

from __future__ import annotations

from typing import Any

from bench import markdown

# Column of the results -> of the table.
COLUMNS = {
    "safetensors": "safetensors",
    "GGUF": "GGUF",
    "GPTQ": "GPTQ, AWQ",
    "sensitivity": "sensitivity",
    "plan": "plan",
    "run": "run, 2 CPUs",
    "GPU, interpreted": "GPU (interpreted)",
}


def families(results: dict[str, Any]) -> list[str]:
    """Of each family: whether all tests of a column passed, some, or there is none."""

    def cell(row: dict[str, Any], column: str) -> str:
        passed, count = row.get(column, (0, 0))
        if not count:
            return ""
        return "yes" if passed == count else markdown.goal(f"{passed} of {count}", met=False)

    rows = [[row["family"], *(cell(row, column) for column in COLUMNS)] for row in results["rows"]]
    return markdown.table(["family", *COLUMNS.values()], rows)
