"""The picture of ``real_model.py``: bytes of the whole file against divergence, wide and narrow, light and dark.

    python benchmarks/size_picture.py docs/data/real-model.csv --model "Qwen2.5-Coder-1.5B-Instruct, bf16" \
        --off-grid "Qwen2.5-Coder-1.5B-Instruct, off the grid, 16 windows" --out docs/figures

writes ``sizes.svg``, and ``sizes-narrow.svg`` that is readable on a telephone. Points off the grid
are hollow.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from drawing import Line, Marker, Plot, Point, head, legend, marker, polyline

STYLES: dict[str, Marker] = {
    "llama.cpp": ("circle", "--a", True),
    "sparsellm for llama.cpp": ("triangle", "--ours", True),
    "llama.cpp, off the grid": ("circle", "--a", False),
    "sparsellm, off the grid": ("triangle", "--ours", False),
}
OFF_GRID = {
    "llama.cpp": "llama.cpp, off the grid",
    "sparsellm for llama.cpp": "sparsellm, off the grid",
}
GIGABYTE = 1e9


def points_of(table: Path, model: str, off_grid: str, text: str) -> list[Point]:
    """The points ``(series, name of the size, gigabytes, divergence)`` of a model on a text, on its grid and off it."""
    points: list[Point] = []
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["text"], row["seed"]) != (text, "0"):
                continue
            series = ""
            if row["model"] == model:
                series = row["made by"]
            elif row["model"] == off_grid:
                series = OFF_GRID.get(row["made by"], "")
            if series not in STYLES:
                continue
            label = ""
            if row["made by"] == "llama.cpp":
                label = row["size of"]
            size = int(row["bytes"]) / GIGABYTE
            points.append((series, label, size, float(row["kl"])))
    if not points:
        raise SystemExit(f"{table} has no rows of {model} on {text}")
    return sorted(points, key=lambda point: point[2])


def draw(
    points: list[Point], width: int, height: int, title: str, says: list[str]
) -> str:
    """The SVG of the points, with a line through those of each maker."""
    makers = {point[0] for point in points}
    styles = {name: style for name, style in STYLES.items() if name in makers}
    sizes = [point[2] for point in points]
    divergences = [point[3] for point in points]
    plot = Plot(
        (70, 78 + 15 * len(says), width - 22, height - 58),
        (min(sizes) / 1.1, max(sizes) * 1.1),
        (min(divergences) / 1.6, max(divergences) * 1.6),
    )
    parts = [
        *head(width, height, title, says),
        *plot.grid(),
        *plot.names("GB of the whole file", "divergence (KL)"),
        *legend(
            58 + 15 * len(says), {x: style for x, style in styles.items() if style[2]}
        ),
    ]
    lines: list[Line] = []
    placed: list[tuple[float, float, str, str]] = []
    for name, style in styles.items():
        line = [
            (plot.x(size), plot.y(divergence))
            for series, _, size, divergence in points
            if series == name
        ]
        parts.append(polyline(line, style[1]))
        lines.append(line)
        parts += [marker(x, y, style) for x, y in line]
    for series, label, size, divergence in points:
        color = f"var({STYLES[series][1]})"
        placed.append((plot.x(size), plot.y(divergence), label, color))
    parts += plot.labels(placed, lines)
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--off-grid", default="", help="its name off the grid")
    parser.add_argument("--text", default="wikitext2-raw-test.txt")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    points = points_of(asked.table, asked.model, asked.off_grid, asked.text)
    title = "Divergence at a size"
    wide = [f"{asked.model} on {asked.text.split('.')[0]}, lower is better"]
    narrow = [asked.model, f"on {asked.text.split('.')[0]}, lower is better"]
    if asked.off_grid:
        hollow = "hollow: the weights were moved off their 4-bit grid"
        wide.append(hollow)
        narrow.append(hollow)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "sizes.svg").write_text(draw(points, 860, 440, title, wide))
    (asked.out / "sizes-narrow.svg").write_text(draw(points, 360, 380, title, narrow))


if __name__ == "__main__":
    main()
