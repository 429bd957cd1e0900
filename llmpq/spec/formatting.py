"""Bytes, seconds and plans as text for a person."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import groupby

from llmpq.spec.plan import Plan
from llmpq.spec.precision import Native, Width
from llmpq.spec.workload import Workload

_GIB, _MIB = 2**30, 2**20
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and ends of lines


def printable(text: str) -> str:
    """Text that does nothing to a terminal: control characters as escapes, such as \\x1b."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def format_bytes(count: float) -> str:
    """As "1.50 GiB" or "90.0 MiB"."""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / _MIB:.1f} MiB"


def format_cap(count: int | None) -> str:
    """Of a device's memory; "no cap" where there is none."""
    return "no cap" if count is None else format_bytes(count)


def format_bytes_up(count: float) -> str:
    """Rounded up, for what is missing: as "0.01 MiB"."""
    unit, name = (_GIB, "GiB") if count >= _GIB else (_MIB, "MiB")
    return f"{math.ceil(100 * count / unit) / 100:.2f} {name}"


def format_seconds(seconds: float) -> str:
    """To three digits: "1.25 s", "3.1 ms", "40 µs"."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-6:.3g} µs"


def format_width(width: Width | str) -> str:
    """As "4 bits", "4/3/3/4 bits" of qkv, out, up and down, or "native"."""
    return str(width) if isinstance(width, Native) else f"{width} bits"


def format_widths(widths: Iterable[Width | str]) -> str:
    """Of layers in a row: 4, 4, 4, 8 as "4x3 8"; native, native as "native x2"; none as "-"."""

    def run(width: Width | str, count: int) -> str:
        apart = "" if isinstance(width, int) else " "
        return str(width) if count == 1 else f"{width}{apart}x{count}"

    return " ".join(run(width, len(list(group))) for width, group in groupby(widths)) or "-"


def format_layers(plan: Plan) -> str:
    """Devices with how many layers each has: "wide 18, narrow 12"."""
    return ", ".join(f"{stage.device} {len(stage.precisions)}" for stage in plan.stages)


def format_stage(plan: Plan, index: int) -> str:
    """The bits of a stage's units, in the model's order: "embedding 8, 4x18"."""
    parts = [format_widths(plan.stages[index].widths)]
    if index == plan.embedding.stage:
        parts.insert(0, f"embedding {plan.embedding.precision.width}")
    if index == plan.head.stage:
        parts.append(f"head {plan.head.precision.width}")
    return ", ".join(parts)


def format_cache(plan: Plan, index: int) -> str:
    """What to say behind a stage's bits of its KV cache: ", KV cache 8"; nothing of 16 bits."""
    bits = plan.stages[index].kv_bits
    return "" if bits == 16 else f", KV cache {bits}"


def format_split(plan: Plan) -> str:
    """Devices with the bits of their units: "wide: embedding 8, 4x18; narrow: 4x12, head 8"."""
    stages = enumerate(plan.stages)
    return "; ".join(f"{stage.device}: {format_stage(plan, i)}{format_cache(plan, i)}" for i, stage in stages)


def format_lengths(workload: Workload) -> str:
    """Of prompts and answers, with their means where they are mixed."""

    def span(lengths: tuple[int, ...]) -> str:
        few, many, mean = min(lengths), max(lengths), sum(lengths) / len(lengths)
        return f"{many}" if few == many else f"{few} to {many} ({mean:.0f} on average)"

    prompts, outputs = workload.prompt_lens or (workload.prompt_len,), workload.output_lens or (workload.output_len,)
    return f"prompts of {span(prompts)} tokens, {span(outputs)} new tokens"


def format_duration(seconds: float) -> str:
    """Of what may take long: "75 s", "5 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
