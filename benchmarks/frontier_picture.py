"""The picture of ``frontier.py``: bits a weight against divergence as an SVG, for light and dark pages."""

from __future__ import annotations

from drawing import Marker, Plot, Point, head, legend, lower_left, marker, polyline

WIDTH, HEIGHT = 900, 600
PLACE = (76, 104, 872, 540)  # the plot's rectangle
HALVES = [step / 2 for step in range(2, 41)]
# Markers by the position of a series among the other tools' and among ours; ours have one colour.
OTHERS: tuple[Marker, ...] = (
    ("circle", "--a", False), ("circle", "--a", True), ("square", "--b", True), ("diamond", "--c", True),
    ("diamond", "--d", False),
)  # fmt: skip
OURS: tuple[Marker, ...] = (
    ("triangle", "--ours", True),
    ("circle", "--ours", True),
    ("square", "--ours", False),
)


def draw(points: list[Point], conditions: str) -> str:
    """The SVG of points ``(series, label, bits a weight, divergence)``, with a line along our own best ones."""
    points = [point for point in points if point[3] > 0]
    bits, divergences = [point[2] for point in points], [point[3] for point in points]
    plot = Plot(
        PLACE,
        (min(bits) / 1.07, max(bits) * 1.09),
        (min(divergences) / 1.5, max(divergences) * 1.5),
    )
    series = list(dict.fromkeys(point[0] for point in points))
    ours = [name for name in series if name.startswith("sparsellm")]
    styles = dict(
        zip([name for name in series if name not in ours], OTHERS, strict=False)
    )
    styles |= dict(zip(ours, OURS, strict=False))
    low, high = plot.horizontal
    best = lower_left([point for point in points if point[0] in ours])
    line = [(plot.x(bits), plot.y(kl)) for _, _, bits, kl in best]
    at = [
        (plot.x(bits), plot.y(kl), label, styles[name])
        for name, label, bits, kl in points
    ]
    parts = [
        *head(
            WIDTH,
            HEIGHT,
            "The frontier: bits a weight against divergence",
            [conditions],
        ),
        *plot.grid(
            tick
            for tick in HALVES
            if low <= tick <= high and (tick <= 4 or tick.is_integer())
        ),
        *plot.names(
            "bits a weight of the linears, with all overhead",
            "KL from the dense model, nats a token",
        ),
        polyline(line),
        *legend(76, {name: styles[name] for name in series}),
        *[marker(x, y, style) for x, y, _, style in at],
        *plot.labels(
            [(x, y, label, f"var({style[1]})") for x, y, label, style in at], [line]
        ),
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"
