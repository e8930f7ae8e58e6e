"""The charts of a run as Plotly's own JSON, each with a text and a table that say the same."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from statistics import fmean
from typing import Any

from sparsellm.progress import PHASES
from sparsellm.records import (
    Iteration,
    LinearResult,
    Pruning,
    SweepPass,
    Totals,
    bits_per_weight,
    by_kind,
    error_of,
)

# Okabe and Ito's colours, which stay apart for the colour-blind; each line also has a dash and a symbol of its own.
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8c6bb1",
    "#7f7f7f",
)
_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")

MOST_NAMED = 24  # lines in a legend; from there on looks repeat
_CELLS = 100_000  # the most in a table of kinds and blocks; 128 blocks with 16 kinds have 2,000

Plotly = dict[str, Any]  # a trace, an axis or a layout, as Plotly's JSON has it
Values = Sequence[float | None]
Shown = Callable[[float | None], str]  # a value as text
# a value of some linears, if they have one
Measure = Callable[[Iterable[LinearResult]], float | None]
Heading = tuple[str, str, str]  # name, title and text of a chart


@dataclass(frozen=True)
class Table:
    """A table as text."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Chart:
    """One chart, as ``data`` and ``layout`` of Plotly, and its alternatives: a sentence or two, and a table."""

    name: str  # unique in its page, in letters and hyphens
    title: str
    text: str
    table: Table
    traces: list[Plotly]
    layout: Plotly
    height: int = 380  # pixels

    @property
    def legend(self) -> int:
        """The lines of the legend on a narrow screen."""
        return (
            sum(1 + trace["name"].count("<br>") for trace in self.traces)
            if self.layout.get("showlegend")
            else 0
        )

    @property
    def figure(self) -> Plotly:
        """JSON values for Plotly; numbers that JSON does not have are null."""
        return json.loads(  # type: ignore[no-any-return]
            json.dumps({"data": self.traces, "layout": self.layout}),
            parse_constant=lambda name: None,
        )


def percent(share: float | None) -> str:
    return f"{share:.1%}" if share is not None and math.isfinite(share) else "–"


def number(value: float | None, digits: int = 4) -> str:
    if value is not None and 1e4 <= round(abs(value), 1) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if value is not None and math.isfinite(value) else "–"


def megabytes(count: float) -> str:
    return f"{count:,.1f}\N{NO-BREAK SPACE}MB"


short_number = partial(number, digits=3)


def sparsity_of(linears: Iterable[LinearResult]) -> float:
    """The fraction of zeros over some linears."""
    return Totals.of(linears).sparsity


def line(name: str, x: Sequence[float], y: Values, position: int) -> Plotly:
    """A line with a colour, a dash and a symbol by its position among others. Markup in the name is shown as text."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "<br>".join(map(escape, textwrap.wrap(name, 40))),
        "x": list(x),
        "y": list(y),
        "line": {
            "color": COLOURS[position % len(COLOURS)],
            "dash": _DASHES[position // 2 % len(_DASHES)],
        },
        "marker": {"symbol": _SYMBOLS[position % len(_SYMBOLS)], "size": 6},
    }


def axis(title: str, **more: Any) -> Plotly:
    return {"title": {"text": title}, **more}


# An axis of fractions in percent, which ends at 0 and 100 % at the latest
share_axis = partial(
    axis, tickformat=".0%", autorangeoptions={"clipmin": 0, "clipmax": 1}
)
log_axis = partial(axis, type="log", tickformat=".5~g", nticks=4)
# names below each other, the first at the top
_DOWNWARDS = {"type": "category", "autorange": "reversed"}


def _heat(*, bar: Plotly, **values: Any) -> Plotly:
    """Cells coloured by their values ``z``; ``bar`` is the axis of the colours."""
    looks = {
        "colorscale": "Cividis",
        "colorbar": {"thickness": 12, **bar},
        "xgap": 1,
        "ygap": 1,
    }
    return {"type": "heatmap", **values, **looks}


def reference_line(y: float) -> Plotly:
    """A dashed line across the chart; the page gives it the colour of its text."""
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": y,
        "y1": y,
        "line": {"dash": "dash", "width": 1},
    }


def _whole_axis(title: str, numbers: Sequence[int], **more: Any) -> Plotly:
    """Whole numbers with at most a dozen ticks."""
    return axis(
        title,
        tick0=0,
        dtick=max(1, math.ceil((max(numbers) - min(numbers) + 1) / 12)),
        **more,
    )


def _table(
    first: str, numbers: Sequence[int], series: Mapping[str, Values], shown: Shown
) -> Table:
    """A row for each number, a column for each series."""
    columns = ([shown(value) for value in values] for values in series.values())
    return Table((first, *series), list(zip(map(str, numbers), *columns, strict=True)))


def lines(
    heading: Heading,
    x: tuple[str, Sequence[int]],
    y: Plotly,
    series: Mapping[str, Values],
    shown: Shown = number,
) -> Chart:
    """A line for each series over whole numbers, ``x``: a title and values. ``shown`` formats a value in the table.
    Series that are equal there are one line with all their names."""
    title, numbers = x
    alike: dict[tuple[str, ...], list[int]] = {}
    for position, values in enumerate(series.values()):
        alike.setdefault(tuple(map(shown, values)), []).append(position)
    names = list(series)
    every = list(series.values())
    traces = [
        line(
            ", ".join(names[position] for position in at), numbers, every[at[0]], at[0]
        )
        for at in alike.values()
    ]
    layout = {
        "xaxis": _whole_axis(title, numbers),
        "yaxis": y,
        "showlegend": len(traces) <= MOST_NAMED,
    }
    table = _table(title, numbers, series=series, shown=shown)
    name, chart_title, text = heading
    return Chart(
        name, chart_title, text=text, table=table, traces=traces, layout=layout
    )


def by_block(
    linears: Iterable[LinearResult], blocks: Sequence[int], of: Measure
) -> list[float | None]:
    """A value for each block; None where it has none of the linears."""
    parts: dict[int, list[LinearResult]] = {}
    for linear in linears:
        parts.setdefault(linear.block, []).append(linear)
    return [of(parts[block]) if block in parts else None for block in blocks]


def _kinds(pruning: Pruning) -> dict[str, list[LinearResult]]:
    """Linears by kind; where kinds and blocks make more than ``_CELLS`` cells, those of further kinds together."""
    kinds = by_kind(pruning.linears)
    most = max(1, _CELLS // len(pruning.blocks))
    if len(kinds) <= most:
        return kinds
    rest = [kinds.pop(kind) for kind in list(kinds)[most - 1 :]]
    kinds[f"{len(rest)} other kinds"] = [linear for part in rest for linear in part]
    return kinds


def _heat_map(
    heading: Heading,
    pruning: Pruning,
    of: Measure,
    bar: Plotly,
    shown: Shown = short_number,
    *,
    log: bool = False,
) -> Chart:
    """Values by kind of linear and block, which may be coloured by ``log``. The text has a place for their range."""

    def z(value: float | None) -> float | None:
        if not log or value is None:
            return value
        return math.log10(value) if value > 0 else None

    name, title, text = heading
    blocks = pruning.blocks
    values = {
        kind: by_block(part, blocks, of) for kind, part in _kinds(pruning).items()
    }
    known = [
        value
        for row in values.values()
        for value in row
        if value is not None and math.isfinite(value)
    ]
    ends = {}
    if known and not log:  # else equal values would have the colours of both ends
        ends = {
            "zmin": max(0.0, min(known) - 0.05),
            "zmax": max(known) + 0.05,
        }
    trace = _heat(
        **ends,
        z=[[z(value) for value in row] for row in values.values()],
        x=blocks,
        y=list(map(escape, values)),
        text=[[shown(value) for value in row] for row in values.values()],
        hovertemplate=f"block %{{x}}, %{{y}}<br>{name} %{{text}}<extra></extra>",
        bar=bar,
    )
    layout = {
        "xaxis": _whole_axis("block", blocks, showgrid=False, zeroline=False),
        "yaxis": {**_DOWNWARDS, "showgrid": False},
    }
    text = text.format(
        f"from {shown(min(known, default=None))} to {shown(max(known, default=None))}"
    )
    height = 130 + 30 * max(3, len(values))
    return Chart(
        f"{name}-map",
        title,
        text,
        _table("block", blocks, values, shown),
        [trace],
        layout,
        height,
    )


def maps(pruning: Pruning) -> list[Chart]:
    """Bits, if linears differ in them, sparsity, if zeros count, and relative error, by kind of linear and block."""
    bits = (
        "bits",
        "Bits of each linear",
        "The bits of a weight of each linear, with scales and masks, {}. Darker is fewer.",
    )
    sparsity = (
        "sparsity",
        "Sparsity of each linear",
        "The fraction of zeros of each linear, {}. Darker is denser.",
    )
    error = (
        "‖X Wᵀ − X W₀ᵀ‖² / ‖X W₀ᵀ‖² on the calibration inputs that the method fitted to, W₀ being the dense or the "
        "refitted weight, {}; the colours are logarithmic, and darker is a smaller error."
    )
    drawn = []
    if pruning.mixed:
        drawn.append(_heat_map(bits, pruning, bits_per_weight, axis("bits")))
    if pruning.sparse or not pruning.mixed:
        zeros = axis("zeros", tickformat=".0%")
        drawn.append(_heat_map(sparsity, pruning, sparsity_of, zeros, percent))
    drawn.append(
        _heat_map(
            ("error", "Error of each linear", error),
            pruning,
            error_of,
            axis("log₁₀ error"),
            log=True,
        )
    )
    return drawn


def experts_chart(pruning: Pruning) -> Chart:
    """The tokens and the score of every expert of the dense model, by block, and which experts stayed."""
    first = pruning.experts[0]
    every = [str(number) for number in range(len(first.tokens))]
    shares: list[Values] = []
    rows: list[list[str]] = []
    for mixture in pruning.experts:
        total = max(1, sum(mixture.tokens))
        pairs = zip(mixture.tokens, mixture.scores, strict=False)
        shares.append(
            [
                count / total if at in mixture.kept else None
                for at, count in enumerate(mixture.tokens)
            ]
        )
        rows.append(
            [
                f"{'kept' if at in mixture.kept else 'removed'}, {count / total:.1%}, score {number(score)}"
                for at, (count, score) in enumerate(pairs)
            ]
        )
    blocks = [str(mixture.block) for mixture in pruning.experts]
    trace = _heat(
        z=shares,
        x=every,
        y=blocks,
        text=rows,
        hovertemplate="block %{y}, expert %{x}<br>%{text}<extra></extra>",
        bar=axis("tokens", tickformat=".0%"),
    )
    error = number(fmean(x.error for x in pruning.experts))
    refitted = number(fmean(x.refitted for x in pruning.experts))
    text = (
        f"{len(first.kept)} of {len(every)} experts stayed in each mixture; removed ones are blank. Colours are shares "
        f"of the calibration tokens. The mean error of the mixtures' outputs is {error}"
    )
    if error != refitted:
        text += f", and {refitted} refitted"
    layout = {"xaxis": {"type": "category", **axis("expert")}, "yaxis": _DOWNWARDS}
    named = zip(blocks, rows, strict=True)
    table = Table(("block", *every), [(block, *row) for block, row in named])
    return Chart(
        "experts",
        "Experts that stayed",
        f"{text}.",
        table,
        [trace],
        layout,
        130 + 24 * max(4, len(blocks)),
    )


def allocation_chart(pruning: Pruning) -> Chart:
    """The sparsity of each block, over all its pruned linears and by kind; their bits, if no zeros count."""
    if pruning.mixed and not pruning.sparse:
        bits = pruning.bits_per_weight
        assert bits is not None
        return _by_depth(
            "Where the bits went",
            "Bits of a weight by depth. Blocks range from {} to {}, and all together have {}.",
            pruning,
            bits_per_weight,
            reference=bits,
            y=axis("bits"),
            shown=short_number,
        )
    allocation = pruning.allocated_by or "uniform"
    return _by_depth(
        "Where the zeros went",
        f"Sparsity by depth. The allocation is {allocation}; blocks range from {{}} to {{}}, and {{}} was asked for.",
        pruning,
        sparsity_of,
        reference=pruning.sparsity_asked,
        y=share_axis("zeros"),
        shown=percent,
    )


def _by_depth(
    title: str,
    text: str,
    pruning: Pruning,
    of: Measure,
    *,
    reference: float,
    y: Plotly,
    shown: Shown,
) -> Chart:
    """A line for all linears of each block and one for each kind; ``reference`` is a dashed line. The text has places
    for the least value of a block, the largest, and the reference."""
    blocks = pruning.blocks
    of_blocks = by_block(pruning.linears, blocks, of)
    known = [value for value in of_blocks if value is not None]
    series: dict[str, Values] = {"all of the block": of_blocks}
    series |= {
        kind: by_block(part, blocks, of) for kind, part in _kinds(pruning).items()
    }
    said = text.format(shown(min(known)), shown(max(known)), shown(reference))
    heading = ("allocation", title, said)
    chart = lines(heading, ("block", blocks), y, series, shown)
    chart.traces[0]["line"]["width"] = 4
    chart.layout["shapes"] = [reference_line(reference)]
    return chart


def course(pruning: Pruning) -> list[Chart]:
    """The charts of the sweep, the decomposition and the time, each where its values are known."""
    drawn = _decomposition_charts(pruning)
    if pruning.sweeps:
        drawn.insert(0, _sweep_chart(pruning.sweeps))
    if any(value > 0 for value in pruning.whole_seconds.values()):
        drawn.append(_time_chart(pruning))
    return drawn


def _sweep_chart(passes: Sequence[SweepPass]) -> Chart:
    """The divergence from the dense model after each pass of the sweep."""
    best = min(
        passes, key=lambda record: (not math.isfinite(record.held_out), record.held_out)
    )
    kept = f"{number(best.held_out)} after pass {best.passes}, whose weights were kept"
    if best is passes[0]:
        kept = "no pass was better, so the weights before it were kept"
    text = "KL(dense ‖ pruned) in nats a token on held-out windows: "
    text += f"{number(passes[0].held_out)} before the first pass; {kept}."
    series: dict[str, Values] = {
        "held-out windows": [record.held_out for record in passes],
        "windows of the pass": [record.train for record in passes],
        **{
            f"held out of {name}": [record.sources.get(name) for record in passes]
            for name in passes[0].sources
        },
    }
    numbers = ("passes", [record.passes for record in passes])
    return lines(
        ("sweep", "The sweep", text),
        numbers,
        axis("KL, nats", rangemode="tozero"),
        series,
    )


def _decomposition_charts(pruning: Pruning) -> list[Chart]:
    """Objective and error of the decomposition by iteration, a line for each block; empty where it did not run."""
    runs = {
        f"block {linear.block}": linear.history
        for linear in pruning.linears
        if linear.history
    }
    most = min(max(map(len, runs.values()), default=0), _CELLS // max(1, len(runs)))

    def error(step: Iteration) -> float | None:
        return (
            step.held_out_error if step.held_out_error is not None else step.train_error
        )

    charts = []
    for name, title, what, of in (
        (
            "objective",
            "The decomposition's objective",
            "penalty objective",
            lambda step: step.objective,
        ),
        ("unit-error", "The error of the decomposition", "error of the unit", error),
    ):
        series = {
            block: [*map(of, steps[:most]), *[None] * (most - len(steps))]
            for block, steps in runs.items()
        }
        if any(value is not None for values in series.values() for value in values):
            text = f"The {what} of each block's feed-forward unit by iteration; iteration 0 is local pruning."
            charts.append(
                lines(
                    (name, title, text),
                    ("iteration", range(most)),
                    log_axis(what),
                    series,
                )
            )
    return charts


def _time_chart(pruning: Pruning) -> Chart:
    """Seconds of each phase, with the peak memory in its text."""
    took = {name: value for name, value in pruning.whole_seconds.items() if value >= 0}
    total = sum(took.values())
    order = sorted(took, key=lambda name: -took[name])
    rows = []
    for name in order:
        parts = {
            key: part
            for key, part in pruning.seconds.items()
            if key.startswith(f"{name}/")
        }
        for key, part in {name: took[name], **parts}.items():
            rows.append(
                (
                    "– " * ("/" in key) + PHASES.get(key, key),
                    f"{part:.1f}",
                    percent(part / total),
                )
            )
    text = f"{total:.0f} seconds in all"
    text += f"; “{PHASES.get(order[0], order[0])}” took {percent(took[order[0]] / total)} of them. "
    text += f"Peak memory {pruning.peak_rss_bytes / 1e9:.2f} GB"
    if pruning.memory is not None and pruning.memory.budget_bytes:
        text += (
            f" of {pruning.memory.budget_bytes / 1e9:.2f} GB that the run might take"
        )
    bar = {"type": "bar", "orientation": "h", "marker": {"color": COLOURS[0]}}
    return Chart(
        "time",
        "Time of each phase",
        f"{text}.",
        Table(("phase", "seconds", "share"), rows),
        [
            {
                **bar,
                "x": [took[name] for name in order],
                "y": [escape(PHASES.get(name, name)) for name in order],
            }
        ],
        {"xaxis": axis("seconds"), "yaxis": _DOWNWARDS},
        120 + 26 * len(order),
    )
