"""Runs of one base model side by side: quality against size and speed, with the dense model as the reference."""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from sparsellm.arguments import Out, PathGiven, checked
from sparsellm.errors import StorageError, shown
from sparsellm.records import Evaluation, error_of
from sparsellm.report import charts
from sparsellm.report.charts import (
    Chart,
    Measure,
    Plotly,
    Shown,
    Table,
    megabytes,
    number,
    percent,
    short_number,
)
from sparsellm.report.checkpoint import (
    Checkpoint,
    commands_of,
    headline,
    packed_commands,
    read_checkpoint,
)
from sparsellm.report.document import page, write_page

DENSE = "dense"  # the name of the dense model, which no run has
# the least one of a recommended run, unless something else is asked for
RECOVERY = 0.95
SAME = 0.01  # how far perplexities of one dense model differ at most, since products are rounded
_LARGE_SPAN = 3.0  # a ratio of perplexities from which their axis is logarithmic
_Values = dict[str, float]  # what was measured of a run, by column
_MEASURES: dict[str, Callable[[float], str]] = {
    "zeros": percent,
    "perplexity": number,
    "KL": short_number,
    "same token": percent,
    "recovery": percent,
    "weight files": megabytes,
    **dict.fromkeys(
        _SPEEDS := ("tokens/s", "× dense, same decoder", "× dense by transformers"),
        number,
    ),
}


class _Run(NamedTuple):
    """A run, and what was measured of it."""

    name: str
    record: Checkpoint
    values: _Values


class Candidate(NamedTuple):
    """A run, as a recommendation weighs it."""

    name: str
    recovery: float
    size: float  # bytes of the packed weight files; where some run is not packed, the share of weights that is left
    kl: float


def best_at_each_size(runs: Sequence[Candidate]) -> list[Candidate]:
    """The runs that diverge less than every smaller one, smallest first; the last one that fits into a size is best."""
    best: list[Candidate] = []
    for run in sorted(runs, key=lambda run: (run.size, run.kl)):
        if not best or run.kl < best[-1].kl:
            best.append(run)
    return best


def recommend(
    runs: Sequence[Candidate], recover: float | None, max_bytes: float | None
) -> Candidate | None:
    """The smallest run within the limits; without ``recover``, the best recovery. None: no limit or no such run."""
    if recover is None and max_bytes is None:
        return None
    least = recover or 0.0
    most = math.inf if max_bytes is None else max_bytes
    fitting = [run for run in runs if run.recovery >= least and run.size <= most]
    if recover is None:
        return max(fitting, key=lambda run: run.recovery, default=None)
    return min(fitting, key=lambda run: (run.size, -run.recovery), default=None)


@checked
def write_comparison(
    directories: Annotated[Sequence[PathGiven], Field(min_length=1)],
    out: Out,
    *,
    recover: float | None = None,
    max_bytes: int | None = None,
) -> Path:
    """Writes one page that compares pruned checkpoints of one model, and returns its path. It recommends a
    run with a recovery of at least ``recover``, and at most ``max_bytes`` of packed weight files, as far as their size
    is known; if both are None, one that recovers ``RECOVERY``.

    Raises:
        StorageError: a directory was not written by ``prune``, is named twice or is of another base model, or ``out``
            is refused, as by ``write_page``.
        MissingExtraError: the chart library is not installed.
    """
    records = [read_checkpoint(directory) for directory in directories]
    first = records[0]
    seen = set[str]()
    for record in records:
        place = os.path.realpath(record.directory)
        if place in seen:
            raise StorageError(f"{record.name} is named twice; name each run once")
        seen.add(place)
        if first.pruning.base.digest != record.pruning.base.digest:
            raise StorageError(
                f"{first.name} was pruned from {shown(first.pruning.base.name)} and {record.name} from "
                f"{shown(record.pruning.base.name)}, another base model; compare runs of one model"
            )
    return write_page(render_comparison(records, recover, max_bytes), out)


def render_comparison(
    records: Sequence[Checkpoint], recover: float | None, max_bytes: int | None
) -> bytes:
    """The comparison as HTML."""
    counts = Counter(key for record in records for key in record.results.latest())
    # by which most runs were measured
    key = max(counts, key=lambda key: counts[key], default=())
    evaluations = [record.results.latest().get(key) for record in records]
    dense, runs = _measured(records, evaluations)
    measured = {"perplexity"}.union(*(run.values for run in runs))
    columns = [name for name in _MEASURES if name in measured]
    summary = [(DENSE, "", *_cells(dense, columns), "")]
    for name, record, values in runs:
        recipe = record.pruning.recipe
        method = f"{recipe.get('method') or ''} {recipe.get('pattern') or ''}"
        elsewhere = record.decoding() is not None and "tokens/s" not in values
        cells = _cells(values, columns, elsewhere=elsewhere)
        took = f"{sum(record.pruning.whole_seconds.values()):,.0f} s"
        summary.append((name, method.strip(), *cells, took))
    quality = _quality(dense, runs)
    depth = _depth(runs)
    commands = commands_of(row for record in records for row in headline(record))
    if commands:
        names = shlex.join(record.name for record in records)
        commands.append(f"sparsellm report {names} --out compare.html")
    packed = max_bytes is not None or all(record.packed_bytes for record in records)
    candidates = _candidates(runs, packed)
    best = [
        (_size(x, packed), x.name, short_number(x.kl), percent(x.recovery))
        for x in best_at_each_size(candidates)
    ]
    return page(
        "comparison.html.jinja",
        f"{len(records)} pruned versions of {records[0].model}",
        [*quality, *depth],
        runs=runs,
        protocol=next((run.protocol for run in evaluations if run is not None), ""),
        summary=Table(("run", "method", *columns, "prune"), summary),
        advice=_advice(candidates, packed, recover, max_bytes),
        best=Table(("size", "run", "KL", "recovery"), best),
        commands=commands,
        packed_commands=[
            command
            for record in records
            if record.decoding() is None
            for command in packed_commands(record)[:-1]
        ],
        quality=quality,
        depth=depth,
    )


def _cells(
    values: _Values, columns: Sequence[str], *, elsewhere: bool = False
) -> list[str]:
    """Measurements as texts; ``elsewhere``: the speeds were measured, but do not compare."""
    absent = dict.fromkeys(columns, "not measured")
    if elsewhere:
        absent |= dict.fromkeys(_SPEEDS, "another machine or batch")
    return [
        _MEASURES[name](values[name]) if name in values else absent[name]
        for name in columns
    ]


def _candidates(runs: Sequence[_Run], packed: bool) -> list[Candidate]:
    """The runs of which recovery and size are known; with ``packed``, the size is that of the packed files."""
    candidates = []
    for name, record, values in runs:
        size = record.packed_bytes if packed else _left(record)
        if size is not None and "recovery" in values:
            recovery = values["recovery"]
            candidates.append(Candidate(name, recovery, size=size, kl=values["KL"]))
    return candidates


def _left(record: Checkpoint) -> float:
    """The share of the weights that are left and not zero. Sizes of files tell what removed experts had."""
    dense = record.pruning.base.bytes if record.pruning.experts else 0
    return (1 - record.pruning.sparsity_pruned) * (
        record.file_bytes / dense if dense else 1
    )


def _size(run: Candidate, packed: bool) -> str:
    return (
        f"{megabytes(run.size / 1e6)} packed"
        if packed
        else f"{percent(run.size)} of the weights"
    )


def _advice(
    runs: Sequence[Candidate],
    packed: bool,
    recover: float | None,
    max_bytes: int | None,
) -> str:
    """The run to take, and why; empty if no recovery was measured."""
    if not runs:
        return ""
    if recover is None and max_bytes is None:
        recover = RECOVERY

    def said(run: Candidate) -> str:
        return f"{run.name} ({percent(run.recovery)} recovery, {_size(run, packed)})"

    asked = []
    if recover is not None:
        asked.append(f"a recovery of {percent(recover)} or more")
    if max_bytes is not None:
        asked.append(f"at most {megabytes(max_bytes / 1e6)}")
    best = recommend(runs, recover, max_bytes)
    most = max(runs, key=lambda run: run.recovery)
    if best is None:
        return f"No run has {' and '.join(asked)}. The best recovery is that of {said(most)}."
    why = "the smallest size" if packed else "the fewest weights"
    if recover is None:
        why = "the best recovery"
    text = f"Take {said(best)}: it has {why} among the runs with {' and '.join(asked)}."
    if best is not most:
        text += f" The best recovery is that of {said(most)}."
    return text


def _measured(
    records: Sequence[Checkpoint], evaluations: Sequence[Evaluation | None]
) -> tuple[_Values, list[_Run]]:
    """The measurements of the dense model, as far as the runs know them, and the runs. Where the dense model or an
    earlier run is called alike, a run's name has a number."""
    runs: list[_Run] = []
    setting = None
    dense: _Values = {"zeros": 0.0, "KL": 0.0, "same token": 1.0, "recovery": 1.0}
    perplexities = [
        run.dense.perplexity.value
        for run in evaluations
        if run is not None and run.dense is not None
    ]
    # that of most runs: one may have been measured against another model
    if perplexities:
        dense["perplexity"] = max(
            perplexities,
            key=lambda value: sum(
                math.isclose(value, other, rel_tol=SAME) for other in perplexities
            ),
        )
    for record, evaluation in zip(records, evaluations, strict=True):
        values: _Values = {
            "zeros": record.pruning.sparsity_pruned,
            "weight files": record.file_bytes / 1e6,
        }
        if record.pruning.base.bytes:
            dense.setdefault("weight files", record.pruning.base.bytes / 1e6)
        if evaluation is not None:
            values["perplexity"] = evaluation.value
            against = evaluation.dense
            if against is not None and math.isclose(
                dense["perplexity"], against.perplexity.value, rel_tol=SAME
            ):
                values |= {
                    "KL": against.kl,
                    "same token": against.agreement,
                    "recovery": against.recovery or 0.0,
                }
        if (measured := record.decoding()) is not None:
            benchmark, pair = measured
            taken = (benchmark.machine, pair.packed.batch)
            setting = setting or taken
            # speeds of another machine or batch do not compare
            if taken == setting:
                dense.setdefault("tokens/s", pair.dense.median)
                values["tokens/s"] = pair.packed.median
                values["× dense by transformers"] = pair.ratio.dense_by_transformers
                if pair.ratio.same_decoder is not None:
                    values["× dense, same decoder"] = pair.ratio.same_decoder
        names = {DENSE, *(run.name for run in runs)}
        tried = chain([record.name], (f"{record.name} ({n})" for n in count(2)))
        name = next(name for name in tried if name not in names)
        runs.append(_Run(name, record, values))
    return dense, runs


def _quality(dense: _Values, runs: Sequence[_Run]) -> list[Chart]:
    """Perplexity against size, speed and sparsity, each where a run has both values."""
    drawn = []
    everything = [(DENSE, dense), *((run.name, run.values) for run in runs)]
    for name, x, measure in (
        ("size", charts.axis("weight files, MB"), "weight files"),
        ("speed", charts.axis("tokens a second, decoding"), "tokens/s"),
        ("sparsity", charts.share_axis("zeros in the pruned linears"), "zeros"),
    ):
        points = [
            (place, name_of, values[measure], values["perplexity"])
            for place, (name_of, values) in enumerate(everything)
            if {measure, "perplexity"} <= values.keys()
        ]
        if any(place for place, *_ in points):
            drawn.append(_scatter(name, x, measure, points))
    return drawn


def _scatter(
    name: str, x: Plotly, measure: str, points: list[tuple[int, str, float, float]]
) -> Chart:
    """A point for each run; the dense model, at place 0, is a star, and a line across."""
    _, first, _, lowest = min(
        (point for point in points if point[0]), key=lambda point: point[3]
    )
    text = f"{first} has the lowest perplexity, {number(lowest)}"
    title = "perplexity, lower is better"
    every = [y for *_, y in points]
    y_axis = (
        charts.log_axis(title)
        if max(every) > _LARGE_SPAN * min(every)
        else charts.axis(title)
    )
    layout: Plotly = {
        "xaxis": x,
        "yaxis": y_axis,
        "showlegend": len(points) <= charts.MOST_NAMED,
    }
    traces = []
    for place, label, at, y in points:
        trace = charts.line(label, [at], [y], place - 1)
        marker = {"color": trace["line"]["color"], **trace["marker"], "size": 12}
        if not place:
            marker |= {"size": 14, "symbol": "star"}
            text += f"; the dense model, the dashed line, has {number(y)}"
            layout["shapes"] = [charts.reference_line(y)]
        traces.append(
            trace | {"mode": "markers", "cliponaxis": False, "marker": marker}
        )
    rows = [(label, _MEASURES[measure](at), number(y)) for _, label, at, y in points]
    table = Table(("run", x["title"]["text"], "perplexity"), rows)
    return Chart(
        f"quality-{name}",
        f"Quality against {name}",
        f"{text}.",
        table,
        traces,
        layout,
        400,
    )


def _depth(runs: Sequence[_Run]) -> list[Chart]:
    """Sparsity and error over the blocks, a line for each run."""
    blocks = sorted({block for run in runs for block in run.record.pruning.blocks})
    text = "Over the pruned linears of each block, one line for each run."

    def drawn(name: str, title: str, axis: Plotly, of: Measure, shown: Shown) -> Chart:
        series = {
            run.name: charts.by_block(run.record.pruning.linears, blocks, of)
            for run in runs
        }
        return charts.lines((name, title, text), ("block", blocks), axis, series, shown)

    return [
        drawn(
            "depth-sparsity",
            "Sparsity by block",
            axis=charts.share_axis("zeros"),
            of=charts.sparsity_of,
            shown=percent,
        ),
        drawn(
            "depth-error",
            "Mean error by block",
            axis=charts.log_axis("error"),
            of=error_of,
            shown=short_number,
        ),
    ]
