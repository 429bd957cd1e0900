"""The plot of `python -m bench.quality.budgets`: predicted throughput over measured quality, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

COLORS = ("#4c78a8", "#e0944f", "#5f9e6e", "#8c6bb1", "#c7596b", "#7a8793")
WIDTH, HEIGHT, LEFT, TOP, GAP = 360, 280, 60, 30, 70  # of a panel, and around it
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20)  # percent of perplexity

Rows = Sequence[Mapping[str, Any]]


def plot(rows: Rows) -> str:
    """A panel for each model and quantizer; lines are clusters, whiskers a standard error, dotted lines budgets."""
    found = [row for row in rows if "test" in row]
    panels = list(dict.fromkeys((row["model"], row["quantizer"]) for row in found))
    clusters = list(dict.fromkeys(row["cluster"] for row in rows))
    colors = dict(zip(clusters, COLORS * len(clusters)))
    width, height = LEFT + len(panels) * (WIDTH + GAP), TOP + HEIGHT + 75
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, (model, quantizer) in enumerate(panels):
        own = [row for row in found if (row["model"], row["quantizer"]) == (model, quantizer)]
        lines.append(f'<g transform="translate({LEFT + i * (WIDTH + GAP)} {TOP})">')
        lines += [_text(WIDTH / 2, -10, f"{model}, {quantizer}"), *_panel(own, colors), "</g>"]
    for i, (cluster, color) in enumerate(colors.items()):
        x, y = LEFT + 150 * i, TOP + HEIGHT + 60
        lines += [f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{color}"/>', _text(x + 10, y, cluster, "start")]
    return "\n".join([*lines, "</svg>", ""])


def _panel(rows: Rows, colors: Mapping[str, str]) -> Iterator[str]:
    top = 1.1 * max(row["tokens_per_s"] for row in rows)
    step = 10 ** math.floor(math.log10(top / 2))
    step = next(step * factor for factor in (1, 2, 5, 10) if top / (step * factor) <= 6)

    def x(percent: float) -> float:
        low, high = math.log(TICKS[0]), math.log(TICKS[-1])
        return WIDTH * (math.log(min(max(float(percent), TICKS[0]), TICKS[-1])) - low) / (high - low)

    def y(speed: float) -> float:
        return HEIGHT * (1 - speed / float(top))

    yield f'<path d="M0 0V{HEIGHT}H{WIDTH}" fill="none" stroke="#9aa3ab"/>'
    yield from (_text(x(tick), HEIGHT + 16, f"{tick:g}") for tick in TICKS)
    yield _text(WIDTH / 2, HEIGHT + 34, "measured rise of perplexity on the test text, %")
    for i in range(int(top / step) + 1):
        yield _text(-6, y(i * step) + 4, f"{i * step / 1000:g}k", "end")
    yield f'<text transform="translate(-46 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">predicted tokens/s</text>'
    for budget in sorted({row["budget"] for row in rows}):
        yield f'<path d="M{x(100 * budget):.1f} 0V{HEIGHT}" stroke="#b9c0c8" stroke-dasharray="2 3"/>'
    for cluster, color in colors.items():
        own = sorted((row for row in rows if row["cluster"] == cluster), key=lambda row: row["budget"])
        points = [(x(100 * row["test"]), y(row["tokens_per_s"])) for row in own]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        if path:
            yield f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'
        for row, (a, b) in zip(own, points, strict=True):
            low, high = (x(100 * (row["test"] + sign * row["test_standard_error"])) for sign in (-1, 1))
            yield f'<path d="M{low:.1f} {b:.1f}H{high:.1f}" stroke="{color}"/>'
            yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{color}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
