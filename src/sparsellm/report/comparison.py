"""Runs of one base model side by side: quality against size and speed, with the dense model as the reference."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsellm.errors import StorageError, shown
from sparsellm.records import Evaluation, Protocol
from sparsellm.report import charts
from sparsellm.report.charts import COLOURS, Chart, Table, Trace, axis, line, number, percent, whole_axis
from sparsellm.report.checkpoint import Checkpoint, read_checkpoint
from sparsellm.report.document import checked_out, page, write_page
from sparsellm.report.headline import NOT_MEASURED, commands_of, headline, packed_commands


@dataclass(frozen=True)
class ComparedRun:
    """One run, with its evaluation by the protocol of the comparison.

    Attributes:
        name: short, and different from those of the others.
        record: of the run.
        evaluation: None if it was not measured by that protocol.
    """

    name: str
    record: Checkpoint
    evaluation: Evaluation | None

    @property
    def perplexity(self) -> float | None:
        return self.evaluation.value if self.evaluation is not None else None

    @property
    def dense_perplexity(self) -> float | None:
        against = self.evaluation.against if self.evaluation is not None else None
        return against.perplexity.value if against is not None else None


def write_comparison(directories: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Writes one page that compares several runs, and returns its path.

    Args:
        directories: two or more pruned checkpoints of one base model.
        out: the file; a report of ours is replaced.

    Raises:
        StorageError: a directory was not written by ``prune``, is named twice or is of another base model, or ``out``
            is refused.
        MissingExtraError: the chart library is not installed.
    """
    place = checked_out(out)
    records = [read_checkpoint(directory) for directory in directories]
    _check_same_model(records)
    return write_page(place, render_comparison(records))


def _check_same_model(records: Sequence[Checkpoint]) -> None:
    """Refuses runs of different base models, and one that is named twice.

    Runs compare by the digest of the dense model; those of a release that recorded none, by names and shapes.
    """
    first = records[0]
    seen: set[str] = set()
    for record in records:
        place = os.path.realpath(record.directory)
        if place in seen:
            raise StorageError(f"{record.name} is named twice; name each run once")
        seen.add(place)
        one, other = first.pruning.base.digest, record.pruning.base.digest
        known = one is not None and other is not None
        if (one != other) if known else (_shapes(first) != _shapes(record)):
            models = [shown(each.pruning.base.name or "another model") for each in (first, record)]
            raise StorageError(
                f"{first.name} is of {models[0]} and {record.name} of {models[1]}, another base model; "
                "compare runs of one model"
            )


def _shapes(record: Checkpoint) -> dict[str, tuple[int, int]]:
    return {linear.name: linear.shape for linear in record.pruning.linears}


def render_comparison(records: Sequence[Checkpoint]) -> str:
    """The comparison as HTML.

    Raises:
        MissingExtraError: the chart library is not installed.
    """
    protocol = _common_protocol(records)
    evaluations = [record.latest().get(protocol.key) if protocol is not None else None for record in records]
    names = _names(records)
    runs = [ComparedRun(*each) for each in zip(names, records, evaluations, strict=True)]
    quality = _quality(runs)
    depth = [
        _by_depth(runs, "depth-sparsity", "Sparsity by block", charts.sparsity_of, percent, {"tickformat": ".0%"}),
        _by_depth(runs, "depth-error", "Mean error by block", charts.error_of, lambda v: number(v, 3), {"type": "log"}),
    ]
    commands = commands_of(row for record in records for row in headline(record))
    dense = [record for record in records if record.decode_speeds() is None]
    return page(
        "comparison.html.jinja",
        f"{len(runs)} pruned versions of {records[0].model}",
        [*quality, *depth],
        sections=[("runs", "The runs"), ("quality", "Quality"), ("depth", "By depth"), ("made", "How they were made")],
        model=records[0].model,
        records=records,
        names=names,
        protocol=str(protocol) if protocol is not None else "",
        summary=_summary(runs),
        commands=[*commands, *_again(records)] if commands else [],
        packed_commands=[command for record in dense for command in packed_commands(record)[:-1]],
        quality=quality,
        depth=depth,
    )


def _again(records: Sequence[Checkpoint]) -> list[str]:
    return [f"sparsellm report {shlex.join(record.name for record in records)} --out compare.html"]


def _common_protocol(records: Sequence[Checkpoint]) -> Protocol | None:
    """The protocol by which most runs were measured; None if none was measured."""
    protocols = [each.protocol for record in records for each in record.latest().values()]
    counts = Counter(protocol.key for protocol in protocols)
    return max(protocols, key=lambda protocol: counts[protocol.key], default=None)


def _names(records: Sequence[Checkpoint]) -> list[str]:
    """The last part of each directory, or the whole path where two are called alike."""
    lasts = [Path(os.path.abspath(record.directory)).name for record in records]
    return [last if lasts.count(last) == 1 else record.name for last, record in zip(lasts, records, strict=True)]


def _summary(runs: Sequence[ComparedRun]) -> Table:
    """One row for each run, after one of the dense model where its values are known."""
    columns = ("run", "method", "zeros", "perplexity", "KL", "same token", "weight files", "tokens/s", "prune")
    rows = []
    for run in runs:
        record, against = run.record, run.evaluation.against if run.evaluation is not None else None
        speeds = record.decode_speeds()
        rows.append(
            (
                run.name,
                " ".join(str(record.pruning.recipe.get(key) or "") for key in ("method", "pattern")).strip(),
                percent(record.pruning.sparsity_pruned),
                _or_absent(run.perplexity, number),
                _or_absent(against.kl if against is not None else None, lambda value: number(value, 3)),
                _or_absent(against.agreement if against is not None else None, percent),
                f"{record.file_bytes / 1e6:,.1f} MB",
                _or_absent(speeds[1].median if speeds is not None else None, number),
                f"{sum(record.pruning.whole_seconds.values()):,.0f} s",
            )
        )
    size, speed = _dense_size(runs), _dense_speed(runs)
    dense = next((run.dense_perplexity for run in runs if run.dense_perplexity is not None), None)
    rows.insert(
        0,
        (
            "dense",
            "",
            "",
            _or_absent(dense, number),
            "0",
            "100%",
            _or_absent(size, lambda megabytes: f"{megabytes:,.1f} MB"),
            _or_absent(speed, number),
            "",
        ),
    )
    return Table(columns, rows)


def _or_absent(value: float | None, shown_as: Callable[[float], str]) -> str:
    return shown_as(value) if value is not None else NOT_MEASURED


def _dense_size(runs: Sequence[ComparedRun]) -> float | None:
    """Megabytes of the dense model's weights."""
    return next((size / 1e6 for run in runs if (size := run.record.pruning.base.bytes)), None)


def _dense_speed(runs: Sequence[ComparedRun]) -> float | None:
    """Tokens a second of the dense model, the mean over the runs that were compared with it."""
    speeds = [speeds[0].median for run in runs if (speeds := run.record.decode_speeds()) is not None]
    return sum(speeds) / len(speeds) if speeds else None


def _quality(runs: Sequence[ComparedRun]) -> list[Chart]:
    """Perplexity against size, speed and sparsity, each where two values or more are known."""

    def speed(run: ComparedRun) -> float | None:
        speeds = run.record.decode_speeds()
        return speeds[1].median if speeds is not None else None

    views = (
        ("size", "weight files, MB", lambda run: run.record.file_bytes / 1e6, _dense_size(runs)),
        ("speed", "tokens a second, decoding", speed, _dense_speed(runs)),
        ("sparsity", "zeros in the pruned linears", lambda run: run.record.pruning.sparsity_pruned, 0.0),
    )
    found = [_against(runs, name, title, of, dense) for name, title, of, dense in views]
    return [chart for chart in found if chart is not None]


def _against(
    runs: Sequence[ComparedRun],
    name: str,
    title: str,
    of: Callable[[ComparedRun], float | None],
    dense: float | None,
) -> Chart | None:
    """A point for each run, and the dense model as a point and a line across; None if no run has both values."""
    known = [(run.name, of(run), run.perplexity) for run in runs]
    points = [(label, x, y) for label, x, y in known if x is not None and y is not None]
    if not points:
        return None
    reference = next((run.dense_perplexity for run in runs if run.dense_perplexity is not None), None)
    traces: list[Trace] = [
        {**line(label, [x], [y], position), "mode": "markers+text", "text": [label], "cliponaxis": False}
        for position, (label, x, y) in enumerate(points)
    ]
    across = [x for _, x, _ in points] + ([dense] if reference is not None and dense is not None else [])
    middle = (min(across) + max(across)) / 2
    for position, trace in enumerate(traces):  # labels towards the middle, so that none is cut off
        trace["textposition"] = "top left" if points[position][1] >= middle else "top right"
        trace["marker"] = {**trace["marker"], "size": 12, "color": COLOURS[position % len(COLOURS)]}
    rows = [(label, number(x), number(y)) for label, x, y in points]
    layout = {"xaxis": axis(title), "yaxis": axis("perplexity, lower is better"), "showlegend": False}
    if reference is not None:
        layout["shapes"] = [charts.reference_line(reference)]
        if dense is not None:
            marker = {"symbol": "star", "size": 14, "color": COLOURS[-1]}
            traces.append(
                {"type": "scatter", "x": [dense], "y": [reference], "name": "dense", "mode": "markers+text",
                 "text": ["dense"], "textposition": "top left" if dense > middle else "top right", "marker": marker,
                 "cliponaxis": False}
            )  # fmt: skip
        rows.insert(0, ("dense", number(dense), number(reference)))
    best = min(points, key=lambda point: point[2])
    said = f"; the dense model, the dashed line, has {number(reference)}" if reference is not None else ""
    return Chart(
        f"quality-{name}",
        f"Quality against {name}",
        f"{best[0]} has the lowest perplexity, {number(best[2])}{said}.",
        Table(("run", title, "perplexity"), rows),
        traces,
        layout,
        400,
    )


def _by_depth(
    runs: Sequence[ComparedRun],
    name: str,
    title: str,
    of: Callable[..., float],
    shown_as: Callable[[float], str],
    layout: dict[str, str],
) -> Chart:
    """A line for each run over the blocks."""
    blocks = sorted({linear.block for run in runs for linear in run.record.pruning.linears})
    values = [
        [of(own) if (own := [x for x in run.record.pruning.linears if x.block == block]) else None for block in blocks]
        for run in runs
    ]
    rows = [
        (str(block), *(shown_as(row[i]) if row[i] is not None else "–" for row in values))  # type: ignore[arg-type]
        for i, block in enumerate(blocks)
    ]
    return Chart(
        name,
        title,
        "Over the pruned linears of each block, one line for each run.",
        Table(("block", *(run.name for run in runs)), rows),
        [line(run.name, blocks, row, position) for position, (run, row) in enumerate(zip(runs, values, strict=True))],
        {"xaxis": whole_axis("block", blocks), "yaxis": axis("", **layout)},
        380,
    )
