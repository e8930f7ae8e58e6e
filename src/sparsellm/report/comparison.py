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
from sparsellm.records import Protocol, error_of
from sparsellm.report import charts
from sparsellm.report.charts import (
    Chart,
    Plotly,
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
    protocols = [
        evaluation.protocol
        for record in records
        for evaluation in record.results.latest().values()
    ]
    counts = Counter(setting.key for setting in protocols)
    # by which most runs were measured
    protocol = max(protocols, key=lambda setting: counts[setting.key], default=None)
    names = _names(records)
    values = _values(records, names, protocol)
    methods = [
        " ".join(
            str(run.pruning.recipe.get(key) or "") for key in ("method", "pattern")
        )
        for run in records
    ]
    seconds = [f"{sum(run.pruning.whole_seconds.values()):,.0f} s" for run in records]
    measured = {"perplexity"}.union(*(numbers for _, numbers in values[1:]))
    columns = {key: text for key, text in _MEASURES.items() if key in measured}
    decoded = [
        name
        for name, record in zip(names, records, strict=True)
        if record.decoding() is not None
    ]
    measured_elsewhere = {*decoded} - {
        name for name, numbers in values if "tokens/s" in numbers
    }
    summary = []
    for (name, numbers), method, took in zip(
        values, ["", *methods], ["", *seconds], strict=True
    ):
        elsewhere = (
            dict.fromkeys(_SPEEDS, "another machine or batch")
            if name in measured_elsewhere
            else {}
        )
        cells = (
            text(numbers[k]) if k in numbers else elsewhere.get(k, "not measured")
            for k, text in columns.items()
        )
        summary.append((name, method.strip(), *cells, took))
    quality = _quality(values)
    depth = _depth(records, names)
    commands = commands_of(row for record in records for row in headline(record))
    again = f"sparsellm report {shlex.join(record.name for record in records)} --out compare.html"
    packed = max_bytes is not None or None not in [
        record.packed_bytes for record in records
    ]
    runs = [
        Candidate(
            name,
            numbers["recovery"],
            (record.packed_bytes or 0) if packed else _left(record),
            numbers["KL"],
        )
        for (name, numbers), record in zip(values[1:], records, strict=True)
        if "recovery" in numbers and (record.packed_bytes or not packed)
    ]
    best = [
        (_size(x, packed), x.name, short_number(x.kl), percent(x.recovery))
        for x in best_at_each_size(runs)
    ]
    return page(
        "comparison.html.jinja",
        f"{len(records)} pruned versions of {records[0].model}",
        [*quality, *depth],
        sections=[
            ("runs", "The runs"),
            ("quality", "Quality"),
            ("depth", "By depth"),
            ("made", "How they were made"),
        ],
        model=records[0].model,
        records=records,
        names=names,
        protocol=str(protocol) if protocol is not None else "",
        summary=Table(("run", "method", *columns, "prune"), summary),
        advice=_advice(runs, packed, recover, max_bytes),
        best=Table(("size", "run", "KL", "recovery"), best),
        commands=[*commands, again] if commands else [],
        packed_commands=[
            x
            for record in records
            if record.decoding() is None
            for x in packed_commands(record)[:-1]
        ],
        quality=quality,
        depth=depth,
    )


def _names(records: Sequence[Checkpoint]) -> list[str]:
    """The names of the directories, with a number where the dense model or an earlier one is called alike."""
    names = [DENSE]
    for record in records:
        tried = chain(
            [record.name], (f"{record.name} ({number})" for number in count(2))
        )
        names.append(next(name for name in tried if name not in names))
    return names[1:]


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

    asked = [f"a recovery of {percent(recover)} or more"] if recover is not None else []
    asked += [f"at most {megabytes(max_bytes / 1e6)}"] if max_bytes is not None else []
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


def _values(
    records: Sequence[Checkpoint], names: list[str], protocol: Protocol | None
) -> list[tuple[str, _Values]]:
    """Names and measurements: first of the dense model, as far as the runs know them, then of each run."""
    values: list[tuple[str, _Values]] = []
    setting = None
    dense: _Values = {"zeros": 0.0, "KL": 0.0, "same token": 1.0, "recovery": 1.0}
    evaluations = [
        record.results.latest().get(protocol.key) if protocol is not None else None
        for record in records
    ]
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
    for name, record, evaluation in zip(names, records, evaluations, strict=True):
        one: _Values = {
            "zeros": record.pruning.sparsity_pruned,
            "weight files": record.file_bytes / 1e6,
        }
        if record.pruning.base.bytes:
            dense.setdefault("weight files", record.pruning.base.bytes / 1e6)
        if evaluation is not None:
            one["perplexity"] = evaluation.value
            against = evaluation.dense
            if against is not None and math.isclose(
                dense["perplexity"], against.perplexity.value, rel_tol=SAME
            ):
                one |= {
                    "KL": against.kl,
                    "same token": against.agreement,
                    "recovery": against.recovery or 0.0,
                }
        if (measured := record.decoding()) is not None:
            pair = measured[1]
            taken = (measured[0].machine, pair.packed.batch)
            setting = setting or taken
        # speeds of another machine or batch do not compare
        if measured is not None and taken == setting:
            dense.setdefault("tokens/s", pair.dense.median)
            one |= {
                "tokens/s": pair.packed.median,
                "× dense by transformers": pair.ratio.dense_by_transformers,
            }
            if pair.ratio.same_decoder is not None:
                one["× dense, same decoder"] = pair.ratio.same_decoder
        values.append((name, one))
    return [(DENSE, dense), *values]


def _quality(values: Sequence[tuple[str, _Values]]) -> list[Chart]:
    """Perplexity against size, speed and sparsity, each where a run has both values."""
    drawn = []
    for name, x, measure in (
        ("size", charts.axis("weight files, MB"), "weight files"),
        ("speed", charts.axis("tokens a second, decoding"), "tokens/s"),
        ("sparsity", charts.share_axis("zeros in the pruned linears"), "zeros"),
    ):
        points = [
            (place, run, of[measure], of["perplexity"])
            for place, (run, of) in enumerate(values)
            if {measure, "perplexity"} <= of.keys()
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
        marker = {
            "color": charts.COLOURS[(place - 1) % len(charts.COLOURS)],
            **trace["marker"],
            "size": 12,
        }
        if not place:
            marker |= {"size": 14, "color": charts.COLOURS[-1], "symbol": "star"}
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


def _depth(records: Sequence[Checkpoint], names: Sequence[str]) -> list[Chart]:
    """Sparsity and error over the blocks, a line for each run."""
    linears = {
        name: record.pruning.linears
        for name, record in zip(names, records, strict=True)
    }
    blocks = sorted({block for record in records for block in record.pruning.blocks})
    text = "Over the pruned linears of each block, one line for each run."
    sparsity = {
        name: charts.by_block(part, blocks, charts.sparsity_of)
        for name, part in linears.items()
    }
    error = {
        name: charts.by_block(part, blocks, error_of) for name, part in linears.items()
    }
    x = ("block", blocks)
    return [
        charts.lines(
            ("depth-sparsity", "Sparsity by block", text),
            x,
            charts.share_axis("zeros"),
            sparsity,
            percent,
        ),
        charts.lines(
            ("depth-error", "Mean error by block", text),
            x,
            charts.log_axis("error"),
            error,
            short_number,
        ),
    ]
