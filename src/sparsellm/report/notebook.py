"""A run in a notebook: a small table in HTML, and a Plotly figure."""

from __future__ import annotations

from typing import Any

from sparsellm.errors import MissingExtraError
from sparsellm.records import LinearResult, Pruning
from sparsellm.report import charts
from sparsellm.report.charts import Table, percent, short_number
from sparsellm.report.document import NEEDS_EXTRA, templates


def summary_html(pruning: Pruning) -> str:
    """A run as a small table without scripts: zeros and error of each kind of linear, time, memory."""
    names = charts.short_names(linear.kind for linear in pruning.linears)
    kinds: dict[str, list[LinearResult]] = {}
    for linear in pruning.linears:
        kinds.setdefault(names[linear.kind], []).append(linear)
    kinds["all pruned linears"] = pruning.linears
    rows = [
        (
            kind,
            f"{sum(linear.weights for linear in part):,}",
            percent(charts.sparsity_of(part)),
            short_number(charts.error_of(part)),
        )
        for kind, part in kinds.items()
    ]
    text = f"{sum(pruning.whole_seconds.values()):.1f} s · peak memory {pruning.peak_rss_bytes / 1e9:.2f} GB"
    return (
        templates()
        .get_template("notebook.html.jinja")
        .render(
            title=f"{pruning.method} {pruning.target}: {percent(pruning.sparsity_reached)} zeros in the blocks",
            content=Table(("kind of linear", "weights", "zeros", "mean error"), rows),
            text=f"{text} · {pruning.path}" if pruning.path else text,
        )
    )


def figure_of(pruning: Pruning) -> Any:
    """A ``plotly.graph_objects.Figure`` of sparsity and error by kind of linear and block.

    Raises:
        MissingExtraError: the package plotly is not installed.
    """
    try:
        from plotly.subplots import make_subplots
    except ImportError:
        raise MissingExtraError(f"a plot {NEEDS_EXTRA}") from None
    maps = (charts.sparsity_map(pruning.linears), charts.error_map(pruning.linears))
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, subplot_titles=[each.title for each in maps])
    for row, each in enumerate(maps, 1):
        trace = each.figure["data"][0]
        trace["colorbar"] |= {"len": 0.45, "y": (0.78, 0.22)[row - 1]}
        figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(autorange="reversed", row=row, col=1)
    figure.update_xaxes(title_text="block", row=2, col=1)
    figure.update_layout(height=sum(each.height for each in maps))
    return figure
