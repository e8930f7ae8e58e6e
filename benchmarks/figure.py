"""Draws the figure of the front page of the docs: perplexity by sparsity, with numbers from docs/results.md.

    python benchmarks/figure.py            # docs/figures/perplexity.json → docs/figures/perplexity.svg

A value that was not measured is null in the JSON file, and the line skips it. The SVG needs neither fonts nor a
library. Its background is white, so that it is readable on dark pages too.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from drawing import FONT, text

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
WIDTH, HEIGHT = 780, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 540, 84, 376  # of the plot; names of the lines stand right of it
TICKS = (20, 50, 100, 200, 500, 1000)
LABEL_DISTANCE = 19  # pixels between two names, at least
STYLES = (("#717784", "2"), ("#3f6fa3", "2"), ("#c26a0a", "2"), ("#b82d20", "3.5"))  # color and width, by series


class Axes:
    """Where a sparsity and a perplexity are, in pixels.

    Args:
        sparsities: the values of the horizontal axis.
        lowest: the least perplexity that is shown.
        highest: the largest.
    """

    def __init__(self, sparsities: list[float], lowest: float, highest: float) -> None:
        self._first, self._last = sparsities[0], sparsities[-1]
        self._lowest, self._highest = math.log(lowest), math.log(highest)

    def x(self, sparsity: float) -> float:
        inset = 28
        return LEFT + inset + (sparsity - self._first) / (self._last - self._first) * (RIGHT - LEFT - 2 * inset)

    def y(self, perplexity: float) -> float:
        return BOTTOM - (math.log(perplexity) - self._lowest) / (self._highest - self._lowest) * (BOTTOM - TOP)


def draw(figure: dict[str, Any]) -> str:
    """The SVG of a figure; see ``docs/figures/perplexity.json`` for its fields."""
    sparsities, dense = figure["sparsities"], figure["dense"]
    known = [value for series in figure["series"] for value in series["perplexity"] if value is not None]
    axes = Axes(sparsities, min(TICKS[0], dense), max(known) * 1.25)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(figure["title"])}" {FONT}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>',
        text(24, 34, figure["title"], size=18, color="#111", bold=True),
        text(24, 56, figure["conditions"], size=12, color="#666"),
    ]
    for tick in TICKS:
        y = axes.y(tick)
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e6e6e6"/>')
        parts.append(text(LEFT - 8, y + 4, f"{tick:,}", size=12, color="#666", anchor="end"))
    for sparsity in sparsities:
        parts.append(text(axes.x(sparsity), BOTTOM + 22, f"{sparsity:.0%}", anchor="middle"))
    below = (LEFT + RIGHT) / 2, BOTTOM + 46
    parts.append(text(*below, "zeros in the linears of the blocks", size=12, color="#666", anchor="middle"))
    y = axes.y(dense)
    parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#111" stroke-dasharray="5 4"/>')
    names = [(y, f"dense {dense:.1f}", "#111", False)]
    for series, (color, width) in zip(figure["series"], STYLES, strict=True):
        measured = [(s, v) for s, v in zip(sparsities, series["perplexity"], strict=True) if v is not None]
        points = [(axes.x(sparsity), axes.y(value)) for sparsity, value in measured]
        if len(points) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="{width}"/>')
        dot = f'r="4" fill="{color}" stroke="#fff" stroke-width="1.5"'
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" {dot}/>' for x, y in points]
        last, value = measured[-1]
        where = "" if last == sparsities[-1] else f" at {last:.0%}"
        names.append((points[-1][1], f"{series['name']}: {value:,.1f}{where}", color, width == STYLES[-1][1]))
    parts += _names(names)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _names(names: list[tuple[float, str, str, bool]]) -> list[str]:
    """The names of the lines right of the plot, at the height of their last points, none over another."""
    placed, last = [], -math.inf
    for y, name, color, bold in sorted(names):
        last = max(y + 4, last + LABEL_DISTANCE)
        placed.append(text(RIGHT + 6, last, name, color=color, bold=bold))
    return placed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FIGURES / "perplexity.json")
    parser.add_argument("--out", type=Path, default=FIGURES / "perplexity.svg")
    arguments = parser.parse_args()
    arguments.out.write_text(draw(json.loads(arguments.data.read_text("utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
