"""The table of what KV caches of fewer bits lose."""

from __future__ import annotations

from typing import Any

from bench import markdown


def kv_cache(results: dict[str, Any]) -> list[str]:
    """Perplexity, KL and the likeliest token for each number of bits, with standard errors."""
    rows = [
        [
            str(row["kv_bits"]),
            f"{row['perplexity']:.3f}",
            f"{100 * row['perplexity_increase']:+.3f} % ± {100 * row['perplexity_increase_error']:.3f}",
            f"{row['kl']:.1e} ± {row['kl_error']:.0e}",
            f"{row['kl_999']:.1e}",
            f"{100 * row['top1_agreement']:.2f} % ± {100 * row['top1_agreement_error']:.2f}",
        ]
        for row in results["rows"]
    ]
    header = [
        "bits of keys and values",
        "perplexity",
        "increase",
        "KL",
        "a thousandth have more KL than",
        "the same likeliest token",
    ]
    about = f"{results['model']}, {results['tokens']} predictions, reference perplexity"
    return [f"{about} {results['rows'][0]['reference_perplexity']:.3f}.", "", *markdown.table(header, rows)]
