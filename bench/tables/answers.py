"""The table of what the demo model answers at each width."""

from __future__ import annotations

from typing import Any

from bench import markdown

SHOWN = 1  # the prompt whose answers are shown
LETTERS = 120  # of them


def answers(results: dict[str, Any]) -> list[str]:
    """Agreement with 16 bits at each width, and what one of the prompts is answered."""
    cells = []
    for row in results["rows"]:
        text = " ".join(row["answers"][SHOWN].replace("|", "/").split())
        same = f"{row['same_answers']} of {len(row['answers'])}"
        cells.append([row["weights"], f"{100 * row['top1_agreement']:.1f} %", same, f"{text[:LETTERS].rstrip()} ..."])
    header = ["weights", "top-1", "same answers", results["prompts"][SHOWN]]
    tokens = results["rows"][0]["tokens"]
    counted = f"{len(results['prompts'])} prompts, {tokens} tokens of answers, groups of {results['group_size']}."
    return [counted, "", *markdown.table(header, cells)]
