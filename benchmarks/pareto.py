"""Perplexity against CPU time of every method and effort, with llmcompressor and the published algorithm.

    python benchmarks/pareto.py --text wikitext2-raw-test.txt --python peers/bin/python --picture pareto.svg
    python benchmarks/pareto.py ... --only-known                     # the table and the picture of finished cells
    python benchmarks/pareto.py ... --methods wanda --efforts        # no effort of the method sparsellm

A cell is a run of one tool in its own process, as in ``quality.py``, with which this script shares its file: no cell is
run twice. The environment of ``--python`` has llmcompressor, as ``peers.py`` says; its cells hold for every version of
sparsellm. CPU seconds are those of the whole process, with its imports; set ``OMP_NUM_THREADS=1``, since threads that
wait for others count too. The line of the picture is the lowest perplexity that sparsellm has within a time. The script
says which other tool is below it: nothing of sparsellm is as good in both.
"""

from __future__ import annotations

import argparse
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drawing import Line, Marker, Plot, head, legend, lower_left, marker, polyline, text
from peers import run
from quality import (
    OUT,
    Cells,
    add_conditions,
    cell_key,
    conditions_of,
    excess_ratio,
    heading,
    measure,
    run_cell,
)
from wikipedia import write_wikipedia

PAPER = "sparsellm-paper"
PEERS = ("sparsegpt", "wanda")
METHODS = ("magnitude", "wanda", "sparsegpt", "admm", PAPER)
OURS = {
    "sparsellm, by effort": ("triangle", "--ours", True),
    "local methods of sparsellm": ("circle", "--ours", False),
}
OTHERS = {
    "llmcompressor": ("square", "--a", True),
    "the published algorithm": ("diamond", "--c", True),
}
STYLES: dict[str, Marker] = {**OURS, **OTHERS}
BY_EFFORT, LOCAL, PEER, PUBLISHED = STYLES
# pixels: the width of a panel with its axis, and the rest
PANEL, HEIGHT, TOP, BOTTOM = (
    480,
    560,
    134,
    500,
)
HIGHEST = 30  # times the lowest perplexity; what is above stands at the upper edge, with its value

Cell = dict[str, Any]
Rows = dict[str, dict["Tried", Cell]]  # by target


@dataclass(frozen=True)
class Tried:
    """A row of the table at each target: its name, its series and label in the picture, and how it is run."""

    name: str
    series: str
    label: str
    method: str
    settings: tuple[str, ...] = ()

    def cell(self, arguments: argparse.Namespace, target: str) -> Cell | None:
        """Its result, which is made if that is asked for and possible."""
        peer = self.series == PEER
        cells = Cells(arguments.cells, versioned=not peer)
        method = f"{PEER}/{self.method}" if peer else self.method
        key = cell_key(arguments, method, target, arguments.seed, self.settings)
        if arguments.only_known or (peer and not arguments.python):
            result: Cell | None = cells.known(key)
            return result

        def make() -> Cell:
            if peer:
                return run(arguments, self.method, target)
            return run_cell(
                arguments, self.method, target, arguments.seed, self.settings
            )

        made: Cell = cells.get(key, make)
        return made


def tried(arguments: argparse.Namespace) -> list[Tried]:
    local = [
        Tried(name, LOCAL, name, name) for name in arguments.methods if name != PAPER
    ]
    efforts = [
        Tried(
            f"sparsellm, effort {n}",
            BY_EFFORT,
            f"effort {n}",
            "sparsellm",
            (f"effort={n}",),
        )
        for n in arguments.efforts
    ]
    peers = [Tried(f"{PEER}: {name}", PEER, name, name) for name in PEERS]
    paper = [
        Tried(PAPER, PUBLISHED, "as published", PAPER),
        Tried(
            f"{PAPER}, safeguard",
            PUBLISHED,
            "with safeguard",
            PAPER,
            ("options.safeguard=true",),
        ),
    ]
    return [*local, *efforts, *peers, *(paper if PAPER in arguments.methods else ())]


def environments(rows: Rows) -> list[str]:
    """What llmcompressor's cells were made with; more than one line if its environment changed between them."""
    versions = [
        cell["versions"]
        for cells in rows.values()
        for cell in cells.values()
        if "versions" in cell
    ]
    return sorted(
        {
            ", ".join(f"{name} {value}" for name, value in tool.items())
            for tool in versions
        }
    )


def goal(target: str) -> str:
    return target if ":" in target else f"{float(target):.0%}"


def print_table(rows: Rows, dense: Cell) -> None:
    """Perplexity and ratio on the text, and on ``--other-text`` where a cell has it."""
    print(
        "| target | method | perplexity | ratio | CPU s | CPU time / sparsegpt's | peak memory (GB) |"
    )
    print("|---|---|---|---|---|---|---|")
    for target, cells in rows.items():
        base = next(
            (cell for tool, cell in cells.items() if tool.name == "sparsegpt"), None
        )
        for tool, cell in cells.items():
            print(f"| {goal(target)} | {tool.name} | {columns(cell, base, dense)} |")


def columns(cell: Cell, base: Cell | None, dense: Cell) -> str:
    if "failed" in cell:
        return f"{cell['failed']} | – | – | – | –"
    texts = [text for text in ("perplexity", "other") if text in cell]
    ratio, times = "–", "–"
    if base is not None:
        ratio = ", ".join(
            f"{excess_ratio(cell, base, dense[text], text):.3f}"
            for text in texts
            if text in base
        )
        times = f"{cell['cpu_seconds'] / base['cpu_seconds']:.2f}"
    perplexity = ", ".join(f"{cell[text]:,.1f}" for text in texts)
    peak = cell["peak_rss_bytes"] / 1e9
    return f"{perplexity} | {ratio} | {cell['cpu_seconds']:.0f} | {times} | {peak:.2f}"


def drawable(cells: dict[Tried, Cell]) -> dict[Tried, Cell]:
    return {
        tool: cell
        for tool, cell in cells.items()
        if "failed" not in cell and math.isfinite(cell["perplexity"])
    }


def below_the_line(rows: Rows) -> list[str]:
    """Where no run of sparsellm at the same target has as low a perplexity as another tool's in as little CPU time."""
    result = []
    for target, cells in rows.items():
        known = drawable(cells)
        ours = [cell for tool, cell in known.items() if tool.series in OURS]
        for tool, cell in known.items():
            if tool.series in OTHERS and not any(
                point["cpu_seconds"] <= cell["cpu_seconds"]
                and point["perplexity"] <= cell["perplexity"]
                for point in ours
            ):
                result.append(f"{tool.name} at {goal(target)}")
    return result


def draw(rows: Rows, title: str, conditions: list[str]) -> str:
    """The SVG, with a panel for each target that has a point."""
    panels = {
        target: known for target, cells in rows.items() if (known := drawable(cells))
    }
    drawn = {tool.series for known in panels.values() for tool in known}
    styles = {name: style for name, style in STYLES.items() if name in drawn}
    parts = [
        *head(PANEL * max(len(panels), 1), HEIGHT, title, conditions),
        *legend(88, styles),
    ]
    for number, (target, cells) in enumerate(panels.items()):
        parts += panel(goal(target), cells, PANEL * number)
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(name: str, cells: dict[Tried, Cell], left: float) -> list[str]:
    seconds, perplexities = (
        [cell[key] for cell in cells.values()] for key in ("cpu_seconds", "perplexity")
    )
    top = min(max(perplexities) * 1.3, min(perplexities) * HIGHEST)
    place = (left + 72, TOP, left + PANEL - 24, BOTTOM)
    plot = Plot(
        place, (min(seconds) / 1.4, max(seconds) * 1.6), (min(perplexities) / 1.6, top)
    )
    points = [
        (
            tool.series,
            label(tool, cell, top),
            cell["cpu_seconds"],
            min(cell["perplexity"], top),
        )
        for tool, cell in cells.items()
    ]
    best = lower_left([point for point in points if point[0] in OURS])
    line = steps(
        [(plot.x(time), plot.y(perplexity)) for _, _, time, perplexity in best],
        plot.right,
    )
    at = [
        (plot.x(time), plot.y(perplexity), named, STYLES[series])
        for series, named, time, perplexity in points
    ]
    return [
        text(
            plot.left,
            TOP - 14,
            f"{name} zeros" if name.endswith("%") else name,
            size=14,
            color="var(--ink)",
            bold=True,
        ),
        *plot.grid(),
        *plot.names("CPU seconds", "perplexity"),
        polyline(line),
        *[marker(x, y, style) for x, y, _, style in at],
        *plot.labels(
            [(x, y, named, f"var({style[1]})") for x, y, named, style in at], [line]
        ),
    ]


def label(tool: Tried, cell: Cell, top: float) -> str:
    value = cell["perplexity"]
    return f"{tool.label} {value:,.{0 if value >= 200 else 1}f}{' ↑' if value > top else ''}"


def steps(best: Line, right: float) -> Line:
    """The lowest value up to each place: level until the next better point, down there, and on to the right end."""
    line: Line = []
    for x, y in best:
        line += [(x, line[-1][1]), (x, y)] if line else [(x, y)]
    return [*line, (right, line[-1][1])] if line else []


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_conditions(parser)
    parser.add_argument(
        "--targets",
        nargs="*",
        default=["0.7", "2:4"],
        help="sparsities, or patterns such as 2:4",
    )
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument(
        "--efforts",
        nargs="*",
        type=int,
        default=[0, 1, 2, 3],
        help="of the method sparsellm",
    )
    parser.add_argument(
        "--python", help="interpreter of the environment that has llmcompressor"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-known", action="store_true", help="run nothing")
    parser.add_argument("--picture", type=Path, help="write an SVG")
    parser.add_argument("--cells", type=Path, default=OUT / "quality.json")
    # no more settings; llmcompressor's default
    parser.set_defaults(set=[], batch_size=1)
    arguments = parser.parse_args()
    if arguments.python and shutil.which(arguments.python) is None:
        parser.error(
            f"--python {arguments.python}: no such program; give the interpreter that has llmcompressor"
        )
    arguments.seeds = [arguments.seed]
    arguments.calibration = arguments.calibration or str(
        write_wikipedia(OUT / "wikipedia.txt")
    )
    return arguments


def main() -> None:
    arguments = parsed()
    cells = Cells(arguments.cells)
    key = f"{conditions_of(arguments)}/dense"
    if arguments.only_known and cells.known(key) is None:
        raise SystemExit(
            f"{arguments.cells} has no cell {cells.code}/{key}; run without --only-known"
        )
    dense = cells.get(key, lambda: measure(arguments, arguments.model))
    rows: Rows = {target: {} for target in arguments.targets}
    missing = []
    # all cells of a target before the next, so that times are comparable
    for target in arguments.targets:
        for tool in tried(arguments):
            result = tool.cell(arguments, target)
            if result is None:
                missing.append(f"{tool.name} at {goal(target)}")
            else:
                rows[target][tool] = result
    print(heading(arguments, dense, cells.code))
    for line in environments(rows):
        print(f"{line}\n")
    print_table(rows, dense)
    below = below_the_line(rows)
    print(f"\nBelow the line: {'; '.join(below) or 'nothing of another tool'}.")
    if missing:
        why = (
            ""
            if arguments.python or arguments.only_known
            else "; --python names the interpreter with llmcompressor"
        )
        print(f"Not measured: {'; '.join(missing)}{why}.")
    if arguments.picture:
        conditions = [
            f"Model {Path(arguments.model).name}, dense perplexity {dense['perplexity']:.1f}; "
            f"{Path(arguments.text).name}, windows of {arguments.window}; calibration {arguments.samples} × "
            f"{arguments.window} tokens",
            "CPU seconds of the whole process; the line: the lowest perplexity of sparsellm within that time",
        ]
        picture = draw(rows, "Perplexity against CPU time", conditions)
        arguments.picture.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
