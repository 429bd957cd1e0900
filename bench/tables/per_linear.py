"""The table of options for each linear."""

from __future__ import annotations

from typing import Any

from bench import markdown


def per_linear(results: dict[str, Any]) -> list[str]:
    """KL of each set of options, of others than `layer` its share of that too."""
    cells: dict[tuple[str, str, float], dict[str, float]] = {}
    for row in results["rows"]:
        cells.setdefault((row["bed"], row["quantizer"], row["size"]), {})[row["options"]] = row["kl"]
    names = list(dict.fromkeys(row["options"] for row in results["rows"]))

    def text(of: dict[str, float], name: str) -> str:
        if name not in of:
            return ""
        share = "" if name == "layer" or "layer" not in of else f" ({of[name] / of['layer']:.2f}x)"
        return f"{of[name]:.3f}{share}"

    rows = [[*map(str, key), *(text(of, name) for name in names)] for key, of in sorted(cells.items())]
    return [
        f"KL in nats, over {results['predictions']} predictions; groups of {results['group_size']} but for the "
        "last two.",
        "",
        *markdown.table(["bed", "quantizer", "bits per weight", *names], rows),
    ]
