"""README's table of the GPU kernels: ratios to every rival where they were measured, or else the goals alone."""

from __future__ import annotations

from typing import Any

from bench import markdown
from bench.kernels.rivals.goals import label_of
from bench.kernels.rivals.goals_gpu import CUBLAS, GOALS, shape_class

NOT_MEASURED = "not yet measured"
_EAGER = "transformers eager"
_NAMED = 5  # kernels of a step


def rivals_gpu(results: dict[str, Any]) -> list[str]:
    """What the device can do, then for each dtype ratios by shape class and rows, and times on the first shape."""
    rows = results["rows"]
    lines = [_ceilings(results["ceilings"]), ""]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = [row for row in rows if row["dtype"] == dtype]
        ms = sorted({row["m"] for row in mine})
        compared: dict[tuple[str, str, str], dict[int, list[dict[str, Any]]]] = {}
        for row in mine:
            key = (_ours(row["backend"], row["bits"]), row["against"], shape_class(row["n"], row["k"]))
            compared.setdefault(key, {}).setdefault(row["m"], []).append(row)
        cells = [[*key, *(markdown.ratios(found.get(m, [])) for m in ms)] for key, found in sorted(compared.items())]
        lines += [*markdown.table([dtype, "against", "n x k", *(f"m={m}" for m in ms)], cells), ""]
        lines += [*_seconds(mine, ms), ""]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines.append(f"Rivals: {versions}.")
    lines += [f"Missing: {name} ({why})." for name, why in results["missing"].items()]
    return lines


def gpu_decoder(results: dict[str, Any]) -> list[str]:
    """Tokens per second of both phases, by engine and batch."""
    eager = {row["batch"]: row["decode_tokens_per_s"] for row in results["rows"] if row["engine"] == _EAGER}
    cells = []
    for row in results["rows"]:
        share, speed, other = row.get("bound_share"), row["decode_tokens_per_s"], eager.get(row["batch"])
        cells.append(
            [
                row["engine"] + (", graphed" if row.get("graphed") else ""),
                str(row["batch"]),
                f"{row['prefill_tokens_per_s']:.0f}",
                f"{speed:.0f}",
                f"{1e3 * row['step_s']:.2f}",
                "" if share is None else f"{100 * share:.0f} %",
                f"{speed / other:.1f}" if other and row["engine"] != _EAGER else "",
            ]
        )
    names = ["engine", "batch", "prefill, tokens/s", "decode, tokens/s", "ms a step", "of the bound", f"over {_EAGER}"]
    return [_ceilings(results["ceilings"]), "", *markdown.table(names, cells)]


def gpu_decoder_kernels(results: dict[str, Any]) -> list[str]:
    """The kernels that take most of a step of decode, in milliseconds."""
    cells = []
    for row in results["rows"]:
        if parts := row.get("kernels"):
            whole, *named = ((_kernel(part["name"]), f"{1e3 * part['seconds']:.2f}") for part in parts)
            most = "; ".join(f"{name} {ms}" for name, ms in named[:_NAMED])
            cells.append([row["engine"], str(row["batch"]), f"{1e3 * row['step_s']:.2f}", whole[1], most])
    return markdown.table(["engine", "batch", "ms a step", "in kernels", "most of it"], cells)


def _kernel(name: str) -> str:
    """What a kernel is called, without its type and what it was made for."""
    return name.removeprefix("void ").split("<")[0].rpartition("::")[2]


def goals_gpu() -> list[str]:
    """What is to be reached, before anything was measured."""
    cells = []
    for goal in GOALS:
        for shapes, at in goal.at.items():
            rows = {ratio: [m for m in at if at[m] == ratio] for ratio in at.values()}
            reached = "; ".join(f"m={', '.join(map(str, ms))}: ≥ {ratio:.3g}" for ratio, ms in rows.items())
            where = "all" if shapes == "any" else shapes
            cells.append([_ours(goal.backend, goal.bits), label_of(goal.rivals), where, reached, NOT_MEASURED])
    return markdown.table(["ours", "against", "n x k", "goal", "reached"], cells)


def _ours(backend: str, bits: int) -> str:
    return f"{backend} int{bits}"


def _ceilings(ceilings: dict[str, float]) -> str:
    if not ceilings:
        return "Ceilings not measured."
    read, copied = (ceilings[name] / 1e12 for name in ("read_bytes_per_s", "copy_bytes_per_s"))
    flop = ceilings["bf16_flop_per_s"] / 1e12
    return f"The device reads {read:.2f} TB/s, copies {copied:.2f} TB/s, and does {flop:.0f} TFLOP/s in bf16 at most."


def _seconds(rows: list[dict[str, Any]], ms: list[int]) -> list[str]:
    """Times on the first shape, ours with the share of the ceiling, and the largest error on any shape."""
    n, k = rows[0]["n"], rows[0]["k"]
    products: dict[str, dict[int, str]] = {}
    errors: dict[str, float] = {}
    for row in rows:
        here = (row["n"], row["k"]) == (n, k)
        name = _ours(row["backend"], row["bits"])
        errors[name] = max(row["error"], errors.get(name, 0.0))
        if here:
            products.setdefault(name, {})[row["m"]] = markdown.seconds(row)
        if row["rival"] == CUBLAS:
            errors[CUBLAS] = max(row["rival_error"], errors.get(CUBLAS, 0.0))
            if here:
                products.setdefault(CUBLAS, {})[row["m"]] = f"{1e6 * row['rival_seconds']:.0f} µs"
    cells = [[name, *(found.get(m, "") for m in ms), f"{errors[name]:.1e}"] for name, found in sorted(products.items())]
    return markdown.table([f"{n}x{k}", *(f"m={m}" for m in ms), "error"], cells)
