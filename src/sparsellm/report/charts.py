"""The charts of a run as Plotly's own JSON, each with a text and a table that say the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsellm.records import LinearResult, Pruning, Step, Totals

# Okabe and Ito's colours, which stay apart for the colour-blind; each line also has a dash and a symbol of its own.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
# The step of the prediction -> the phase whose end shows its peak, and the phases whose seconds it predicts.
_MEMORY_PHASES = {
    "checking": "check", "embedding": "embed", "gradients": "gradients", "statistics": "prune/statistics",
    "solving": "prune/solve", "sweeps": "sweep",
}  # fmt: skip
_TIMED_PHASES = {
    "calibration": ("calibration",), "check": ("check",), "gradients": ("gradients",), "survey": ("allocation",),
    "replay": ("replay",), "prune": ("embed", "read", "prune", "forward", "write"), "sweep": ("sweep",),
    "save": ("count",),
}  # fmt: skip

Plotly = dict[str, Any]  # a trace, an axis or a layout, as Plotly's JSON has it
Values = Sequence[float | None]


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
        text: what it shows, in a sentence or two.
        table: its numbers.
        traces, layout: as ``data`` and ``layout`` of Plotly.
        height: in pixels.
    """

    name: str
    title: str
    text: str
    table: Table
    traces: list[Plotly]
    layout: Plotly
    height: int = 340

    @property
    def figure(self) -> Plotly:
        """JSON values for Plotly; numbers that JSON does not have are null."""
        return {"data": _finite(self.traces), "layout": _finite(self.layout)}


def _finite(value: Any) -> Any:
    """JSON values with null in place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(share: float | None) -> str:
    return f"{share:.1%}" if share is not None and math.isfinite(share) else "–"


def number(value: float | None, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if value is not None and math.isfinite(value) else "–"


def short_number(value: float | None) -> str:
    return number(value, 3)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The shortest endings of dotted names that tell them apart."""
    every = list(dict.fromkeys(names))
    shortened = {}
    for name in every:
        parts = name.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        alone = (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in every) == 1)
        shortened[name] = next(alone, name)
    return shortened


def sparsity_of(linears: Iterable[LinearResult]) -> float:
    """The fraction of zeros over some linears."""
    return Totals.of(linears).sparsity


def error_of(linears: Iterable[LinearResult]) -> float:
    """The mean error of some linears, those without a finite one left out; NaN if there are none."""
    errors = [linear.error for linear in linears if math.isfinite(linear.error)]
    return sum(errors) / len(errors) if errors else math.nan


# ---------------------------------------------------------------------- parts of charts


def line(name: str, x: Sequence[float], y: Values, position: int) -> Plotly:
    """A line with a colour, a dash and a symbol by its position among others."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": COLOURS[position % len(COLOURS)], "dash": _DASHES[position // 2 % len(_DASHES)]},
        "marker": {"symbol": _SYMBOLS[position % len(_SYMBOLS)], "size": 6},
    }


def axis(title: str, **more: Any) -> Plotly:
    return {"title": {"text": title}, **more}


def whole_axis(title: str, numbers: Sequence[float], **more: Any) -> Plotly:
    """An axis of whole numbers with at most a dozen ticks."""
    return axis(title, tick0=0, dtick=max(1, math.ceil((max(numbers) - min(numbers) + 1) / 12)), **more)


def reference_line(y: float) -> Plotly:
    """A dashed line across the chart; the page gives it the colour of its text."""
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": {"dash": "dash", "width": 1}}


def table_of(
    first: str, labels: Sequence[float | str], series: Mapping[str, Values], shown: Callable[[float | None], str]
) -> Table:
    """A row for each label, a column for each series."""
    columns = [[shown(value) for value in values] for values in series.values()]
    rows = [(str(label), *(column[at] for column in columns)) for at, label in enumerate(labels)]
    return Table((first, *series), rows)


def lines(
    heading: tuple[str, str, str],
    x: tuple[str, Sequence[int]],
    y: Plotly,
    series: Mapping[str, Values],
    shown: Callable[[float | None], str] = number,
) -> Chart:
    """A line for each series over whole numbers.

    Args:
        heading: name, title and text of the chart.
        x: title and values of the horizontal axis.
        y: the vertical axis.
        series: the values by the name of the line.
        shown: formats a value in the table.
    """
    title, numbers = x
    traces = [line(name, numbers, values, position) for position, (name, values) in enumerate(series.items())]
    layout = {"xaxis": whole_axis(title, numbers), "yaxis": y, "showlegend": len(series) <= 12}
    return Chart(*heading, table_of(title, numbers, series, shown), traces, layout, 380)


def _bars(heading: tuple[str, str, str], unit: str, labels: Sequence[str], series: Mapping[str, Values]) -> Chart:
    """Bars in groups: predicted next to measured values."""
    traces: list[Plotly] = [
        {"type": "bar", "name": name, "x": list(labels), "y": list(values), "marker": {"color": COLOURS[colour]}}
        for colour, (name, values) in zip((5, 1), series.items(), strict=True)
    ]
    named = {f"{name} {unit}": values for name, values in series.items()}
    table = table_of("step", labels, named, lambda value: f"{value:.{1 if unit == 's' else 2}f}")
    return Chart(*heading, table, traces, {"yaxis": axis(unit), "barmode": "group"})


# ---------------------------------------------------------------------- by linear


Cells = dict[str, dict[int, list[LinearResult]]]
"""By kind and block: the linears of one kind in one block, such as experts."""


def _cells(linears: Sequence[LinearResult]) -> tuple[Cells, list[int]]:
    names, cells = short_names(linear.kind for linear in linears), Cells()
    for linear in linears:
        cells.setdefault(names[linear.kind], {}).setdefault(linear.block, []).append(linear)
    return cells, sorted({linear.block for linear in linears})


def by_block(
    linears: Sequence[LinearResult], blocks: Sequence[int], of: Callable[[Iterable[LinearResult]], float]
) -> list[float | None]:
    """A value for each block; None where it has none of the linears."""
    found: dict[int, list[LinearResult]] = {}
    for linear in linears:
        found.setdefault(linear.block, []).append(linear)
    return [of(found[block]) if block in found else None for block in blocks]


def _heat_map(
    heading: tuple[str, str],
    text: str,
    linears: Sequence[LinearResult],
    of: Callable[[Iterable[LinearResult]], float],
    shown: Callable[[float | None], str],
    *,
    logarithmic: bool = False,
) -> Chart:
    """Values by kind of linear and block. ``text`` has a place for the range; ``heading``: name, title."""
    cells, blocks = _cells(linears)
    what = heading[0].partition("-")[0]
    values = {kind: [of(row[block]) if block in row else None for block in blocks] for kind, row in cells.items()}
    known = [value for row in values.values() for value in row if value is not None and math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (math.nan, math.nan)
    z: list[Values] = list(values.values())
    bar: Plotly = {"thickness": 12, "tickformat": ".0%", "title": {"text": "zeros"}}
    if logarithmic:
        z = [[math.log10(v) if v is not None and v > 0 else None for v in row] for row in z]
        powers = [math.log10(value) for value in known if value > 0]
        ticks = [n / 2 for n in range(math.floor(2 * min(powers)), math.ceil(2 * max(powers)) + 1)] if powers else []
        bar = {"tickvals": ticks, "ticktext": [f"{10**tick:.2g}" for tick in ticks], "title": {"text": what}}
    trace = {
        "type": "heatmap",
        "z": z,
        "x": blocks,
        "y": list(values),
        "text": [[shown(value) for value in row] for row in values.values()],
        "hovertemplate": f"block %{{x}}, %{{y}}<br>{what} %{{text}}<extra></extra>",
        "colorscale": "Cividis",
        "colorbar": {"thickness": 12, **bar},
        "xgap": 1,
        "ygap": 1,
    }
    layout = {
        "xaxis": whole_axis("block", blocks, showgrid=False, zeroline=False),
        "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
    }
    text = text.format(f"from {shown(low)} to {shown(high)}")
    return Chart(
        *heading, text, table_of("block", blocks, values, shown), [trace], layout, 130 + 30 * max(3, len(values))
    )


def sparsity_map(linears: Sequence[LinearResult]) -> Chart:
    """Sparsity by kind of linear and block."""
    text = "The fraction of zeros of each linear, {}. Darker is denser."
    return _heat_map(("sparsity-map", "Sparsity of each linear"), text, linears, sparsity_of, percent)


def error_map(linears: Sequence[LinearResult]) -> Chart:
    """Relative error by kind of linear and block, in a logarithmic colour scale."""
    text = (
        "‖X Wᵀ − X W_denseᵀ‖² / ‖X W_denseᵀ‖² on the calibration inputs that the method fitted to, {}; the colours are "
        "logarithmic, and darker is a smaller error."
    )
    return _heat_map(("error-map", "Error of each linear"), text, linears, error_of, short_number, logarithmic=True)


def allocation_chart(pruning: Pruning) -> Chart:
    """The sparsity of each block, over all its pruned linears and by kind."""
    cells, blocks = _cells(pruning.linears)
    shares = by_block(pruning.linears, blocks, sparsity_of)
    known = [value for value in shares if value is not None]
    text = (
        f"Sparsity by depth. The allocation is {pruning.allocated_by or 'uniform'}; blocks range from "
        f"{percent(min(known))} to {percent(max(known))}, and {percent(pruning.sparsity_asked)} was asked for."
    )
    series = {"all of the block": shares}
    for kind, row in cells.items():
        series[kind] = [sparsity_of(row[block]) if block in row else None for block in blocks]
    chart = lines(
        ("allocation", "Where the zeros went", text),
        ("block", blocks),
        axis("zeros", tickformat=".0%"),
        series,
        percent,
    )
    chart.traces[0]["line"] = {"color": COLOURS[0], "width": 4}
    chart.traces.append(chart.traces.pop(0))  # on top of the others
    chart.layout["shapes"] = [reference_line(pruning.sparsity_asked)]
    return chart


# ---------------------------------------------------------------------- the course of the run


def course(pruning: Pruning) -> list[Chart]:
    """The charts of the sweep, the decomposition, time and memory, each where its values are known."""
    charts = [sweep_chart(pruning), *decomposition_charts(pruning), time_chart(pruning)]
    charts += [forecast_chart(pruning), memory_chart(pruning)]
    return [chart for chart in charts if chart is not None]


def sweep_chart(pruning: Pruning) -> Chart | None:
    """The divergence from the dense model after each pass of the sweep; None without a sweep."""
    passes = pruning.sweeps
    if not passes:
        return None
    best = min(passes, key=lambda each: (not math.isfinite(each.held_out), each.held_out))
    kept = f"{number(best.held_out)} after pass {best.passes}, whose weights were kept"
    if best is passes[0]:
        kept = "no pass was better, so the weights before it were kept"
    text = (
        f"KL(dense ‖ pruned) in nats a token on held-out windows: {number(passes[0].held_out)} before the first pass; "
    )
    text += f"{kept}."
    for stage in pruning.stages:
        left = number(min(each.held_out for each in stage.sweeps)) if stage.sweeps else "–"
        text += f" A first stage, at sparsity {stage.sparsity_pruned:.0%}, was left at {left}."
    return lines(
        ("sweep", "The sweep", text),
        ("passes", [each.passes for each in passes]),
        axis("KL, nats", rangemode="tozero"),
        {
            "held-out windows": [each.held_out for each in passes],
            "windows of the pass": [each.train for each in passes],
        },
    )


def decomposition_charts(pruning: Pruning) -> list[Chart]:
    """Objective and error of the decomposition by iteration, a line for each block; empty where it did not run."""
    runs = {f"block {linear.block}": linear.history for linear in pruning.linears if linear.history}
    iterations = list(range(max(map(len, runs.values()), default=0)))

    def error(step: Step) -> float | None:
        return step.held_out_error if step.held_out_error is not None else step.train_error

    charts = []
    for name, title, what, of in (
        ("objective", "The decomposition's objective", "penalty objective", lambda step: step.objective),
        ("unit-error", "The error of the decomposition", "error of the unit", error),
    ):
        series = {
            block: [of(history[at]) if at < len(history) else None for at in iterations]
            for block, history in runs.items()
        }
        if any(value is not None for values in series.values() for value in values):
            text = f"The {what} of each block's feed-forward unit by iteration; iteration 0 is local pruning."
            charts.append(lines((name, title, text), ("iteration", iterations), axis(what, type="log"), series))
    return charts


def time_chart(pruning: Pruning) -> Chart | None:
    """Seconds of each phase; None if they are not known."""
    took = {name: value for name, value in pruning.whole_seconds.items() if value >= 0}
    total = sum(took.values())
    if not total:
        return None
    order = sorted(took, key=lambda name: took[name])
    rows = []
    for name in reversed(order):
        rows.append((name, f"{took[name]:.1f}", percent(took[name] / total)))
        parts = {key: part for key, part in pruning.seconds.items() if key.startswith(f"{name}/")}
        rows += [(f"– {key.partition('/')[2]}", f"{part:.1f}", percent(part / total)) for key, part in parts.items()]
    seconds = [took[name] for name in order]
    return Chart(
        "time",
        "Time of each phase",
        f"{total:.0f} seconds in all; {order[-1]} took {percent(took[order[-1]] / total)} of them.",
        Table(("phase", "seconds", "share"), rows),
        [{"type": "bar", "orientation": "h", "x": seconds, "y": order, "marker": {"color": COLOURS[0]}}],
        {"xaxis": axis("seconds"), "yaxis": {"type": "category"}},
        120 + 26 * len(order),
    )


def forecast_chart(pruning: Pruning) -> Chart | None:
    """The predicted seconds of each step next to the measured ones; None if nothing was predicted."""
    predicted = {step: value for step, value in pruning.predicted_seconds.items() if step in _TIMED_PHASES}
    measured = {step: sum(pruning.seconds.get(phase, 0.0) for phase in _TIMED_PHASES[step]) for step in predicted}
    steps = [step for step in predicted if predicted[step] or measured[step]]
    if not steps:
        return None
    text = f"Predicted when the run began: {sum(predicted.values()):.0f} seconds; "
    text += f"measured: {sum(measured.values()):.0f}."
    series = {"predicted": [predicted[step] for step in steps], "measured": [measured[step] for step in steps]}
    return _bars(("forecast", "Time against the prediction", text), "s", steps, series)


def memory_chart(pruning: Pruning) -> Chart | None:
    """The predicted memory of each step next to the measured one; None if either is not known."""
    plan, peaks = pruning.memory, pruning.peaks_bytes
    steps = (
        [] if plan is None else [s for s, phase in _MEMORY_PHASES.items() if s in plan.steps_bytes and phase in peaks]
    )
    if plan is None or not steps:
        return None
    text = (
        f"Peak {pruning.peak_rss_bytes / 1e9:.2f} GB, predicted {plan.predicted_peak_rss_bytes / 1e9:.2f} GB of a "
        f"budget of {plan.budget_bytes / 1e9:.2f} GB. Measured is the highest value so far at the end of the step."
    )
    series = {
        "predicted": [plan.steps_bytes[step] / 1e9 for step in steps],
        "measured": [peaks[_MEMORY_PHASES[step]] / 1e9 for step in steps],
    }
    return _bars(("memory", "Memory against the prediction", text), "GB", steps, series)
