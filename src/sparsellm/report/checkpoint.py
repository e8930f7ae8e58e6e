"""A pruned checkpoint as the pages show it: the record of its run and what was measured since."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sparsellm.errors import StorageError, shown
from sparsellm.records import PRUNING, Evaluation, Metric, Pruning, Results, read_pruning
from sparsellm.storage.results import read_results
from sparsepack.bench import Speed


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a pruned checkpoint: its directory, the name of it in commands, the record of the run, what was
    measured since, and the bytes of the weight files."""

    directory: Path
    name: str
    pruning: Pruning
    results: Results
    file_bytes: int

    @property
    def model(self) -> str:
        """The name of the dense model for headings: the last part of its path."""
        return os.path.basename(self.pruning.base.name.rstrip("/")) or "a model"

    @property
    def packed(self) -> bool:
        return (self.directory / "packed.json").is_file()

    def latest(self) -> dict[tuple[object, ...], Evaluation]:
        """The latest evaluation of each protocol, by the protocol's key."""
        return {each.protocol.key: each for each in self.results.evaluations}

    def tasks(self) -> dict[tuple[str, str], Metric]:
        """The latest value of each task and metric."""
        return {
            (task, name): metric
            for evaluation in self.results.evaluations
            for task, metrics in (evaluation.tasks or {}).items()
            for name, metric in metrics.items()
        }

    def decode_speeds(self) -> tuple[Speed, Speed] | None:
        """The speeds of the dense and the packed model while decoding, of the latest benchmark that has them."""
        return next((speeds for each in reversed(self.results.benchmarks) if (speeds := each.decoding)), None)


def read_checkpoint(directory: str | os.PathLike[str], name: str | os.PathLike[str] | None = None) -> Checkpoint:
    """What a pruned checkpoint says of itself; ``name`` replaces the directory in commands.

    Raises:
        StorageError: it is not a directory, was not written by ``prune``, or a file in it cannot be read.
    """
    place = Path(directory).expanduser()
    if not os.path.isfile(place / PRUNING):  # also for a name that is too long
        advice = "give a directory that `sparsellm prune` wrote, or its packed form"
        raise StorageError(f"{shown(str(directory))} has no {PRUNING}; {advice}")
    pruning = read_pruning(place)
    if not pruning.linears:
        raise StorageError(f"{place / PRUNING}: linears is []; there is nothing to report")
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    return Checkpoint(place, os.fspath(directory if name is None else name), pruning, read_results(place), size)
