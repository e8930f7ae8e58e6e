"""A run in a notebook: a small table in HTML, and a Plotly figure."""

from __future__ import annotations

from typing import Any

from sparsellm.errors import MissingExtraError
from sparsellm.report.charts import Table, error_map, error_of, number, percent, short_names, sparsity_map, sparsity_of
from sparsellm.report.document import NEEDS_EXTRA, templates
from sparsellm.report.records import PrunedLinear, Pruning


def summary_html(result: dict[str, Any]) -> str:
    """The result of a run as a small table without scripts: zeros and error of each kind of linear, time, memory.

    Args:
        result: as ``PruneResult.to_dict`` returns it.
    """
    pruning = Pruning.model_validate(result)
    names = short_names(linear.kind for linear in pruning.linears)
    kinds: dict[str, list[PrunedLinear]] = {}
    for linear in pruning.linears:
        kinds.setdefault(names[linear.kind], []).append(linear)
    kinds["all pruned linears"] = pruning.linears
    rows = [
        (kind, f"{sum(x.weights for x in part):,}", percent(sparsity_of(part)), number(error_of(part), 3))
        for kind, part in kinds.items()
    ]
    seconds = sum(took for name, took in pruning.seconds.items() if "/" not in name)
    wanted = pruning.recipe.get("pattern") or f"{pruning.sparsity_asked:.0%}"
    where = f" · {result['path']}" if result.get("path") else ""
    return (
        templates()
        .get_template("notebook.html.jinja")
        .render(
            title=f"{pruning.recipe.get('method')} {wanted}: {percent(pruning.sparsity_reached)} zeros in the blocks",
            content=Table(("kind of linear", "weights", "zeros", "mean error"), rows),
            text=f"{seconds:.1f} s · peak memory {pruning.peak_rss_bytes / 1e9:.2f} GB{where}",
        )
    )


def figure_of(result: dict[str, Any]) -> Any:
    """A ``plotly.graph_objects.Figure`` of sparsity and error by kind of linear and block.

    Args:
        result: as ``PruneResult.to_dict`` returns it.

    Raises:
        MissingExtraError: the package plotly is not installed.
    """
    try:
        from plotly.subplots import make_subplots
    except ImportError:
        raise MissingExtraError(f"a plot {NEEDS_EXTRA}") from None
    linears = Pruning.model_validate(result).linears
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
