"""What the scripts' pictures share: plots with logarithmic axes as SVG, for light and dark pages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from xml.sax.saxutils import escape

FONT = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"'
LETTER, LINE = 6.7, 11.0  # pixels: a letter of a label in the mean, and its height
# Where the label of a point may be, the best place first: its anchor, and pixels from the point.
AROUND = (
    ("start", 8, 4), ("end", -8, 4), ("middle", 0, -9), ("middle", 0, 17), ("start", 6, -6), ("end", -6, -6),
    ("start", 6, 14), ("end", -6, 14), ("middle", 0, -20), ("middle", 0, 28),
)  # fmt: skip
STYLE = """<style>
:root{--page:#fff;--ink:#1d2433;--faint:#5f6b7c;--grid:#e4e7ec;--ours:#b82d20;--a:#2f6fb0;--b:#0b7a75;--c:#9a5b00;--d:#7a4fb0}
@media (prefers-color-scheme:dark){:root{--page:#14181f;--ink:#e8ebf0;--faint:#a3adbb;--grid:#2b323d;--ours:#ff7a6b;
--a:#7db4ee;--b:#4fc4bd;--c:#eba94a;--d:#bd9af0}}
</style>"""

Marker = tuple[str, str, bool]  # shape, colour, and whether it is filled
Point = tuple[str, str, float, float]  # series, label, and the values on the two axes
Box = tuple[float, float, float, float]  # left, top, right, bottom
Line = list[tuple[float, float]]  # corners in pixels


def text(
    x: float,
    y: float,
    content: str,
    *,
    size: int = 13,
    color: str = "#333",
    anchor: str = "start",
    bold: bool = False,
) -> str:
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{weight}'
    return f'<text {place} fill="{color}">{escape(content)}</text>'


def head(
    width: int, height: int, title: str, conditions: Iterable[str]
) -> Iterator[str]:
    """The start of a picture: the page, its title, and lines of conditions below."""
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}" {FONT}>'
    )
    yield STYLE
    yield f'<rect width="{width}" height="{height}" rx="8" fill="var(--page)"/>'
    yield text(24, 34, title, size=18, color="var(--ink)", bold=True)
    for number, line in enumerate(conditions):
        yield text(24, 54 + 15 * number, line, size=11, color="var(--faint)")


def legend(y: float, styles: dict[str, Marker]) -> Iterator[str]:
    """The names of series side by side, each behind its marker."""
    x = 24.0
    for name, style in styles.items():
        yield marker(x + 5, y, style)
        yield text(x + 15, y + 4, name, size=12, color="var(--ink)")
        x += 34 + 6.6 * len(name)


def marker(x: float, y: float, style: Marker) -> str:
    shape, color, filled = style
    paint = (
        f'fill="var({color})" stroke="var(--page)"'
        if filled
        else f'fill="var(--page)" stroke="var({color})"'
    )
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.6" stroke-width="1.6" {paint}/>'
    corners = {
        "square": ((-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)),
        "diamond": ((0, -5.8), (5.8, 0), (0, 5.8), (-5.8, 0)),
        "triangle": ((0, -5.6), (5.4, 4.2), (-5.4, 4.2)),
    }[shape]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}" stroke-width="1.6" {paint}/>'


def polyline(line: Line, color: str = "--ours") -> str:
    """A line through points, such as our own best ones."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
    return f'<polyline points="{path}" fill="none" stroke="var({color})" stroke-width="2.5"/>'


def lower_left(points: list[Point]) -> list[Point]:
    """The points that no other point beats in both values, by the first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda item: (item[2], item[3])):
        if not front or point[3] < front[-1][3]:
            front.append(point)
    return front


def ticks(low: float, high: float) -> list[float]:
    """Round values within the ends of a logarithmic axis, more of them where the axis is short."""
    digits = (1, 2, 5) if high / low > 12 else (1, 1.5, 2, 3, 4, 5, 7)
    values = [digit * 10.0**power for power in range(-9, 7) for digit in digits]
    return [value for value in values if low <= value <= high]


class Plot:
    """A rectangle of the page in which points are placed. Both axes are logarithmic.

    Args:
        place: the rectangle, in pixels.
        horizontal: the values at the left and the right end.
        vertical: the values at the bottom and the top.
    """

    def __init__(
        self, place: Box, horizontal: tuple[float, float], vertical: tuple[float, float]
    ) -> None:
        self.left, self.top, self.right, self.bottom = place
        self.horizontal, self.vertical = horizontal, vertical

    def x(self, value: float) -> float:
        low, high = self.horizontal
        return self.left + math.log(value / low) / math.log(high / low) * (
            self.right - self.left
        )

    def y(self, value: float) -> float:
        low, high = self.vertical
        return self.bottom - math.log(value / low) / math.log(high / low) * (
            self.bottom - self.top
        )

    def grid(self, across: Iterable[float] | None = None) -> Iterator[str]:
        """Lines and names of values; ``across`` are those of the horizontal axis, :func:`ticks` by default."""
        for tick in ticks(*self.horizontal) if across is None else across:
            x = self.x(tick)
            yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{self.top}" y2="{self.bottom}" stroke="var(--grid)"/>'
            yield text(
                x,
                self.bottom + 20,
                f"{tick:,g}",
                size=12,
                color="var(--faint)",
                anchor="middle",
            )
        for tick in ticks(*self.vertical):
            y = self.y(tick)
            yield f'<line x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--grid)"/>'
            yield text(
                self.left - 8,
                y + 4,
                f"{tick:,g}",
                size=12,
                color="var(--faint)",
                anchor="end",
            )

    def names(self, horizontal: str, vertical: str) -> Iterator[str]:
        """The names of the two axes."""
        middle, x = (self.top + self.bottom) / 2, self.left - 56
        across = (self.left + self.right) / 2, self.bottom + 44
        yield text(*across, horizontal, size=13, color="var(--ink)", anchor="middle")
        upright = text(
            x, middle, vertical, size=13, color="var(--ink)", anchor="middle"
        )
        yield f'<g transform="rotate(-90 {x} {middle})">{upright}</g>'

    def labels(
        self, placed: list[tuple[float, float, str, str]], lines: Iterable[Line]
    ) -> Iterator[str]:
        """Names of points ``(x, y, label, colour)``, where they cover least of points, other names and lines."""
        taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y, _, _ in placed]
        for line in lines:
            taken += along(line)
        for x, y, label, color in placed:
            wide = LETTER * len(label)
            boxes = []
            for anchor, dx, dy in AROUND:
                left, base = (
                    x + dx - wide * {"start": 0, "middle": 0.5, "end": 1}[anchor],
                    y + dy,
                )
                boxes.append((left, base - LINE + 1, left + wide, base + 2))
            costs = [
                sum(overlap(box, other) + self.outside(box) for other in taken)
                for box in boxes
            ]
            best = costs.index(min(costs))
            taken.append(boxes[best])
            anchor, dx, dy = AROUND[best]
            yield text(x + dx, y + dy, label, size=11, color=color, anchor=anchor)

    def outside(self, box: Box) -> float:
        """What it costs a label to leave the plot: more than to cover another."""
        left, top, right, bottom = box
        inside = (
            self.left <= left
            and right <= self.right + 20
            and self.top - 8 <= top
            and bottom <= self.bottom
        )
        return 0.0 if inside else 1e4


def along(line: Line) -> Iterator[Box]:
    """Small boxes along a line."""
    for (x, y), (right, end) in itertools.pairwise(line):
        steps = max(1, round(math.hypot(right - x, end - y) / 4))
        for step in range(steps):
            at = x + (right - x) * step / steps, y + (end - y) * step / steps
            yield at[0] - 1.5, at[1] - 1.5, at[0] + 1.5, at[1] + 1.5


def overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0.0) * max(high, 0.0)
