"""A pruned checkpoint as the pages show it: records, the table dense against pruned, commands for what is missing."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from sparsellm.errors import StorageError
from sparsellm.files.contents import check_weights
from sparsellm.files.reader import as_storage_error
from sparsellm.files.results import read_results
from sparsellm.inputs import without_folders
from sparsellm.records import (
    PRUNING,
    QUANTITIES,
    Benchmark,
    Pruning,
    Results,
    read_pruning,
)
from sparsellm.report.charts import megabytes, number, percent
from sparsepack.bench import Pair, weight_file_bytes

_TEXTS = ("c4-sample", "pydoc", "wikitext2")


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a pruned checkpoint."""

    directory: Path
    name: str  # in commands
    pruning: Pruning
    results: Results
    file_bytes: int  # size of the weight files, or of what was exported
    exported: bool = (
        False  # whether the page is of what was written from it for another program
    )

    @property
    def model(self) -> str:
        """The name of the dense model for headings: the last part of its path."""
        return os.path.basename(self.pruning.base.name.rstrip("/")) or "a model"

    @property
    def packed(self) -> bool:
        return (self.directory / "packed.json").is_file()

    @property
    def packed_bytes(self) -> int | None:
        """The size of the packed weight files; None if there are none and no benchmark measured them."""
        if self.packed:
            return self.file_bytes
        measured = self.decoding()
        return None if measured is None else measured[0].packed_disk_bytes

    def decoding(self) -> tuple[Benchmark, Pair] | None:
        """The latest benchmark with decoding, and its speeds while decoding."""
        for result in reversed(self.results.benchmarks):
            if result.decoding:
                return result, result.decoding
        return None


def read_checkpoint(
    directory: str | os.PathLike[str], name: str | os.PathLike[str] | None = None
) -> Checkpoint:
    """What a pruned checkpoint says of itself. ``name`` is the later name of one that is not complete yet, which has no
    list of files. What ``prune`` has not written, has other weights, or cannot be read, is a StorageError."""
    place = Path(directory).expanduser()
    pruning = read_pruning(place)
    if name is None:
        check_weights(place)
    if not pruning.linears:
        raise StorageError(
            f"{place / PRUNING}: linears is []; there is nothing to report"
        )
    # pages leave this machine
    last = Path(os.path.abspath(place if name is None else name)).name
    with as_storage_error():
        return Checkpoint(
            place, last, pruning, read_results(place), weight_file_bytes(place)
        )


@dataclass(frozen=True)
class Row:
    """One quantity: its conditions, its values (None where it was not measured), the change from dense to pruned, and
    the command that measures what is missing."""

    name: str
    detail: str = ""
    dense: str | None = None
    pruned: str | None = None
    change: str = ""
    command: str = ""


def headline(record: Checkpoint) -> list[Row]:
    """The rows of the table: sparsity, quality, tasks, size, speed."""
    pruning = record.pruning
    rows = []
    if pruning.sparse:
        zeros = percent(pruning.sparsity_pruned)
        rows.append(Row("Zeros in the pruned linears", pruned=zeros))
        if pruning.matrices.weights > pruning.weights:
            zeros = percent(pruning.sparsity_reached)
            rows.append(Row("Zeros in all matrices of the blocks", pruned=zeros))
    if record.exported:
        return [*rows, *_quality(record), _exported_size(record)]
    files = [
        Row(f"File {file.name}", str(file), pruned=megabytes(file.bytes / 1e6))
        for file in record.results.exports
    ]
    return [
        *rows,
        *_quality(record),
        *_tasks(record),
        *_sizes(record),
        *files,
        *_speeds(record),
    ]


def _exported_size(record: Checkpoint) -> Row:
    """The size of what was exported, with embedding, head and metadata."""
    dense = record.pruning.base.bytes
    name = f"Size of {record.name}"
    size = megabytes(record.file_bytes / 1e6)
    if not dense:
        return Row(name, pruned=size)
    before = megabytes(dense / 1e6)
    return Row(name, "", before, size, _ratio(record.file_bytes, dense))


def commands_of(rows: Iterable[Row]) -> list[str]:
    """The commands that measure what is missing, each once."""
    return list(dict.fromkeys(row.command for row in rows if row.command))


def packed_commands(record: Checkpoint) -> list[str]:
    """The commands that pack a checkpoint and measure the packed form; empty if it is packed or has no packed form."""
    run = record.pruning
    if record.packed or not run.packs:
        return []
    packed = replace(record, name=f"{record.name}-packed")
    name = shlex.quote(packed.name)
    values = "" if run.values == "keep" else f" --values {run.values}"
    return [
        f"sparsellm pack {shlex.quote(record.name)} --out {name}{values}",
        _evaluate(packed),
        f"sparsellm bench {name}",
        f"sparsellm report {name}",
    ]


def _evaluate(record: Checkpoint, tasks: str = "") -> str:
    """The command that runs tasks, or compares with the dense model, on the calibration's data set if it has a name."""
    base = record.pruning.base
    calibration = record.pruning.recipe.get("calibration")
    model = base.model or without_folders(base.name) or "MODEL"
    text = calibration if calibration in _TEXTS else "wikitext2"
    asked = f"--tasks {tasks}" if tasks else f"--against {shlex.quote(model)}"
    return f"sparsellm eval {shlex.quote(record.name)} --text {text} {asked}"


def _quality(record: Checkpoint) -> list[Row]:
    command = _evaluate(record)
    base = record.pruning.base
    rows = []
    for evaluation in record.results.latest().values():
        protocol = str(evaluation.protocol)
        against = evaluation.dense
        if (
            against is not None
            and base.name
            and against.model not in (without_folders(base.name), base.model)
        ):
            protocol += f", against {against.model}"
        shown = [
            Row(name, protocol, dense, value)
            for name, dense, value in evaluation.rows()
        ]
        if against is not None:
            change = _ratio(evaluation.value, against.perplexity.value)
            shown[0] = replace(shown[0], change=change)
        else:
            shown.append(Row(QUANTITIES[1], protocol, "0"))
            shown.append(Row(QUANTITIES[2], protocol, "100%"))
            shown = [replace(row, command=command) for row in shown]
        rows += shown
    if rows:
        return rows
    measured = record.pruning.held_out
    if measured is not None:
        detail = f"held-out text: {measured}"
        return [
            Row(
                QUANTITIES[0],
                detail,
                dense=f"{measured.dense_perplexity:.4g}",
                pruned=f"{measured.perplexity:.4g}",
                change=_ratio(measured.perplexity, measured.dense_perplexity),
                command=command,
            ),
            Row(QUANTITIES[1], detail, "0", f"{measured.kl:.3g}"),
            Row(QUANTITIES[2], detail, "100%", f"{measured.agreement:.1%}"),
        ]
    rows = [Row(name, command=command) for name in QUANTITIES[:3]]
    best = record.pruning.best_pass
    if best is not None:
        detail = "held-out calibration windows"
        rows[1] = Row(QUANTITIES[1], detail, "0", f"{best.held_out:.3g}")
    return rows


def _tasks(record: Checkpoint) -> list[Row]:
    """The latest value of each task and metric."""
    latest: dict[str, str] = {}
    for evaluation in record.results.evaluations:
        for task, metrics in (evaluation.tasks or {}).items():
            latest |= {
                f"{task}: {name}": metric.shown() for name, metric in metrics.items()
            }
    rows = [Row(name, pruned=value) for name, value in latest.items()]
    return rows or [Row("Tasks", command=_evaluate(record, "hellaswag,arc_easy"))]


def _sizes(record: Checkpoint) -> list[Row]:
    """Weight files of the directory, and of its packed form if that was measured."""
    detail = "packed" if record.packed else "zeros are stored; packing leaves them out"
    sizes = [(record.name, detail, record.file_bytes)]
    measured = record.decoding()
    if measured is not None and not record.packed and record.packed_bytes:
        name = measured[0].packed_name or "the packed form"
        sizes.append((name, "packed", record.packed_bytes))
    dense = record.pruning.base.bytes
    before = megabytes(dense / 1e6) if dense else None
    return [
        Row(
            f"Weight files of {name}",
            detail,
            before,
            megabytes(size / 1e6),
            _ratio(size, dense) if dense else "",
        )
        for name, detail, size in sizes
    ]


def _speeds(record: Checkpoint) -> list[Row]:
    """The speed of the packed form against dense by the same decoder, and as transformers runs it."""
    name = "Tokens a second, decoding"
    measured = record.decoding()
    if measured is None:
        if record.packed:
            return [Row(name, command=f"sparsellm bench {shlex.quote(record.name)}")]
        return [Row(name, "of the packed form")]
    benchmark, pair = measured
    packed = pair.packed
    packed_name = benchmark.packed_name or "packed"
    detail = f"{packed_name}, batch {packed.batch}, {packed.threads} threads, dense in {benchmark.dense_dtype}"
    return [
        Row(
            f"{name}, dense by {how}",
            detail,
            dense=number(dense.median),
            pruned=number(packed.median),
            change=_ratio(packed.median, dense.median),
        )
        for how, dense in pair.against
    ]


def _ratio(value: float, reference: float) -> str:
    return (
        f"× {value / reference:.2f}"
        if reference and math.isfinite(value / reference)
        else ""
    )
