"""The tables of README.md, made from bench/results/*.json.

    python -m bench.tables          writes them into README.md
    python -m bench.tables --check  fails if README.md differs

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is the result file without its ending.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.machine import ROOT

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:+.1f} %"


def rivals_cpu(results: dict[str, Any]) -> list[str]:
    """Ratios to every rival by the number of rows, then our own seconds, the small linears, what was not there."""
    rows = results["rows"]
    lines: list[str] = []
    for threads in sorted({row["threads"] for row in rows}):
        mine = [row for row in rows if row["threads"] == threads]
        ms = sorted({row["m"] for row in mine})
        header = ["ours", "against", *(f"m={m}" for m in ms)]
        compared: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = {}
        for row in mine:
            key = (f"int{row['bits']} {row['activations']}", row["against"])
            if row["rival"] not in _DENSE:
                compared.setdefault(key, {}).setdefault(row["m"], []).append(row)
        cells = [[*key, *(_ratios(found.get(m, [])) for m in ms)] for key, found in compared.items()]
        lines += [_ceilings(threads, results["ceilings"].get(str(threads), {})), "", *_markdown(header, cells), ""]
        lines += [*_own_seconds(mine, ms), ""]
    if results["small"]:
        lines += [*_small(results["small"]), ""]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines.append(f"Rivals: {versions}. {results['disturbed_rounds']} of {results['rounds']} rounds were disturbed.")
    lines += [f"Missing: {name} ({why})." for name, why in results["missing"].items()]
    return lines


_DENSE = ("torch float32", "torch bfloat16")  # their times stand beside ours instead


def _ratios(rows: Sequence[dict[str, Any]]) -> str:
    """The range over the shapes, and the goal; bold where the worst shape misses it."""
    if not rows:
        return ""
    ratios = sorted(row["ratio"] for row in rows)
    text = f"{ratios[0]:.2f}" if len(ratios) == 1 else f"{ratios[0]:.2f}–{ratios[-1]:.2f}"
    goal = rows[0]["goal"]
    if goal is None:
        return text
    return f"{text} (≥ {goal:g})" if ratios[0] >= goal else f"**{text}** (≥ {goal:g})"


def _ceilings(threads: int, ceilings: dict[str, float]) -> str:
    count = "1 thread" if threads == 1 else f"{threads} threads"
    if not ceilings:
        return f"With {count}: ceilings not measured."
    read, fp32, int8 = (ceilings[name] / 1e9 for name in ("read_bytes_per_s", "fp32_flop_per_s", "int8_op_per_s"))
    return f"With {count}: reads {read:.1f} GB/s, {fp32:.0f} GFLOP/s in float32, {int8:.0f} GOP/s in int8 at most."


def _own_seconds(rows: Sequence[dict[str, Any]], ms: Sequence[int]) -> list[str]:
    """Times on the first shape, the share of the ceiling in parentheses, and the largest error on any shape."""
    n, k = rows[0]["n"], rows[0]["k"]
    products: dict[str, dict[int, str]] = {}
    errors: dict[str, float] = {}
    for row in rows:
        here = (row["n"], row["k"]) == (n, k)
        name = f"int{row['bits']} {row['activations']}"
        errors[name] = max(row["error"], errors.get(name, 0.0))
        if here:
            percent = row["percent_of_ceiling"]
            share = "" if percent is None else f" ({percent:.0f} %)"
            products.setdefault(name, {})[row["m"]] = f"{1e6 * row['seconds']:.0f} µs{share}"
        if row["rival"] in _DENSE:
            errors[row["rival"]] = max(row["rival_error"], errors.get(row["rival"], 0.0))
            if here:
                products.setdefault(row["rival"], {})[row["m"]] = f"{1e6 * row['rival_seconds']:.0f} µs"
    cells = [[name, *(found.get(m, "") for m in ms), f"{errors[name]:.0e}"] for name, found in sorted(products.items())]
    return _markdown([f"{n}x{k}", *(f"m={m}" for m in ms), "error"], cells)


def _small(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        limit = row["limit_seconds"]
        seconds = f"{1e6 * row['seconds']:.1f} µs"
        if limit is not None:
            seconds = seconds if row["seconds"] <= limit else f"**{seconds}**"
            seconds += f" (≤ {1e6 * limit:.1f})"
        product = f"int{row['bits']} {row['activations']}"
        cells.append([f"{row['n']}x{row['k']}", row["cache"], product, seconds, row["against"], _ratios([row])])
    return _markdown(["n x k", "weights", "ours", "time", "against", "ratio"], cells)


def demo_runs(results: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["contender"],
            row["split"],
            f"{row['omega']:.3g}",
            f"{row['tokens_per_s']:.0f}",
            f"{100 * row['spread']:.0f} %",
            _percent(row["prefill_error"]),
            _percent(row["decode_error"]),
            ", ".join(map(_percent, row["memory_errors"])),
        ]
        for row in results["rows"]
    ]
    header = ["plan", "layers' bits", "omega", "tokens/s", "spread", "prefill", "decode", "peak memory"]
    return _markdown(header, rows)


def quality(results: dict[str, Any]) -> list[str]:
    by_weights: dict[str, dict[str, Any]] = {}
    for row in results["rows"]:
        found = by_weights.setdefault(row["weights"], {"omega": f"{row['omega']:.3g}"})
        found[row["activations"]] = f"{row['perplexity']:.2f}"
    modes = ("a16", "a8x2", "a8")
    rows = [[name, *(found.get(mode, "") for mode in modes), found["omega"]] for name, found in by_weights.items()]
    return _markdown(["weights", *modes, "omega"], rows)


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "rivals_cpu": rivals_cpu,
    "demo_runs": demo_runs,
    "quality": quality,
}


def _source(name: str, results: dict[str, Any]) -> str:
    place = f"{results['device']}, torch {results['torch']}, commit {results['commit']}, {results['date']}"
    return f"Measured by `python -m bench.{name}` on {place}."


def render(text: str) -> str:
    """README's text with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        path = RESULTS / f"{name}.json"
        if not path.exists():
            return f"<!-- table: {name} -->\n\nNot yet measured.\n\n<!-- end -->"
        results = json.loads(path.read_text())
        lines = "\n".join(TABLES[name](results))
        return f"<!-- table: {name} -->\n\n{lines}\n\n{_source(name, results)}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    text = README.read_text()
    rendered = render(text)
    if "--check" in sys.argv[1:]:
        if rendered != text:
            print("README.md differs from bench/results; run python -m bench.tables", file=sys.stderr)
        return int(rendered != text)
    README.write_text(rendered)
    return 0


if __name__ == "__main__":
    sys.exit(main())
