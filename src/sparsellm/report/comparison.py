"""Runs of one base model side by side: quality against size and speed, with the dense model as the reference."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsellm.errors import StorageError, shown
from sparsellm.records import Evaluation, Protocol, error_of
from sparsellm.report import charts
from sparsellm.report.charts import COLOURS, Chart, Plotly, Table, axis, line, number, percent, short_number
from sparsellm.report.checkpoint import Checkpoint, read_checkpoint
from sparsellm.report.document import checked_out, page
from sparsellm.report.headline import NOT_MEASURED, commands_of, headline, packed_commands
from sparsellm.storage.files import write_bytes


@dataclass(frozen=True)
class Run:
    """One run: its short name, and its evaluation by the protocol of the comparison, None if there is none."""

    name: str
    record: Checkpoint
    evaluation: Evaluation | None

    @property
    def perplexity(self) -> float | None:
        return self.evaluation.value if self.evaluation is not None else None

    @property
    def speed(self) -> float | None:
        speeds = self.record.decode_speeds()
        return speeds[1].median if speeds is not None else None


@dataclass(frozen=True)
class Dense:
    """The dense model, as far as the runs know it: perplexity, megabytes of weights, and tokens a second (the mean over
    the runs that were compared with it)."""

    perplexity: float | None
    megabytes: float | None
    speed: float | None

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Dense:
        against = [run.evaluation.against for run in runs if run.evaluation is not None]
        speeds = [speeds[0].median for run in runs if (speeds := run.record.decode_speeds()) is not None]
        return cls(
            next((each.perplexity.value for each in against if each is not None), None),
            next((size / 1e6 for run in runs if (size := run.record.pruning.base.bytes)), None),
            sum(speeds) / len(speeds) if speeds else None,
        )


def write_comparison(directories: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Writes one page that compares several pruned checkpoints of one model, and returns its path.

    Args:
        directories: two or more.
        out: the file; a report of ours is replaced.

    Raises:
        StorageError: a directory was not written by ``prune``, is named twice or is of another base model, or ``out``
            is refused.
        MissingExtraError: the chart library is not installed.
    """
    records = [read_checkpoint(directory) for directory in directories]
    _check_same_model(records)
    place = checked_out(out)
    write_bytes(place, render_comparison(records))
    return place


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
        bases = [each.pruning.base for each in (first, record)]
        known = all(base.digest is not None for base in bases)
        shapes = [{linear.name: linear.shape for linear in each.pruning.linears} for each in (first, record)]
        if bases[0].digest != bases[1].digest if known else shapes[0] != shapes[1]:
            models = [shown(base.name or "another model") for base in bases]
            raise StorageError(
                f"{first.name} is of {models[0]} and {record.name} of {models[1]}, another base model; "
                "compare runs of one model"
            )


def render_comparison(records: Sequence[Checkpoint]) -> bytes:
    """The comparison as HTML.

    Raises:
        MissingExtraError: the chart library is not installed.
    """
    protocol = _common_protocol(records)
    evaluations = [record.latest().get(protocol.key) if protocol is not None else None for record in records]
    names = _names(records)
    runs = [Run(*each) for each in zip(names, records, evaluations, strict=True)]
    dense = Dense.of(runs)
    quality, depth = _quality(runs, dense), _depth(runs)
    commands = commands_of(row for record in records for row in headline(record))
    again = f"sparsellm report {shlex.join(record.name for record in records)} --out compare.html"
    unpacked = [record for record in records if record.decode_speeds() is None]
    return page(
        "comparison.html.jinja",
        f"{len(runs)} pruned versions of {records[0].model}",
        [*quality, *depth],
        sections=[("runs", "The runs"), ("quality", "Quality"), ("depth", "By depth"), ("made", "How they were made")],
        model=records[0].model,
        records=records,
        names=names,
        protocol=str(protocol) if protocol is not None else "",
        summary=_summary(runs, dense),
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
    """The last part of each directory, or the whole path where two are called alike."""
    lasts = [Path(os.path.abspath(record.directory)).name for record in records]
    return [last if lasts.count(last) == 1 else record.name for last, record in zip(lasts, records, strict=True)]


def _summary(runs: Sequence[Run], dense: Dense) -> Table:
    """One row for each run, after one of the dense model where its values are known."""

    def known(value: float | None, shown_as: Callable[[float | None], str] = number) -> str:
        return shown_as(value) if value is not None else NOT_MEASURED

    size = f"{dense.megabytes:,.1f} MB" if dense.megabytes is not None else NOT_MEASURED
    rows = [("dense", "", "", known(dense.perplexity), "0", "100%", size, known(dense.speed), "")]
    for run in runs:
        pruning, against = run.record.pruning, run.evaluation.against if run.evaluation is not None else None
        rows.append(
            (
                run.name,
                " ".join(str(pruning.recipe.get(key) or "") for key in ("method", "pattern")).strip(),
                percent(pruning.sparsity_pruned),
                known(run.perplexity),
                known(against.kl if against is not None else None, short_number),
                known(against.agreement if against is not None else None, percent),
                f"{run.record.file_bytes / 1e6:,.1f} MB",
                known(run.speed),
                f"{sum(pruning.whole_seconds.values()):,.0f} s",
            )
        )
    columns = ("run", "method", "zeros", "perplexity", "KL", "same token", "weight files", "tokens/s", "prune")
    return Table(columns, rows)


def _quality(runs: Sequence[Run], dense: Dense) -> list[Chart]:
    """Perplexity against size, speed and sparsity, each where a run has both values."""
    views: tuple[tuple[str, str, list[float | None], float | None], ...] = (
        ("size", "weight files, MB", [run.record.file_bytes / 1e6 for run in runs], dense.megabytes),
        ("speed", "tokens a second, decoding", [run.speed for run in runs], dense.speed),
        ("sparsity", "zeros in the pruned linears", [run.record.pruning.sparsity_pruned for run in runs], 0.0),
    )
    drawn = []
    for name, title, values, of_dense in views:
        pairs = zip(runs, values, strict=True)
        points = [(run.name, x, run.perplexity) for run, x in pairs if x is not None and run.perplexity is not None]
        if points:
            drawn.append(_scatter(name, title, points, of_dense, dense.perplexity))  # type: ignore[arg-type]
    return drawn


def _scatter(
    name: str, title: str, points: list[tuple[str, float, float]], x: float | None, reference: float | None
) -> Chart:
    """A point for each run, and the dense model as a line across, and as a point if its ``x`` is known."""
    best = min(points, key=lambda point: point[2])
    text = f"{best[0]} has the lowest perplexity, {number(best[2])}"
    layout: Plotly = {"xaxis": axis(title), "yaxis": axis("perplexity, lower is better"), "showlegend": False}
    rows = [(label, number(at), number(y)) for label, at, y in points]
    styles = [{"size": 12, "color": COLOURS[position % len(COLOURS)]} for position in range(len(points))]
    if reference is not None:
        text += f"; the dense model, the dashed line, has {number(reference)}"
        layout["shapes"] = [charts.reference_line(reference)]
        rows.insert(0, ("dense", number(x), number(reference)))
        if x is not None:
            points = [*points, ("dense", x, reference)]
            styles.append({"size": 14, "color": COLOURS[-1], "symbol": "star"})
    across = [at for _, at, _ in points]
    middle = (min(across) + max(across)) / 2
    traces = []
    for position, ((label, at, y), style) in enumerate(zip(points, styles, strict=True)):
        trace = line(label, [at], [y], position)
        trace |= {"mode": "markers+text", "text": [label], "cliponaxis": False, "marker": {**trace["marker"], **style}}
        right = at > middle or (at == middle and label != "dense")
        trace["textposition"] = "top left" if right else "top right"  # towards the middle, so that none is cut off
        traces.append(trace)
    table = Table(("run", title, "perplexity"), rows)
    return Chart(f"quality-{name}", f"Quality against {name}", f"{text}.", table, traces, layout, 400)


def _depth(runs: Sequence[Run]) -> list[Chart]:
    """Sparsity and error over the blocks, a line for each run."""
    linears = {run.name: run.record.pruning.linears for run in runs}
    blocks = sorted({block for run in runs for block in run.record.pruning.blocks})
    text = "Over the pruned linears of each block, one line for each run."
    sparsity = {name: charts.by_block(own, blocks, charts.sparsity_of) for name, own in linears.items()}
    error = {name: charts.by_block(own, blocks, error_of) for name, own in linears.items()}
    x = ("block", blocks)
    return [
        charts.lines(("depth-sparsity", "Sparsity by block", text), x, axis("", tickformat=".0%"), sparsity, percent),
        charts.lines(("depth-error", "Mean error by block", text), x, axis("", type="log"), error, short_number),
    ]
