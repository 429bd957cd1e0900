"""What LLM-PQ's paper claims, beside what bench/plans/paper_clusters.py computes, and why they differ."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

PE, PQ, FLEX, FLEX8 = "PipeEdge", "LLM-PQ", "FlexGen", "FlexGen-int8"  # of whom tokens/s were published
PIPEEDGE = "PipeEdge as published"  # computed
SHOWN, NETWORK = "uneven", 100e9 / 8  # of the sensitivities and networks (bytes/s), where one is enough
FOUR_BITS_THERE = ("7", "8")  # clusters on which PipeEdge has 8 bits here


def explanation(rows: Sequence[dict[str, Any]], speedups: Sequence[dict[str, Any]]) -> list[str]:
    """Paragraphs; none unless all of the eleven clusters were planned for."""
    over = {
        (row["world"], row["against"]): f"{row['mean']:.2f}x on average and {row['max']:.2f}x at most "
        f"({row['clusters']} clusters)"
        for row in speedups
        if (row["sensitivity"], row["network_bytes_per_s"]) == (SHOWN, NETWORK)
    }
    shown = {
        row["cluster"]: row
        for row in rows
        if (row["world"], row["sensitivity"]) == ("paper", SHOWN) and PIPEEDGE in row.get("contenders", {})
    }
    if len(shown) < 11:
        return []
    published = {name: row["published"] for name, row in shown.items() if {PE, PQ} <= row["published"].keys()}
    stored = [of[PQ] / of[PE] for of in published.values()]
    computed = {name: row["contenders"][PIPEEDGE] for name, row in shown.items()}
    real = [of[PE] / computed[name]["tokens_per_s"] for name, of in published.items() if name not in FOUR_BITS_THERE]
    four = [name for name, figures in computed.items() if figures["mean_bits"] < 8]
    return [
        "All of it is computed, nothing measured; how good modern kernels are is assumed (analytic.py). The paper "
        "claims 2.26x on average and 2.88x at most over PipeEdge. The runs that its repository stores give "
        f"{statistics.fmean(stored):.2f}x and {max(stored):.2f}x on {len(stored)} of the clusters, so they are not "
        "those of the claim. With the paper's kernels our plans have, over PipeEdge as the paper's scripts run it, "
        f"{over['paper', PIPEEDGE]}; with modern kernels {over['modern', PIPEEDGE]}.",
        "",
        "The largest ratios are where PipeEdge falls to 4 bits, on clusters "
        f"{', '.join(four[:-1])} and {four[-1]}: a 3- or 4-bit prefill of 8 sequences takes the paper's kernels 22 to "
        "43 times as long as one in 16 bit on T4 and V100, and 6 times in 4 bit on P100 (one layer of OPT-30b, in the "
        "repository's notebooks), and our plans avoid it. Modern kernels take hardly longer for few bits, and this "
        "gain is gone. PipeEdge's micro-batches and its order of devices are fixed, too. Where it may choose both, as "
        f"the planner's baseline does on several devices, it is behind by {over['paper', 'balanced']} with the paper's "
        f"kernels and by {over['modern', 'balanced']} with modern ones, where it is slower for the bits it gains.",
        "",
        "LLM-PQ's formula leaves out of decode the way around the pipeline: the tokens/s it gives for our plans are "
        "too high, most of all on one device.",
        "",
        "On clusters 7 and 8 PipeEdge has 8 bits here with the paper's kernels and had 4 in the paper, which reserves "
        "more for temporary tensors and keeps embedding and head in 16 bit. What analytic devices lack, such as the "
        "runtime's gaps, shows in PipeEdge's stored runs: on the other clusters they reach "
        f"{min(real):.2f} to {max(real):.2f} of what is computed.",
    ]
