"""The table of mixed bits at equal size."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from bench import markdown
from bench.quality.indicators import spearman
from bench.quality.mixed import MODELS

OURS = ("fisher", "kl")  # methods of sensitivities, the default first
Row = dict[str, Any]


def quality_mixed(results: dict[str, Any]) -> list[str]:
    """For each network, quantizer and size: the KL of ours, of uniform bits and of the random assignments."""
    lines, rows = [], results["rows"]
    for model in results["models"]:
        lines.append(
            f"{_name(model)}: {model['predictions']} predictions, perplexity {model['perplexity']:.2f} as it is; "
            f"that of counting tokens is {model['counting_perplexity']:.0f}."
        )
    header = [
        "network",
        "bits",
        *(f"ours, {name}" for name in OURS),
        "uniform",
        "random ones",
        "best",
        "quartiles and median",
    ]
    header += ["ours / uniform", "ours / median", "rank", "rank of sums", "perplexity: ours", "uniform", "median"]
    cells = []
    for model in results["models"]:
        mine = [row for row in rows if (row["bed"], row["quantizer"]) == (model["bed"], model["quantizer"])]
        alone = {row["bits"]: row["kl"] for row in mine if row["method"] == "alone"}
        for bits in sorted({row["average_bits"] for row in mine if row["method"] == "random"}):
            rows_of_size = [row for row in mine if row["average_bits"] == bits and row["method"] != "alone"]
            cells.append([_name(model), f"{bits:g}", *_cells(rows_of_size, alone)])
    missing = [name for name in MODELS if name not in {f"{m['bed']}/{m['quantizer']}" for m in results["models"]}]
    lines += ["", *markdown.table(header, cells)]
    return lines + (["", f"Not yet measured: {', '.join(missing)}."] if missing else [])


def _name(model: Row) -> str:
    bed = "" if model["bed"] in model["model"] else f", bed {model['bed']}"
    return f"{model['model']}{bed}, {model['quantizer']}"


def _cells(rows: list[Row], alone: Mapping[str, float]) -> list[str]:
    """Of the rows of one size; `alone` has the KL of each layer alone, or nothing."""
    first = {row["method"]: row for row in rows if row["method"] != "random"}
    drawn = [row for row in rows if row["method"] == "random"]
    best, kls = min(drawn, key=lambda row: row["kl"]), [row["kl"] for row in drawn]
    low, median, high = statistics.quantiles(kls, n=4) if len(kls) > 1 else kls * 3
    ours, uniform = first[OURS[0]], first["uniform"]
    size = "" if uniform["exact_bits"] == uniform["average_bits"] else f" ({uniform['exact_bits']:.2f} bits)"
    against = [ours["kl"] / uniform["kl"], ours["kl"] / median]
    return [
        *(f"{first[name]['kl']:.4f}" if name in first else "" for name in OURS),
        f"{uniform['kl']:.4f}{size}",
        str(len(drawn)),
        f"{best['kl']:.4f}",
        f"{low:.4f}, {median:.4f}, {high:.4f}",
        *(markdown.goal(f"{ratio:.2f}x", met=ratio <= 1) for ratio in against),
        f"{spearman([row['omega'][OURS[0]] for row in drawn], kls):.2f}",
        f"{spearman([added(row['bits'], alone) for row in drawn], kls):.2f}" if alone else "",
        f"{ours['perplexity']:.2f}",
        f"{uniform['perplexity']:.2f}",
        f"{statistics.median(row['perplexity'] for row in drawn):.2f}",
    ]


def added(assignment: str, alone: Mapping[str, float]) -> float:
    """The sum of what the layers of an assignment do alone."""
    lone = (f"{'-' * i}{bits}{'-' * (len(assignment) - i - 1)}" for i, bits in enumerate(assignment))
    return sum(alone[bits] for bits in lone)
