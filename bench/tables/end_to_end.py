"""The table of whole engines: a block for each processor, what each does, and ours over the best other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench import markdown
from bench.end_to_end.rows import met

Record = dict[str, Any]
_TITLES = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B", "0.5B": "a llama of 0.5B random weights"}


def end_to_end(results: Record) -> list[str]:
    """Bold where a goal is missed."""
    lines: list[str] = []
    for run in results["runs"]:
        lines += [*_processor(run, results), ""]
    return lines[:-1]


def _processor(run: Record, results: Record) -> list[str]:
    mine = {
        kind: [row for row in rows if row["device"] == run["device"]]
        for kind, rows in results.items()
        if kind != "runs"
    }
    lines = [f"**{run['device']}**{', with AMX' if run['amx'] else ''}.", ""]
    for threads, ceilings in run["ceilings"].items():
        read, fp32, int8 = (ceilings[name] / 1e9 for name in ("read_bytes_per_s", "fp32_flop_per_s", "int8_op_per_s"))
        lines.append(f"{_threads(int(threads))}: reads {read:.1f} GB/s, {fp32:.0f} GFLOP/s, {int8:.0f} GOP/s in int8.")
    lines.append("")
    everyone = mine["rows"] + mine["others"]
    for model, threads in dict.fromkeys((row["model"], row["threads"]) for row in everyone):
        here = [row for row in everyone if (row["model"], row["threads"]) == (model, threads)]
        perplexities = {row["contender"]: row for row in mine["perplexities"] if row["model"] == model}
        lines += [*_speeds(f"{_TITLES.get(model, model)}, {_threads(threads)}", here, perplexities), ""]
        ours = [row for row in mine["rows"] if (row["model"], row["threads"]) == (model, threads)]
        lines += [*_ratios(ours), ""]
    if mine["second_thread"]:
        lines += ["Two threads over one:", "", *_second_thread(mine["second_thread"]), ""]
    lines += [_pipeline(row) for row in mine["pipeline"] if row["phase"] == "total"]
    tokens = {row["tokens"] for row in mine["perplexities"]}
    if tokens:
        lines.append(f"Perplexity is that of {', '.join(map(str, sorted(tokens)))} tokens.")
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines.append(f"Rivals: {versions}. {run['disturbed_rounds']} of {run['rounds']} rounds were disturbed.")
    return [*lines, *(f"Missing: {name} ({why})." for name, why in run["missing"].items())]


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _speeds(title: str, rows: Sequence[Record], perplexities: dict[str, Record]) -> list[str]:
    """Tokens/s of prefill / decode."""
    batches = sorted({row["batch"] for row in rows})
    found = {(row["contender"], row["batch"], row["phase"]): row["tokens_per_s"] for row in rows}

    def cell(name: str, batch: int) -> str:
        both = [found.get((name, batch, phase)) for phase in ("prefill", "decode")]
        return " / ".join(f"{speed:.0f}" for speed in both if speed is not None)

    body = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        quality = f"{perplexities[name]['perplexity']:.2f}" if name in perplexities else ""
        body.append([name, *(cell(name, batch) for batch in batches), quality])
    return markdown.table([title, *(f"batch {batch}" for batch in batches), "perplexity"], body)


def _ratios(rows: Sequence[Record]) -> list[str]:
    """Over the best other, and the share of the bound."""
    batches = sorted({row["batch"] for row in rows})
    body = []
    for name, phase in dict.fromkeys((row["contender"], row["phase"]) for row in rows):
        of = {row["batch"]: row for row in rows if (row["contender"], row["phase"]) == (name, phase)}
        body.append([name, phase, *(_ratio(of[batch]) if batch in of else "" for batch in batches)])
    return markdown.table(["ours over the best other", "phase", *(f"batch {batch}" for batch in batches)], body)


def _ratio(row: Record) -> str:
    share = "" if row["bound_share"] is None else f"{100 * row['bound_share']:.0f} % of the bound"
    if row["bound_goal"] is not None:
        share += f" (≥ {100 * row['bound_goal']:.0f} %)"
    if row["ratio"] is None:
        return share
    wanted = "" if row["goal"] is None else f" (≥ {row['goal']:g})"
    ratio = _judged(row, f"{row['ratio']:.2f}")
    return f"{ratio}{wanted} ({row['rival']}), {share}"


def _judged(row: Record, text: str) -> str:
    return markdown.goal(text, met=met(row) is not False)


def _second_thread(rows: Iterable[Record]) -> list[str]:
    rows = list(rows)
    batches = sorted({row["batch"] for row in rows})
    body = []
    for model, name, phase in dict.fromkeys((row["model"], row["contender"], row["phase"]) for row in rows):
        of = {
            row["batch"]: row for row in rows if (row["model"], row["contender"], row["phase"]) == (model, name, phase)
        }
        body.append(
            [_TITLES.get(model, model), name, phase, *(markdown.ratios([of[b]] if b in of else []) for b in batches)]
        )
    return markdown.table(["model", "ours", "phase", *(f"batch {batch}" for batch in batches)], body)


def _pipeline(row: Record) -> str:
    ratio = _judged(row, f"{row['ratio']:.2f}")
    return (
        f"{_TITLES.get(row['model'], row['model'])}, batch {row['batch']}: two stages of one thread each reach "
        f"{ratio} (≥ {row['goal']:g}) of the tokens/s of one process with two threads; the "
        f"slower stage is busy {100 * row['busy']:.0f} % of decode (≥ {100 * row['busy_goal']:.0f} %)."
    )
