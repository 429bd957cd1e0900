"""The tables of README.md and bench/README.md, made from bench/results/*.json.

    python -m bench.tables          writes them into the documents
    python -m bench.tables --check  fails if a document differs

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; TABLES says what it is made of.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import markdown
from bench.machine import ROOT
from bench.tables.answers import answers
from bench.tables.budgets import budgets
from bench.tables.end_to_end import end_to_end
from bench.tables.families import families
from bench.tables.faults import faults
from bench.tables.gpu import goals_gpu, gpu_decoder, gpu_decoder_kernels, rivals_gpu
from bench.tables.hetero import hetero
from bench.tables.indicators import indicators
from bench.tables.kv_cache import kv_cache
from bench.tables.loading import loading
from bench.tables.mixed import quality_mixed
from bench.tables.per_linear import per_linear
from bench.tables.planner import bench_planner, paper_clusters, tensor_parallel
from bench.tables.predictions import predictions
from bench.tables.quality import quality_rivals
from bench.tables.queues import queues
from bench.tables.real_files import real_files
from bench.tables.serving import serving
from bench.tables.start import start
from bench.tables.steps import attention, step_times
from llmpq.spec import ACTIVATION_MODES

DOCUMENTS = (ROOT / "README.md", ROOT / "bench" / "README.md")
RESULTS = ROOT / "bench" / "results"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:+.1f} %"


def rivals_cpu_one_thread(results: dict[str, Any]) -> list[str]:
    """Ratios to every rival by the number of rows, with one thread."""
    return _ratios([row for row in results["rows"] if row["threads"] == 1])


def rivals_cpu(results: dict[str, Any]) -> list[str]:
    """Ratios to every rival by the number of rows, then our own seconds, the small linears, what was not there."""
    rows = results["rows"]
    lines: list[str] = []
    for threads in sorted({row["threads"] for row in rows}):
        mine = [row for row in rows if row["threads"] == threads]
        lines += [_ceilings(threads, results["ceilings"].get(str(threads), {})), "", *_ratios(mine), ""]
        lines += [*_own_seconds(mine, sorted({row["m"] for row in mine})), ""]
    if results["small"]:
        lines += [*_small(results["small"]), ""]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines.append(f"Rivals: {versions}. {results['disturbed_rounds']} of {results['rounds']} rounds were disturbed.")
    lines += [f"Missing: {name} ({why})." for name, why in results["missing"].items()]
    return lines


def _ratios(rows: Sequence[dict[str, Any]]) -> list[str]:
    ms = sorted({row["m"] for row in rows})
    compared: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        key = (markdown.product(row), row["against"])
        if row["rival"] not in _DENSE:
            compared.setdefault(key, {}).setdefault(row["m"], []).append(row)
    cells = [[*key, *(markdown.ratios(found.get(m, [])) for m in ms)] for key, found in compared.items()]
    return markdown.table(["ours", "against", *(f"m={m}" for m in ms)], cells)


_DENSE = ("torch float32", "torch bfloat16")  # their times stand beside ours instead


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
        name = markdown.product(row)
        errors[name] = max(row["error"], errors.get(name, 0.0))
        if here:
            products.setdefault(name, {})[row["m"]] = markdown.seconds(row)
        if row["rival"] in _DENSE:
            errors[row["rival"]] = max(row["rival_error"], errors.get(row["rival"], 0.0))
            if here:
                products.setdefault(row["rival"], {})[row["m"]] = f"{1e6 * row['rival_seconds']:.0f} µs"
    cells = [[name, *(found.get(m, "") for m in ms), f"{errors[name]:.0e}"] for name, found in sorted(products.items())]
    return markdown.table([f"{n}x{k}", *(f"m={m}" for m in ms), "error"], cells)


def _small(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        limit = row["limit_seconds"]
        seconds = f"{1e6 * row['seconds']:.1f} µs"
        if limit is not None:
            seconds = f"{markdown.goal(seconds, met=row['seconds'] <= limit)} (≤ {1e6 * limit:.1f})"
        product = markdown.product(row)
        cells.append([f"{row['n']}x{row['k']}", row["cache"], product, seconds, row["against"], markdown.ratios([row])])
    return markdown.table(["n x k", "weights", "ours", "time", "against", "ratio"], cells)


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
    return markdown.table(header, rows)


def quality(results: dict[str, Any]) -> list[str]:
    """Perplexity at each width and in each mode of activations that was measured, and omega where it was."""
    modes = [mode for mode in ACTIVATION_MODES if any(row["activations"] == mode for row in results["rows"])]
    by_weights: dict[str, dict[str, str]] = {}
    for row in results["rows"]:
        found = by_weights.setdefault(row["weights"], {})
        found[row["activations"]] = f"{row['perplexity']:.2f}"
        if "omega" in row:
            found["omega"] = f"{row['omega']:.3g}"
    columns = [*modes, *(["omega"] if "omega" in results["rows"][0] else [])]
    rows = [[name, *(found.get(column, "") for column in columns)] for name, found in by_weights.items()]
    return markdown.table(["weights", *columns], rows)


@dataclass(frozen=True)
class Table:
    """What is made of the results of a module below bench/, and what stands there before there are any.

    They are in bench/results.
    """

    module: str
    lines: Callable[[dict[str, Any]], list[str]]
    empty: Callable[[], list[str]] = lambda: ["Not yet measured."]
    how: str = "Measured"
    file: str = ""  # the file's name, where it is not the module's

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.file or self.module.rpartition('.')[2]}.json"


TABLES = {
    "answers": Table("quality.answers", answers),
    "attention": Table("kernels.attention", attention),
    "bench_planner": Table("plans.bench_planner", bench_planner),
    "budgets": Table("quality.budgets", budgets),
    "demo_runs": Table("plans.demo_runs", demo_runs),
    "end_to_end": Table("end_to_end", end_to_end),
    "families": Table("families", families),
    "faults": Table("faults", faults),
    "faults_devices": Table("faults", faults, file="faults_devices"),
    "gpu_decoder": Table("end_to_end.gpu_decoder", gpu_decoder),
    "gpu_decoder_kernels": Table("end_to_end.gpu_decoder", gpu_decoder_kernels),
    "hetero": Table("plans.hetero", hetero),
    "paper_clusters": Table("plans.paper_clusters", paper_clusters, how="Computed"),
    "kv_cache": Table("quality.kv_cache", kv_cache),
    "loading": Table("quality.loading", loading),
    "indicators_a": Table("quality.indicators", indicators, file="indicators_a"),
    "indicators_b": Table("quality.indicators", indicators, file="indicators_b"),
    "indicators_b_gptq": Table("quality.indicators", indicators, file="indicators_b_gptq"),
    "indicators_opt": Table("quality.indicators", indicators, file="indicators_opt"),
    "indicators_qwen": Table("quality.indicators", indicators, file="indicators_qwen"),
    "per_linear": Table("quality.per_linear", per_linear),
    "predictions": Table("predictions", predictions),
    "quality": Table("quality.perplexity_by_width", quality),
    "quality_qwen": Table("quality.perplexity_by_width", quality, file="perplexity_by_width_qwen"),
    "quality_mixed": Table("quality.mixed", quality_mixed, file="quality_mixed"),
    "quality_rivals": Table("quality.rivals", quality_rivals, file="quality_rivals"),
    "queues": Table("plans.queues", queues),
    "real_files": Table("models.real_files", real_files),
    "rivals_cpu_one_thread": Table("kernels.rivals_cpu", rivals_cpu_one_thread),
    "rivals_cpu": Table("kernels.rivals_cpu", rivals_cpu),
    "rivals_gpu": Table("kernels.rivals_gpu", rivals_gpu, goals_gpu),
    "serving": Table("serving", serving),
    "start": Table("end_to_end.start", start),
    "step_times": Table("kernels.step_times", step_times),
    "tensor_parallel": Table("plans.tensor_parallel", tensor_parallel, how="Computed"),
}


def _body(table: Table) -> list[str]:
    if not table.path.exists():
        return table.empty()
    results = json.loads(table.path.read_text())
    places = "; ".join(
        f"{run['device']}, torch {run['torch']}, commit {run['commit']}, {run['date']}"
        for run in results.get("runs", [results])
    )
    return [*table.lines(results), "", f"{table.how} by `python -m bench.{table.module}` on {places}."]


def render(text: str) -> str:
    """A document's text with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        body = "\n".join(_body(TABLES[match[1]]))
        return f"<!-- table: {match[1]} -->\n\n{body}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    code = 0
    for document in DOCUMENTS:
        text = document.read_text()
        rendered = render(text)
        if "--check" not in sys.argv[1:]:
            document.write_text(rendered)
        elif rendered != text:
            print(
                f"{document.relative_to(ROOT)} differs from bench/results; run python -m bench.tables", file=sys.stderr
            )
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
