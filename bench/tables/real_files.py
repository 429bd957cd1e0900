"""The table of real files against transformers on what they stand for."""

from __future__ import annotations

from typing import Any

from bench import markdown

OFF = 1e-3  # perplexities may differ by, relative


def real_files(results: dict[str, Any]) -> list[str]:
    """For each file: its tensors by type, greedy tokens that differ, and both perplexities."""
    count, tie = len(results["prompts"]), results["tie"]
    cells = []
    for row in results["rows"]:
        types = ", ".join(f"{number} {name}" for name, number in row["types"].items())
        differing, tokens = row["differences"], row["tokens"]
        equal = markdown.goal(f"{tokens - len(differing)} of {tokens}", met=row["not_ties"] == 0)
        off = row["perplexity"] / row["reference_perplexity"] - 1
        cells.append(
            [
                row["model"],
                types,
                markdown.goal(f"{row['prompts_alike']} of {count}", met=row["prompts_alike"] == count),
                equal,
                str(len(differing) - row["not_ties"]),
                f"{row['logit_difference']:.3f}",
                f"{row['perplexity']:.4f}",
                f"{row['reference_perplexity']:.4f}",
                markdown.goal(f"{100 * off:+.4f} %", met=abs(off) <= OFF),
            ]
        )
    header = ["file", "tensors", "prompts alike", "tokens equal", "ties", "logits off by"]
    header += ["perplexity", "of the reference", f"off by (≤ {100 * OFF:g} %)"]
    lines = [*markdown.table(header, cells), ""]
    for row in results["rows"]:
        seen = set()
        for found in row["differences"]:
            if found["prompt"] not in seen:
                seen.add(found["prompt"])
                lines.append(_first(row["model"], found, tie))
    named = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    predictions = ", ".join(f"{row['model']} {row['predictions']}" for row in results["rows"])
    lines.append(f"{named}. Predicted tokens of the text: {predictions}.")
    return lines


def _first(model: str, found: dict[str, Any], tie: float) -> str:
    kind = "a tie" if found["margin"] < tie else "no tie"
    return (
        f"{model}, prompt {found['prompt'] + 1}: the first other token is that after {found['position']}, {kind}: the "
        f"reference prefers its own by {found['margin']:.4f}.\n"
    )
