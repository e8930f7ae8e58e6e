"""Reads ``results.json`` of a checkpoint and appends to it: one record for each measurement, pair of texts, and export.

Only directories that sparsellm wrote have one. ``prune`` and ``pack`` write a new checkpoint without it, since results
hold for the weights that were measured.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from sparsellm.errors import StorageError
from sparsellm.files.contents import (
    LATER,
    changing,
    check_weights,
    listed_files,
    weights_difference,
)
from sparsellm.records import (
    PRUNING,
    RESULTS,
    Benchmark,
    Continuation,
    Evaluation,
    Export,
    Results,
    read_record,
)

_ADVICE = "move the file elsewhere, or give --no-save"


def place_of_results(directory: str) -> Path | None:
    """The directory if results are kept in it, because sparsellm wrote it. Raises StorageError if they would be, but it
    cannot be written, its results.json cannot be read, or its weights are not those that sparsellm wrote."""
    # What cannot be a path is refused as a model.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        place = Path(directory).expanduser()
        if any((place / name).is_file() for name in (PRUNING, "packed.json")):
            read_results(place)
            if not os.access(place, os.W_OK | os.X_OK):
                raise StorageError(
                    f"{place} cannot be written, and results are kept in it; give --no-save"
                )
            difference = weights_difference(place)
            if difference is not None:
                raise StorageError(
                    f"{difference}, and results are kept in it; give --no-save"
                )
            return place
    return None


def read_results(directory: Path) -> Results:
    """The results of a checkpoint, empty if nothing was measured. Raises StorageError if results.json is unreadable."""
    path = directory / RESULTS
    if os.path.lexists(path) and not path.is_file():
        raise StorageError(f"{path} is not an ordinary file; {_ADVICE}")
    return read_record(Results, path, _ADVICE) if path.is_file() else Results()


def keeper(
    place: Path | None, say: Callable[[str], None]
) -> Callable[[Evaluation | Benchmark], Path | None]:
    """The function that appends a measurement to the results in ``place``, and returns their file. A full disk, or
    another checkpoint of that name by then, is only said, so that the numbers can be printed all the same."""
    if place is None:
        return lambda record: None
    measured = _written(place)

    def keep(record: Evaluation | Benchmark) -> Path | None:
        try:
            if _written(place) != measured:
                raise StorageError(f"{place} was replaced while it was measured")
            return append_result(place, record)
        except (OSError, StorageError) as error:
            why = str(error).partition("; ")[0]  # its advice is for writing checkpoints
            say(f"note: the measurement is not kept in the checkpoint: {why}")
            return None

    return keep


def _written(place: Path) -> dict[str, list[str]]:
    """The digests of a checkpoint's files, without those that commands write later; empty without a list."""
    listed = listed_files(place) or {}
    return {name: digests for name, digests in listed.items() if name not in LATER}


def append_result(
    directory: Path, record: Evaluation | Benchmark | Continuation | Export
) -> Path:
    """Appends one record to results.json, which is replaced atomically, and returns the path of that file.

    The directory is locked from reading to writing, so that no record is lost if two processes append at once. Raises
    StorageError if the file cannot be read or written, or the weights are not those that sparsellm wrote."""
    with changing(directory) as write:
        check_weights(directory)
        results = read_results(directory)
        match record:
            case Evaluation():
                results.evaluations.append(record)
            case Benchmark():
                results.benchmarks.append(record)
            case Continuation():
                results.continuations.append(record)
            case Export():
                # A second start, or another file in the place of the first.
                key = (record.to, record.name)
                others = [it for it in results.exports if (it.to, it.name) != key]
                results.exports = [*others, record]
        write(RESULTS, (results.model_dump_json(indent=2) + "\n").encode())
    return directory / RESULTS
