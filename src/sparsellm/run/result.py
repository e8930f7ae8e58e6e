"""The result of a run: its report, the versions of libraries, and the command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from sparsellm import __version__
from sparsellm.machine.devices import machine_name, processor_name
from sparsellm.methods import LinearResult
from sparsellm.patterns import parse_pattern
from sparsellm.recipe import Recipe
from sparsellm.report.document import REPORT
from sparsellm.report.notebook import figure_of, summary_html
from sparsellm.run.counts import DenseMatrix, Totals, totals
from sparsellm.run.magnitudes import Magnitudes
from sparsellm.run.memory import MemoryPlan
from sparsellm.storage.results import Stamp
from sparsellm.sweep.whole_model import Pass
from sparsepack.layout import predicted_bytes


def versions() -> dict[str, str]:
    """The versions of Python and the libraries that affect a result."""
    packages = ("transformers", "safetensors", "numpy")
    return {
        "sparsellm": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build, which the package's metadata may omit
        **{name: importlib.metadata.version(name) for name in packages},
    }


def environment() -> dict[str, str]:
    """The system, processor, memory and threads of this machine."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": processor_name(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def stamp(device: torch.device) -> Stamp:
    """The stamp of a measurement that ends now, on this device."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"sparsellm": __version__, "machine": machine_name(device), "date": date}


def command_line() -> str:
    """The current command line, quoted for a shell."""
    program = Path(sys.argv[0])
    module = program.parts[-2:] == ("sparsellm", "__main__.py")  # python -m sparsellm
    return shlex.join(["sparsellm" if module else program.name, *sys.argv[1:]])


@dataclass
class PruneResult:
    """The result of a pruning run.

    Attributes:
        path: the finished checkpoint, or None if the model was pruned in memory only.
        model: the pruned model if it is in memory, else None.
        recipe: all settings, as used.
        linears: one record for each pruned linear.
        dense: matrices of the blocks that were not pruned: name, shape, zeros, and the reason.
        base: the hub id of the dense model as ``model`` and the license that its card states, where they are known.
        seconds: wall-clock seconds of each phase; ``prune/statistics`` and ``prune/solve`` are parts of ``prune``.
        peak_rss: the peak memory of one process, in this run or an earlier start of it, in bytes.
        calibration_tokens: tokens of the statistics.
        calibration_bos: whether every calibration window begins with BOS: ``yes`` or ``no``, or ``given`` for token ids
            that the user passed.
        versions: of Python and the libraries that affect the result.
        warnings: messages for the user.
        command: the command line.
        memory: the memory prediction of the first process.
        resumed: the number of blocks that an earlier process had finished.
        sweeps: the divergence from the dense model after each sweep of the whole model; empty without sweeps.
        allocation: for per-layer sparsities that are not uniform: ``name``, and the allocation's own report.
        processes: the number of processes.
        base: the dense model: ``name``, ``digest`` of its config and weights, and ``bytes`` of its weights.
        environment: of the machine.
        predicted: seconds of each step, as predicted when the run began; empty if nothing was.
        peaks: the peak memory of this process, in bytes, when each phase last ended.
        stages: records of the stages before the last: ``sparsity_pruned``, ``sweeps``, ``seconds``, ``peak_rss_bytes``.
        magnitudes: histograms of the weights by kind of linear, ``before`` and ``after``; see
            :mod:`sparsellm.run.magnitudes`.
    """

    path: Path | None
    model: PreTrainedModel | None
    recipe: Recipe
    linears: list[LinearResult]
    seconds: dict[str, float]
    peak_rss: int
    calibration_tokens: int
    calibration_bos: str = "given"
    versions: dict[str, str] = field(default_factory=versions)
    warnings: list[str] = field(default_factory=list)
    command: str = field(default_factory=command_line)
    memory: MemoryPlan | None = None
    resumed: int = 0
    sweeps: list[Pass] = field(default_factory=list)
    allocation: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    dense: list[DenseMatrix] = field(default_factory=list)
    base: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=environment)
    predicted: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    magnitudes: Magnitudes = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def zeros(self) -> int:
        """Zeros in all pruned linears."""
        return sum(linear.zeros for linear in self.linears)

    @property
    def weights(self) -> int:
        """Weights in all pruned linears."""
        return sum(linear.shape[0] * linear.shape[1] for linear in self.linears)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of a weight of the pruned linears, as ``pack`` will write them in the type to which the values were
        rounded; None if they were kept."""
        if self.recipe.values == "keep" or not self.weights:
            return None
        sizes = (
            predicted_bytes(
                linear.shape,
                linear.zeros,
                self.recipe.values,
                parse_pattern(linear.pattern) if linear.pattern is not None else None,
                exponents=bool(linear.exponents),
            )
            for linear in self.linears
        )
        return 8 * sum(sizes) / self.weights

    @property
    def matrices(self) -> Totals:
        """Zeros and weights over every matrix of the blocks, pruned or not."""
        return totals(self.linears, self.dense)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over every matrix of the blocks, pruned or not."""
        return self.matrices.sparsity

    @property
    def sparsity_pruned(self) -> float:
        """Fraction of zeros over the pruned linears alone; the recipe's ``sparsity`` sets this one."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def report(self) -> Path | None:
        """The report in HTML beside the checkpoint; None if there is none."""
        report = self.path / REPORT if self.path is not None else None
        return report if report is not None and report.is_file() else None

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        return summary_html(self.to_dict())

    def plot(self) -> Any:
        """A ``plotly.graph_objects.Figure`` with sparsity and error of each linear as heat maps.

        Raises:
            MissingExtraError: plotly is not installed.
        """
        return figure_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values, as in ``--json`` and ``pruning.json``."""
        return {
            "format": 1,
            "path": str(self.path) if self.path else None,
            "base": self.base,
            "sparsity_asked": self.recipe.sparsity,
            "sparsity_reached": self.sparsity,
            "sparsity_pruned": self.sparsity_pruned,
            "zeros": self.zeros,
            "values": self.recipe.values,
            "bits_per_weight": self.bits_per_weight,
            "weights": self.weights,
            "matrices": asdict(self.matrices),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_rss_bytes": self.peak_rss,
            "predicted_seconds": {name: round(value, 3) for name, value in self.predicted.items()},
            "peaks_bytes": self.peaks,
            "memory": self.memory.to_dict() if self.memory else None,
            "calibration_tokens": self.calibration_tokens,
            "calibration_bos": self.calibration_bos,
            "processes": self.processes,
            "seed": self.recipe.seed,
            "recipe": self.recipe.model_dump(),
            "versions": self.versions,
            "environment": self.environment,
            "command": self.command,
            "warnings": self.warnings,
            "allocation": self.allocation,
            "sweeps": [asdict(record) for record in self.sweeps],
            "stages": self.stages,
            "magnitudes": self.magnitudes,
            "linears": [linear.to_dict() for linear in self.linears],
            "dense": [matrix.to_dict() for matrix in self.dense],
        }
