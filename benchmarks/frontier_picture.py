"""The picture of ``frontier.py``: bits a weight against divergence as an SVG, for light and dark pages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from xml.sax.saxutils import escape

from figure import FONT, text

WIDTH, HEIGHT = 900, 600
LEFT, RIGHT, TOP, BOTTOM = 76, 872, 104, 540  # of the plot
LETTER, LINE = 6.4, 11.0  # pixels: a letter of a label in the mean, and its height
STYLE = """<style>
:root{--page:#fff;--ink:#1d2433;--faint:#5f6b7c;--grid:#e4e7ec;--ours:#b82d20;--a:#2f6fb0;--b:#0b7a75;--c:#9a5b00;--d:#7a4fb0}
@media (prefers-color-scheme:dark){:root{--page:#14181f;--ink:#e8ebf0;--faint:#a3adbb;--grid:#2b323d;--ours:#ff7a6b;
--a:#7db4ee;--b:#4fc4bd;--c:#eba94a;--d:#bd9af0}}
</style>"""
# Markers by the position of a series among the other tools' and among ours; ours have one colour.
OTHERS = (
    ("circle", "--a", False), ("circle", "--a", True), ("square", "--b", True), ("diamond", "--c", True),
    ("diamond", "--d", False),
)  # fmt: skip
OURS = (("triangle", "--ours", True), ("circle", "--ours", True), ("square", "--ours", False))

Point = tuple[str, str, float, float]  # series, label, bits a weight, divergence
Box = tuple[float, float, float, float]  # left, top, right, bottom


class Axes:
    """Where a point is, in pixels. Both axes are logarithmic, with room at the ends."""

    def __init__(self, points: list[Point]) -> None:
        self.bits = min(point[2] for point in points) / 1.07, max(point[2] for point in points) * 1.09
        self.kl = min(point[3] for point in points) / 1.5, max(point[3] for point in points) * 1.5

    def x(self, bits: float) -> float:
        return LEFT + math.log(bits / self.bits[0]) / math.log(self.bits[1] / self.bits[0]) * (RIGHT - LEFT)

    def y(self, kl: float) -> float:
        return BOTTOM - math.log(kl / self.kl[0]) / math.log(self.kl[1] / self.kl[0]) * (BOTTOM - TOP)

    def grid(self) -> Iterator[str]:
        """Lines and names of values."""
        for tick in [step / 2 for step in range(2, 41)]:
            if self.bits[0] <= tick <= self.bits[1] and (tick <= 4 or tick.is_integer()):
                x = self.x(tick)
                yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}" stroke="var(--grid)"/>'
                yield text(x, BOTTOM + 20, f"{tick:g}", size=12, color="var(--faint)", anchor="middle")
        for power in range(-9, 3):
            for digit in (1, 2, 5):
                tick = digit * 10.0**power
                if self.kl[0] <= tick <= self.kl[1]:
                    y = self.y(tick)
                    yield f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--grid)"/>'
                    yield text(LEFT - 8, y + 4, f"{tick:g}", size=12, color="var(--faint)", anchor="end")


def marker(x: float, y: float, style: tuple[str, str, bool]) -> str:
    shape, color, filled = style
    paint = f'fill="var({color})" stroke="var(--page)"' if filled else f'fill="var(--page)" stroke="var({color})"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.6" stroke-width="1.6" {paint}/>'
    corners = {
        "square": ((-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)),
        "diamond": ((0, -5.8), (5.8, 0), (0, 5.8), (-5.8, 0)),
        "triangle": ((0, -5.6), (5.4, 4.2), (-5.4, 4.2)),
    }[shape]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}" stroke-width="1.6" {paint}/>'


def lower_left(points: list[Point]) -> list[Point]:
    """The points that no other point beats in both bits and divergence, by bits."""
    found: list[Point] = []
    for point in sorted(points, key=lambda each: (each[2], each[3])):
        if not found or point[3] < found[-1][3]:
            found.append(point)
    return found


def along(line: list[tuple[float, float]]) -> Iterator[Box]:
    """Small boxes along a line."""
    for (x, y), (right, end) in itertools.pairwise(line):
        steps = max(1, round(math.hypot(right - x, end - y) / 4))
        for step in range(steps):
            at = x + (right - x) * step / steps, y + (end - y) * step / steps
            yield at[0] - 1.5, at[1] - 1.5, at[0] + 1.5, at[1] + 1.5


def labels(placed: list[tuple[float, float, str, str]], line: list[tuple[float, float]]) -> Iterator[str]:
    """The names of points ``(x, y, label, colour)``, beside them where they cover least of points, names and a line."""
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y, _, _ in placed]
    taken += along(line)
    for x, y, label, color in placed:
        wide = LETTER * len(label)
        choices = [
            (x + dx - (wide if anchor == "end" else wide / 2 if anchor == "middle" else 0), y + dy)
            for anchor, dx, dy in (
                ("start", 8, 4), ("end", -8, 4), ("middle", 0, -9), ("middle", 0, 17), ("start", 6, -6),
                ("end", -6, -6), ("start", 6, 14), ("end", -6, 14), ("middle", 0, -20), ("middle", 0, 28),
            )
        ]  # fmt: skip
        boxes = [(left, base - LINE + 1, left + wide, base + 2) for left, base in choices]
        best = min(range(len(boxes)), key=lambda at: (sum(overlap(boxes[at], other) for other in taken), at))
        taken.append(boxes[best])
        yield text(*choices[best], label, size=11, color=color)


def overlap(one: Box, other: Box) -> float:
    """The area that two boxes share; what is outside of the plot counts too."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    outside = 1e4 if one[0] < LEFT or one[2] > RIGHT + 20 or one[1] < TOP - 8 or one[3] > BOTTOM else 0.0
    return max(wide, 0.0) * max(high, 0.0) + outside


def draw(points: list[Point], conditions: str) -> str:
    """The SVG of points ``(series, label, bits a weight, divergence)``, with a line along our own best ones."""
    points = [point for point in points if point[3] > 0]
    axes = Axes(points)
    series = list(dict.fromkeys(point[0] for point in points))
    ours = [name for name in series if name.startswith("sparsellm")]
    styles = dict(zip([name for name in series if name not in ours], OTHERS, strict=False))
    styles |= dict(zip(ours, OURS, strict=False))
    title = "The frontier: bits a weight against divergence"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(title)}" {FONT}>',
        STYLE,
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="var(--page)"/>',
        text(24, 34, title, size=18, color="var(--ink)", bold=True),
        text(24, 54, conditions, size=11, color="var(--faint)"),
        *axes.grid(),
        text((LEFT + RIGHT) / 2, BOTTOM + 44, "bits a weight of the linears, with all overhead", size=13,
             color="var(--ink)", anchor="middle"),
        f'<g transform="rotate(-90 20 {(TOP + BOTTOM) / 2})">'
        + text(20, (TOP + BOTTOM) / 2, "KL from the dense model, nats a token", size=13, color="var(--ink)",
               anchor="middle")
        + "</g>",
    ]  # fmt: skip
    best = lower_left([point for point in points if point[0] in ours])
    line = [(axes.x(bits), axes.y(kl)) for _, _, bits, kl in best]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
    parts.append(f'<polyline points="{path}" fill="none" stroke="var(--ours)" stroke-width="2.5"/>')
    x = 24.0
    for name in series:
        parts += [marker(x + 5, 76, styles[name]), text(x + 15, 80, name, size=12, color="var(--ink)")]
        x += 34 + 6.6 * len(name)
    at = [(axes.x(bits), axes.y(kl), label, styles[name]) for name, label, bits, kl in points]
    parts += [marker(x, y, style) for x, y, _, style in at]
    parts += labels([(x, y, label, f"var({style[1]})") for x, y, label, style in at], line)
    return "\n".join([*parts, "</svg>"]) + "\n"
