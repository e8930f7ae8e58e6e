"""The charts of a report as Plotly's own JSON, each with a text and a table that say the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsellm.records import LinearResult, Pruning, Step

# Okabe and Ito's colours, which stay apart for the colour-blind; each line also has a dash and a symbol of its own.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
_MEMORY_PHASES = {  # the step of the prediction -> the phase whose end shows its peak
    "checking": "check",
    "embedding": "embed",
    "gradients": "gradients",
    "statistics": "prune/statistics",
    "solving": "prune/solve",
    "sweeps": "sweep",
}
_TIMED_PHASES = {  # the step of the prediction -> the phases whose seconds it predicts
    "calibration": ("calibration",),
    "check": ("check",),
    "gradients": ("gradients",),
    "survey": ("allocation",),
    "replay": ("replay",),
    "prune": ("embed", "read", "prune", "forward", "write"),
    "sweep": ("sweep",),
    "save": ("count",),
}
_LOWEST_POWER, _POWERS_A_BIN = -16.0, 0.5  # the bins of sparsellm.run.magnitudes

Trace = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table as text."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Chart:
    """One chart and its alternatives in text.

    Attributes:
        name: unique in its page; letters and hyphens.
        title: of the chart.
        text: what it shows, in a sentence or two.
        table: its numbers.
        traces, layout: as ``data`` and ``layout`` of Plotly.
        height: in pixels.
    """

    name: str
    title: str
    text: str
    table: Table
    traces: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 340

    @property
    def figure(self) -> dict[str, Any]:
        """JSON values for Plotly; numbers that JSON does not have are null."""
        return {"data": finite(self.traces), "layout": finite(self.layout)}


def finite(value: Any) -> Any:
    """JSON values with null in place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "–"


def number(value: float | None, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if value is not None and math.isfinite(value) else "–"


def short_names(kinds: Iterable[str]) -> dict[str, str]:
    """The shortest endings of dotted names that tell them apart."""
    every = list(dict.fromkeys(kinds))
    shortened = {}
    for kind in every:
        parts = kind.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        shortened[kind] = next(
            (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in every) == 1), kind
        )
    return shortened


def line(name: str, x: Sequence[Any], y: Sequence[Any], position: int, **more: Any) -> Trace:
    """A line with a colour, a dash and a symbol by its position among others."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": COLOURS[position % len(COLOURS)], "dash": _DASHES[position // 2 % len(_DASHES)]},
        "marker": {"symbol": _SYMBOLS[position % len(_SYMBOLS)], "size": 6},
        **more,
    }


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def whole_axis(title: str, numbers: Sequence[int], **more: Any) -> dict[str, Any]:
    """An axis of whole numbers with at most a dozen ticks."""
    return axis(title, tick0=0, dtick=max(1, math.ceil((max(numbers) - min(numbers) + 1) / 12)), **more)


# ---------------------------------------------------------------------- by linear


@dataclass(frozen=True)
class _Grid:
    """Values by kind of linear and block: linears of one kind in one block, such as experts, are one cell."""

    kinds: list[str]
    blocks: list[int]
    cells: dict[tuple[str, int], list[LinearResult]]

    @classmethod
    def of(cls, linears: Sequence[LinearResult]) -> _Grid:
        names = short_names(linear.kind for linear in linears)
        cells: dict[tuple[str, int], list[LinearResult]] = {}
        for linear in linears:
            cells.setdefault((names[linear.kind], linear.block), []).append(linear)
        return cls(list(names.values()), sorted({block for _, block in cells}), cells)

    def values(self, of: Callable[[list[LinearResult]], float]) -> list[list[float | None]]:
        """One row for each kind, one column for each block; None where a block has no such linear."""
        return [
            [of(self.cells[kind, block]) if (kind, block) in self.cells else None for block in self.blocks]
            for kind in self.kinds
        ]

    def table(self, values: list[list[float | None]], shown: Callable[[float], str]) -> Table:
        rows = [
            (str(block), *(shown(row[i]) if row[i] is not None else "–" for row in values))  # type: ignore[arg-type]
            for i, block in enumerate(self.blocks)
        ]
        return Table(("block", *self.kinds), rows)


def sparsity_of(linears: Iterable[LinearResult]) -> float:
    """The fraction of zeros over some linears."""
    each = list(linears)
    return sum(linear.zeros for linear in each) / sum(linear.weights for linear in each)


def error_of(linears: Iterable[LinearResult]) -> float:
    """The mean error of some linears, those without a finite one left out; NaN if there are none."""
    errors = [linear.error for linear in linears if math.isfinite(linear.error)]
    return sum(errors) / len(errors) if errors else math.nan


def sparsity_map(linears: Sequence[LinearResult]) -> Chart:
    """Sparsity by kind of linear and block."""
    grid = _Grid.of(linears)
    values = grid.values(sparsity_of)
    low, high = _ends(values)
    bar = {"tickformat": ".0%", "title": {"text": "zeros"}}
    return Chart(
        "sparsity-map",
        "Sparsity of each linear",
        f"The fraction of zeros of each linear, from {percent(low)} to {percent(high)}. Darker is denser.",
        grid.table(values, percent),
        [_heat_map(grid, values, [[percent(_or_nan(v)) for v in row] for row in values], bar, "zeros")],
        _map_layout(grid),
        _map_height(grid),
    )


def error_map(linears: Sequence[LinearResult]) -> Chart:
    """Relative error by kind of linear and block, in a logarithmic colour scale."""
    grid = _Grid.of(linears)
    values = grid.values(error_of)
    powers = [[math.log10(v) if v is not None and v > 0 else None for v in row] for row in values]
    low, high = _ends(values)
    known = [power for row in powers for power in row if power is not None and math.isfinite(power)]
    ticks = [n / 2 for n in range(math.floor(2 * min(known)), math.ceil(2 * max(known)) + 1)] if known else []
    bar = {"tickvals": ticks, "ticktext": [f"{10**tick:.2g}" for tick in ticks], "title": {"text": "error"}}
    return Chart(
        "error-map",
        "Error of each linear",
        "‖X Wᵀ − X W_denseᵀ‖² / ‖X W_denseᵀ‖² on the calibration inputs that the method fitted to, "
        f"from {number(low, 2)} to {number(high, 2)}; the colours are logarithmic, and darker is a smaller error.",
        grid.table(values, lambda value: number(value, 3)),
        [_heat_map(grid, powers, [[number(v, 3) for v in row] for row in values], bar, "error")],
        _map_layout(grid),
        _map_height(grid),
    )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _ends(values: list[list[float | None]]) -> tuple[float, float]:
    known = [value for row in values for value in row if value is not None and math.isfinite(value)]
    return (min(known), max(known)) if known else (math.nan, math.nan)


def _heat_map(
    grid: _Grid, z: list[list[float | None]], texts: list[list[str]], bar: dict[str, Any], what: str
) -> Trace:
    return {
        "type": "heatmap",
        "z": z,
        "x": grid.blocks,
        "y": grid.kinds,
        "text": texts,
        "hovertemplate": "block %{x}, %{y}<br>" + what + " %{text}<extra></extra>",
        "colorscale": "Cividis",
        "colorbar": {"thickness": 12, **bar},
        "xgap": 1,
        "ygap": 1,
    }


def _map_layout(grid: _Grid) -> dict[str, Any]:
    return {
        "xaxis": whole_axis("block", grid.blocks, showgrid=False, zeroline=False),
        "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
    }


def _map_height(grid: _Grid) -> int:
    return 130 + 30 * max(3, len(grid.kinds))


def allocation_chart(pruning: Pruning) -> Chart:
    """The sparsity of each block, over all its pruned linears and by kind."""
    grid = _Grid.of(pruning.linears)
    whole = [sparsity_of(x for kind in grid.kinds for x in grid.cells.get((kind, block), [])) for block in grid.blocks]
    by_kind = grid.values(sparsity_of)
    traces = [
        line(kind, grid.blocks, row, position + 1, opacity=0.75)
        for position, (kind, row) in enumerate(zip(grid.kinds, by_kind, strict=True))
    ]
    traces.append(line("all of the block", grid.blocks, whole, 0, line={"color": COLOURS[0], "width": 4}))  # on top
    name = pruning.allocated_by or "uniform"
    return Chart(
        "allocation",
        "Where the zeros went",
        f"Sparsity by depth. The allocation is {name}; blocks range from {percent(min(whole))} to {percent(max(whole))}"
        f", and {percent(pruning.sparsity_asked)} was asked for.",
        Table(("block", "sparsity"), [(str(b), percent(v)) for b, v in zip(grid.blocks, whole, strict=True)]),
        traces,
        {
            "xaxis": whole_axis("block", grid.blocks),
            "yaxis": axis("zeros", tickformat=".0%"),
            "shapes": [reference_line(pruning.sparsity_asked)],
        },
        400,
    )


def reference_line(y: float) -> dict[str, Any]:
    """A dashed line across the chart; the page gives it the colour of its text."""
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": {"dash": "dash", "width": 1}}


# ---------------------------------------------------------------------- the course of the run


def sweep_chart(pruning: Pruning) -> Chart | None:
    """The divergence from the dense model after each pass of the sweep; None without a sweep."""
    passes = pruning.sweeps
    if not passes:
        return None
    numbers = [each.passes for each in passes]
    first, best = passes[0].held_out, min(passes, key=lambda each: (not math.isfinite(each.held_out), each.held_out))
    kept = f"{number(best.held_out)} after pass {best.passes}, whose weights were kept"
    if best is passes[0]:
        kept = "no pass was better, so the weights before it were kept"
    kept = f"{number(first)} before the first pass; {kept}."
    for stage in pruning.stages:
        left = number(min(each.held_out for each in stage.sweeps)) if stage.sweeps else "–"
        kept += f" A first stage, at sparsity {stage.sparsity_pruned:.0%}, was left at {left}."
    return Chart(
        "sweep",
        "The sweep",
        f"KL(dense ‖ pruned) in nats a token on held-out windows: {kept}",
        Table(
            ("passes", "held-out windows", "windows of the pass"),
            [(str(each.passes), number(each.held_out), number(each.train)) for each in passes],
        ),
        [
            line("held-out windows", numbers, [each.held_out for each in passes], 0),
            line("windows of the pass", numbers, [each.train for each in passes], 1),
        ],
        {"xaxis": whole_axis("passes", numbers), "yaxis": axis("KL, nats", rangemode="tozero")},
    )


def decomposition_charts(pruning: Pruning) -> list[Chart]:
    """Objective and error of the decomposition by iteration, a line for each block; empty where it did not run."""
    runs = [(linear.block, linear.history) for linear in pruning.linears if linear.history]
    views: tuple[tuple[str, str, str, Callable[[Step], float | None]], ...] = (
        ("objective", "The decomposition's objective", "penalty objective", lambda step: step.objective),
        (
            "unit-error",
            "The error of the decomposition",
            "error of the unit",
            lambda step: step.held_out_error if step.held_out_error is not None else step.train_error,
        ),
    )
    charts = []
    for name, title, what, of in views:
        if not any(of(step) is not None for _, history in runs for step in history):
            continue
        traces = [
            line(f"block {block}", [step.iteration for step in history], [of(step) for step in history], position)
            for position, (block, history) in enumerate(runs)
        ]
        most = max(len(history) for _, history in runs)
        rows = [
            (str(block), *(number(of(step)) for step in history), *[""] * (most - len(history)))
            for block, history in runs
        ]
        charts.append(
            Chart(
                name,
                title,
                f"The {what} of each block's feed-forward unit by iteration; iteration 0 is local pruning.",
                Table(("block", *(f"iteration {n}" for n in range(most))), rows),
                traces,
                {
                    "xaxis": whole_axis("iteration", range(most)),
                    "yaxis": axis(what, type="log"),
                    "showlegend": len(runs) <= 12,
                },
                380,
            )
        )
    return charts


def time_chart(pruning: Pruning) -> Chart | None:
    """Seconds of each phase; None if they are not known."""
    whole = {name: value for name, value in pruning.whole_seconds.items() if value >= 0}
    total = sum(whole.values())
    if not total:
        return None
    order = sorted(whole, key=lambda name: whole[name])
    rows = []
    for name in reversed(order):
        rows.append((name, f"{whole[name]:.1f}", percent(whole[name] / total)))
        parts = {key: took for key, took in pruning.seconds.items() if key.startswith(f"{name}/")}
        rows += [(f"– {key.partition('/')[2]}", f"{took:.1f}", percent(took / total)) for key, took in parts.items()]
    return Chart(
        "time",
        "Time of each phase",
        f"{total:.0f} seconds in all; {order[-1]} took {percent(whole[order[-1]] / total)} of them.",
        Table(("phase", "seconds", "share"), rows),
        [
            {
                "type": "bar",
                "orientation": "h",
                "x": [whole[name] for name in order],
                "y": order,
                "marker": {"color": COLOURS[0]},
            }
        ],
        {"xaxis": axis("seconds"), "yaxis": {"type": "category"}},
        120 + 26 * len(order),
    )


def forecast_chart(pruning: Pruning) -> Chart | None:
    """The predicted seconds of each step beside the measured ones; None if nothing was predicted."""
    predicted = {step: value for step, value in pruning.predicted_seconds.items() if step in _TIMED_PHASES}
    measured = {step: sum(pruning.seconds.get(phase, 0.0) for phase in _TIMED_PHASES[step]) for step in predicted}
    steps = [step for step in predicted if predicted[step] or measured[step]]
    if not steps:
        return None
    return Chart(
        "forecast",
        "Time against the prediction",
        f"Predicted when the run began: {sum(predicted.values()):.0f} seconds; measured: {sum(measured.values()):.0f}.",
        Table(
            ("step", "predicted s", "measured s"),
            [(step, f"{predicted[step]:.1f}", f"{measured[step]:.1f}") for step in steps],
        ),
        [
            _bars("predicted", steps, [predicted[step] for step in steps], 5),
            _bars("measured", steps, [measured[step] for step in steps], 1),
        ],
        {"yaxis": axis("seconds"), "barmode": "group"},
    )


def _bars(name: str, x: Sequence[str], y: Sequence[float], position: int) -> Trace:
    return {"type": "bar", "name": name, "x": list(x), "y": list(y), "marker": {"color": COLOURS[position]}}


def memory_chart(pruning: Pruning) -> Chart | None:
    """The predicted memory of each step beside the measured one; None if either is not known."""
    plan, peaks = pruning.memory, pruning.peaks_bytes
    if plan is None:
        return None
    steps = [step for step in _MEMORY_PHASES if step in plan.steps_bytes and _MEMORY_PHASES[step] in peaks]
    if not steps:
        return None
    predicted = [plan.steps_bytes[step] / 1e9 for step in steps]
    measured = [peaks[_MEMORY_PHASES[step]] / 1e9 for step in steps]
    return Chart(
        "memory",
        "Memory against the prediction",
        f"Peak {pruning.peak_rss_bytes / 1e9:.2f} GB, predicted {plan.predicted_peak_rss_bytes / 1e9:.2f} GB of a "
        f"budget of {plan.budget_bytes / 1e9:.2f} GB. Measured is the highest value so far at the end of the step.",
        Table(
            ("step", "predicted GB", "measured GB"),
            [(s, f"{p:.2f}", f"{m:.2f}") for s, p, m in zip(steps, predicted, measured, strict=True)],
        ),
        [
            _bars("predicted", steps, predicted, 5),
            _bars("measured", steps, measured, 1),
        ],
        {"yaxis": axis("GB"), "barmode": "group"},
    )


def magnitude_charts(magnitudes: Mapping[str, Mapping[str, Sequence[int]]], most: int = 12) -> list[Chart]:
    """Histograms of the weights' magnitudes before and after, one chart for each kind of linear.

    Args:
        magnitudes: by kind, the counts before and after.
        most: charts.
    """
    names = short_names(magnitudes)
    charts = []
    for position, (kind, counts) in enumerate(list(magnitudes.items())[:most]):
        before, after = counts.get("before", []), counts.get("after", [])
        total = sum(before)
        if not total or len(before) != len(after):
            continue
        centres = [2 ** (_LOWEST_POWER + (n + 0.5) * _POWERS_A_BIN) for n in range(len(before))]
        used = [n for n in range(len(before)) if before[n] or after[n]]
        shown = slice(used[0], used[-1] + 1)
        rows = [
            (f"{centre:.2g}", percent(b / total), percent(a / total))
            for centre, b, a in zip(centres[shown], before[shown], after[shown], strict=True)
        ]
        traces = [
            line(name, centres[shown], [c / total for c in values[shown]], p, mode="lines", fill="tozeroy")
            for p, (name, values) in enumerate((("before", before), ("after, kept", after)))
        ]
        for trace in traces:
            trace["line"]["shape"] = "hvh"
        charts.append(
            Chart(
                f"magnitudes-{position}",
                names[kind],
                f"Magnitudes of the weights of {names[kind]} in all blocks, before and after. After pruning "
                f"{percent(sum(after) / total)} of them are not zero.",
                Table(("|w|, about", "before", "after, kept"), rows),
                traces,
                {
                    "xaxis": axis("|w|", type="log", exponentformat="power"),
                    "yaxis": axis("share", tickformat=".0%", rangemode="tozero"),
                },
                260,
            )
        )
    return charts
