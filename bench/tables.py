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
from llmpq.spec import Precision

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:+.1f} %"


def linear(results: dict[str, Any]) -> list[str]:
    """Seconds of each contender, and those of torch's float32 linear over them; the ceiling below."""
    by_problem: dict[tuple[int, int, int], dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        by_problem.setdefault((row["n"], row["k"], row["m"]), {})[row["contender"]] = row
    contenders = list(next(iter(by_problem.values())))
    rows = []
    for (n, k, m), found in by_problem.items():
        cells = [f"{1e6 * found[name]['seconds']:.0f} µs ({found[name]['ratio']:.1f}x)" for name in contenders]
        rows.append([f"{n}x{k}", str(m), *cells])
    bandwidth = results["ceilings"]["read_bytes_per_s"]
    first = results["rows"][0]
    int4 = by_problem[first["n"], first["k"], 1]["llmpq int4"]
    size = Precision(4, results["group_size"]).weight_bytes(int4["n"], int4["k"])
    ceiling = (
        f"The ceiling for one row is reading the weights: {bandwidth / 1e9:.1f} GB/s in the same run, of which int4 at "
        f"{first['n']}x{first['k']} reaches {100 * size / int4['seconds'] / bandwidth:.0f} %."
    )
    return [*_markdown(["n x k", "m", *contenders], rows), "", ceiling]


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
    rows = [[row["weights"], f"{row['perplexity']:.2f}", f"{row['omega']:.3g}"] for row in results["rows"]]
    return _markdown(["weights", "perplexity", "omega"], rows)


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "linear_vs_torch": linear,
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
