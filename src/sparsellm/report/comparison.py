"""Runs of one base model side by side: quality against size and speed, with the dense model as the reference."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from sparsellm.errors import StorageError, shown
from sparsellm.records import Protocol, error_of
from sparsellm.report import charts
from sparsellm.report.charts import COLOURS, Chart, Plotly, Table, axis, line, number, percent, short_number
from sparsellm.report.checkpoint import (
    NOT_MEASURED,
    Checkpoint,
    commands_of,
    headline,
    packed_commands,
    read_checkpoint,
)
from sparsellm.report.document import page, write_page

_Values = dict[str, float]  # what was measured of a run, by column
_MEASURES: dict[str, Callable[[float], str]] = {
    "zeros": percent,
    "perplexity": number,
    "KL": short_number,
    "same token": percent,
    "weight files": lambda megabytes: f"{megabytes:,.1f} MB",
    "tokens/s": number,
    "× dense, same decoder": number,
    "× dense by transformers": number,
}


def write_comparison(directories: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Writes one page that compares two or more pruned checkpoints of one model, and returns its path.

    Raises:
        StorageError: a directory was not written by ``prune``, is named twice or is of another base model, or ``out``
            is refused, as by :func:`write_page`.
        MissingExtraError: the chart library is not installed.
    """
    records = [read_checkpoint(directory) for directory in directories]
    first, seen = records[0], set[str]()
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
    return write_page(render_comparison(records), out)


def render_comparison(records: Sequence[Checkpoint]) -> bytes:
    """The comparison as HTML."""
    protocol, names = _common_protocol(records), _names(records)
    values = _values(records, names, protocol)
    methods = [" ".join(str(each.pruning.recipe.get(key) or "") for key in ("method", "pattern")) for each in records]
    seconds = [f"{sum(each.pruning.whole_seconds.values()):,.0f} s" for each in records]
    summary = [
        (
            name,
            method.strip(),
            *(text(each[key]) if key in each else NOT_MEASURED for key, text in _MEASURES.items()),
            took,
        )
        for (name, each), method, took in zip(values, ["", *methods], ["", *seconds], strict=True)
    ]
    quality, depth = _quality(values), _depth(records, names)
    commands = commands_of(row for record in records for row in headline(record))
    again = f"sparsellm report {shlex.join(record.name for record in records)} --out compare.html"
    unpacked = [record for record in records if record.decoding() is None]
    return page(
        "comparison.html.jinja",
        f"{len(records)} pruned versions of {records[0].model}",
        [*quality, *depth],
        sections=[("runs", "The runs"), ("quality", "Quality"), ("depth", "By depth"), ("made", "How they were made")],
        model=records[0].model,
        records=records,
        names=names,
        protocol=str(protocol) if protocol is not None else "",
        summary=Table(("run", "method", *_MEASURES, "prune"), summary),
        commands=[*commands, again] if commands else [],
        packed_commands=[command for record in unpacked for command in packed_commands(record)[:-1]],
        quality=quality,
        depth=depth,
    )


def _common_protocol(records: Sequence[Checkpoint]) -> Protocol | None:
    """The protocol by which most runs were measured; None if none was measured."""
    protocols = [each.protocol for record in records for each in record.latest().values()]
    counts = Counter(protocol.key for protocol in protocols)
    return max(protocols, key=lambda protocol: counts[protocol.key], default=None)


def _names(records: Sequence[Checkpoint]) -> list[str]:
    """The names of the directories, with a number where an earlier one is called alike."""
    lasts = [record.name for record in records]
    before = [lasts[:place].count(last) for place, last in enumerate(lasts)]
    return [f"{last} ({count + 1})" if count else last for last, count in zip(lasts, before, strict=True)]


def _values(
    records: Sequence[Checkpoint], names: Sequence[str], protocol: Protocol | None
) -> list[tuple[str, _Values]]:
    """Names and measurements: first of the dense model, as far as the runs know them, then of each run."""
    values, speeds = list[tuple[str, _Values]](), list[float]()
    dense: _Values = {"zeros": 0.0, "KL": 0.0, "same token": 1.0}
    for name, record in zip(names, records, strict=True):
        one: _Values = {"zeros": record.pruning.sparsity_pruned, "weight files": record.file_bytes / 1e6}
        if record.pruning.base.bytes:
            dense.setdefault("weight files", record.pruning.base.bytes / 1e6)
        if protocol is not None and (evaluation := record.latest().get(protocol.key)) is not None:
            one["perplexity"] = evaluation.value
            if (against := evaluation.dense) is not None:
                one |= {"KL": against.kl, "same token": against.agreement}
                dense.setdefault("perplexity", against.perplexity.value)
        if (measured := record.decoding()) is not None:
            pair = measured[1]
            speeds.append(pair.dense.median)
            one |= {"tokens/s": pair.packed.median, "× dense by transformers": pair.ratio.dense_by_transformers}
            if pair.ratio.same_decoder is not None:
                one["× dense, same decoder"] = pair.ratio.same_decoder
        values.append((name, one))
    if speeds:
        dense["tokens/s"] = fmean(speeds)
    return [("dense", dense), *values]


def _quality(values: Sequence[tuple[str, _Values]]) -> list[Chart]:
    """Perplexity against size, speed and sparsity, each where a run has both values."""
    drawn = []
    for name, title, measure in (
        ("size", "weight files, MB", "weight files"),
        ("speed", "tokens a second, decoding", "tokens/s"),
        ("sparsity", "zeros in the pruned linears", "zeros"),
    ):
        points = [(run, of[measure], of["perplexity"]) for run, of in values if {measure, "perplexity"} <= of.keys()]
        if any(label != "dense" for label, _, _ in points):
            drawn.append(_scatter(name, title, points, values[0][1].get("perplexity")))
    return drawn


def _scatter(name: str, title: str, points: list[tuple[str, float, float]], reference: float | None) -> Chart:
    """A point for each run; the dense model is a star, and a line across."""
    best = min((point for point in points if point[0] != "dense"), key=lambda point: point[2])
    text = f"{best[0]} has the lowest perplexity, {number(best[2])}"
    layout: Plotly = {"xaxis": axis(title), "yaxis": axis("perplexity, lower is better"), "showlegend": False}
    if reference is not None:
        text += f"; the dense model, the dashed line, has {number(reference)}"
        layout["shapes"] = [charts.reference_line(reference)]
    across = [at for _, at, _ in points]
    middle = (min(across) + max(across)) / 2
    traces = []
    for position, (label, at, y) in enumerate(points):
        dense = label == "dense"
        trace = line(label, [at], [y], position - 1)
        style = {"size": 14, "color": COLOURS[-1], "symbol": "star"} if dense else {"size": 12}
        marker = {"color": COLOURS[(position - 1) % len(COLOURS)], **trace["marker"], **style}
        right = at > middle or (at == middle and not dense)  # texts point to the middle, so that none is cut off
        placed = "top left" if right else "top right"
        traces.append(
            trace
            | {"mode": "markers+text", "text": [label], "textposition": placed, "cliponaxis": False, "marker": marker}
        )
    table = Table(("run", title, "perplexity"), [(label, number(at), number(y)) for label, at, y in points])
    return Chart(f"quality-{name}", f"Quality against {name}", f"{text}.", table, traces, layout, 400)


def _depth(records: Sequence[Checkpoint], names: Sequence[str]) -> list[Chart]:
    """Sparsity and error over the blocks, a line for each run."""
    linears = {name: record.pruning.linears for name, record in zip(names, records, strict=True)}
    blocks = sorted({block for record in records for block in record.pruning.blocks})
    text = "Over the pruned linears of each block, one line for each run."
    sparsity = {name: charts.by_block(part, blocks, charts.sparsity_of) for name, part in linears.items()}
    error = {name: charts.by_block(part, blocks, error_of) for name, part in linears.items()}
    x = ("block", blocks)
    return [
        charts.lines(("depth-sparsity", "Sparsity by block", text), x, axis("", tickformat=".0%"), sparsity, percent),
        charts.lines(("depth-error", "Mean error by block", text), x, axis("", type="log"), error, short_number),
    ]
