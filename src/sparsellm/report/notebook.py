"""A run in a notebook: a small table in HTML, and a Plotly figure."""

from __future__ import annotations

from typing import Any

from sparsellm.errors import MissingExtraError
from sparsellm.records import LinearResult, Pruning
from sparsellm.report.charts import Table, error_map, error_of, number, percent, short_names, sparsity_map, sparsity_of
from sparsellm.report.document import NEEDS_EXTRA, templates


def summary_html(pruning: Pruning) -> str:
    """The result of a run as a small table without scripts: zeros and error of each kind of linear, time, memory.

    Args:
        pruning: the record of the run.
    """
    names = short_names(linear.kind for linear in pruning.linears)
    kinds: dict[str, list[LinearResult]] = {}
    for linear in pruning.linears:
        kinds.setdefault(names[linear.kind], []).append(linear)
    kinds["all pruned linears"] = pruning.linears
    rows = [
        (kind, f"{sum(x.weights for x in part):,}", percent(sparsity_of(part)), number(error_of(part), 3))
        for kind, part in kinds.items()
    ]
    seconds = sum(pruning.whole_seconds.values())
    where = f" · {pruning.path}" if pruning.path else ""
    return (
        templates()
        .get_template("notebook.html.jinja")
        .render(
            title=f"{pruning.method} {pruning.target}: {percent(pruning.sparsity_reached)} zeros in the blocks",
            content=Table(("kind of linear", "weights", "zeros", "mean error"), rows),
            text=f"{seconds:.1f} s · peak memory {pruning.peak_rss_bytes / 1e9:.2f} GB{where}",
        )
    )


def figure_of(pruning: Pruning) -> Any:
    """A ``plotly.graph_objects.Figure`` of sparsity and error by kind of linear and block.

    Args:
        pruning: the record of the run.

    Raises:
        MissingExtraError: the package plotly is not installed.
    """
    try:
        from plotly.subplots import make_subplots
    except ImportError:
        raise MissingExtraError(f"a plot {NEEDS_EXTRA}") from None
    linears = pruning.linears
    maps = (sparsity_map(linears), error_map(linears))
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, subplot_titles=[each.title for each in maps])
    for row, each in enumerate(maps, 1):
        trace = each.figure["data"][0]
        trace["colorbar"] |= {"len": 0.45, "y": (0.78, 0.22)[row - 1]}
        figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(autorange="reversed", row=row, col=1)
    figure.update_xaxes(title_text="block", row=2, col=1)
    figure.update_layout(height=sum(each.height for each in maps))
    return figure
