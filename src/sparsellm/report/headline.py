"""The first table of a report: the dense model against the pruned one, and the command for what was not measured."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sparsellm.records import Interval
from sparsellm.report.charts import number, percent
from sparsellm.report.checkpoint import Checkpoint

NOT_MEASURED = "not measured"
KL, SAME = "KL(dense ‖ pruned), nats a token", "Same likeliest token"
_TEXTS = ("pydoc", "wikitext2", "ptb", "c4")


@dataclass(frozen=True)
class Row:
    """One quantity.

    Attributes:
        name: of the quantity.
        detail: the conditions under which it holds.
        dense, pruned: its values; None where it was not measured.
        change: from dense to pruned.
        command: what measures it, where a value is missing.
    """

    name: str
    detail: str = ""
    dense: str | None = None
    pruned: str | None = None
    change: str = ""
    command: str = ""


def headline(record: Checkpoint) -> list[Row]:
    """The rows of the table: quality, tasks, size, speed, sparsity."""
    return [*_sparsity(record), *_quality(record), *_tasks(record), _size(record), _speed(record)]


def commands_of(rows: Iterable[Row]) -> list[str]:
    """The commands that measure what is missing, each once."""
    return list(dict.fromkeys(row.command for row in rows if row.command))


def evaluate_command(record: Checkpoint, tasks: str = "") -> str:
    """The command that compares a checkpoint with its dense model, on the calibration's data set if it is a named one.

    Args:
        record: of the run.
        tasks: run these tasks too.
    """
    model, calibration = record.pruning.base.name, record.pruning.recipe.get("calibration")
    text = calibration if calibration in _TEXTS else "wikitext2"
    command = f"sparsellm eval {shlex.quote(record.name)} --text {text}"
    return f"{command} --tasks {tasks}" if tasks else f"{command} --against {shlex.quote(model) if model else 'MODEL'}"


def packed_commands(record: Checkpoint) -> list[str]:
    """The commands that pack a checkpoint and measure the packed form, which has the results; empty if it is packed."""
    if record.packed:
        return []
    packed = replace(record, name=f"{record.name.rstrip('/')}-packed")
    name = shlex.quote(packed.name)
    pack = f"sparsellm pack {shlex.quote(record.name)} --out {name}"
    return [pack, evaluate_command(packed), f"sparsellm bench {name}", f"sparsellm report {name}"]


def _sparsity(record: Checkpoint) -> list[Row]:
    pruning = record.pruning
    rows = [Row("Zeros in the pruned linears", "", None, percent(pruning.sparsity_pruned))]
    if pruning.matrices.weights > sum(linear.weights for linear in pruning.linears):
        rows.append(Row("Zeros in all matrices of the blocks", "", None, percent(pruning.sparsity_reached)))
    return rows


def _quality(record: Checkpoint) -> list[Row]:
    evaluations = record.latest()
    rows = []
    for evaluation in evaluations.values():
        protocol = str(evaluation.protocol)
        against, pruned = evaluation.against, evaluation.perplexity
        if against is None:
            again = evaluate_command(record)
            rows.append(Row("Perplexity", protocol, None, _interval(pruned), "", again))
            rows += [Row(name, protocol, dense, command=again) for name, dense in ((KL, "0"), (SAME, "100%"))]
            continue
        dense = against.perplexity
        change = _ratio(pruned.value, dense.value)
        rows += [
            Row("Perplexity", protocol, _interval(dense), _interval(pruned), change),
            Row(KL, protocol, "0", _interval(against.divergence, 3)),
            Row(SAME, protocol, "100%", percent(against.agreement)),
            Row("Recovery", protocol, "100%", percent(against.recovery)),
        ]
    if rows:
        return rows
    command = evaluate_command(record)
    return [Row(name, command=command) for name in ("Perplexity", KL, SAME)]


def _tasks(record: Checkpoint) -> list[Row]:
    rows = []
    for (task, metric), value in record.tasks().items():
        error = f" ± {number(value.stderr, 2)}" if value.stderr is not None else ""
        rows.append(Row(f"{task}: {metric}", "", None, f"{number(value.value)}{error}"))
    return rows or [Row("Tasks", command=evaluate_command(record, "hellaswag,arc_easy"))]


def _size(record: Checkpoint) -> Row:
    dense, own = record.pruning.base.bytes, record.file_bytes
    detail = "packed" if record.packed else "zeros are stored; packing leaves them out"
    return Row(
        "Weight files",
        detail,
        _megabytes(dense) if dense else None,
        _megabytes(own),
        _ratio(own, dense) if dense else "",
    )


def _speed(record: Checkpoint) -> Row:
    speeds = record.decode_speeds()
    if speeds is None:
        packed = record.packed
        command = f"sparsellm bench {shlex.quote(record.name)}" if packed else ""
        return Row("Tokens a second, decoding", "" if packed else "of the packed form", command=command)
    dense, packed_speed = speeds
    detail = f"packed, batch {packed_speed.batch}, {packed_speed.threads} threads"
    before, after = dense.median, packed_speed.median
    return Row("Tokens a second, decoding", detail, number(before), number(after), _ratio(after, before))


def _interval(value: Interval, digits: int = 4) -> str:
    said = number(value.value, digits)
    if value.low is None or value.high is None:
        return said
    return f"{said} ({number(value.low, digits)}–{number(value.high, digits)})"


def _ratio(value: float, reference: float) -> str:
    return f"× {value / reference:.2f}" if reference and math.isfinite(value / reference) else ""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e10 else f"{size / 1e9:,.1f} GB"
