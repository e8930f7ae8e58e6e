"""The result of a run, the versions of libraries, and the command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from pydantic import ConfigDict, Field, JsonValue
from transformers import PreTrainedModel

from sparsellm import __version__
from sparsellm.inputs import without_folders
from sparsellm.interrupts import command_line
from sparsellm.machine import machine_name, processor_name
from sparsellm.recipe import Recipe
from sparsellm.records import (
    KEEP,
    MIXED,
    OWN,
    HeldOut,
    LinearResult,
    Memory,
    Pruning,
    RunRecord,
    SweepPass,
)
from sparsellm.report.document import REPORT, summary_html
from sparsepack.grids import GRIDS


def versions() -> dict[str, str]:
    """The versions of Python and the libraries that affect a result."""
    return {
        "sparsellm": __version__,
        "python": platform.python_version(),
        "torch": str(
            torch.__version__
        ),  # with the build, which the package's metadata may omit
        **{
            name: importlib.metadata.version(name)
            for name in ("transformers", "safetensors", "numpy")
        },
    }


def environment(device: torch.device | None = None) -> dict[str, str]:
    """The system, processor, memory and threads of this machine, and the GPU if that is the device of the run."""
    gpu = "none"
    if device is not None and device.type == "cuda":
        gpu = machine_name(device)
    return {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": processor_name(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "threads": str(torch.get_num_threads()),
        "gpu": gpu,
    }


def rounded_to(linears: Sequence[LinearResult]) -> tuple[str, str]:
    """What values of all these linears are rounded to, a type and a grid as in ``RunRecord``; ``mixed`` for those
    that differ."""
    named = {linear.values for linear in linears}
    if named == {KEEP} or not named:
        return KEEP, OWN
    values = {_type_of(name) for name in named}
    grids = {name if name in GRIDS else OWN for name in named}
    return _only(values), _only(grids)


def _type_of(values: str) -> str:
    """The type of values on a grid, or the type itself."""
    grid = GRIDS.get(values)
    return values if grid is None else grid.values


def _only(names: set[str]) -> str:
    """The one of the names, or ``mixed`` for several."""
    return min(names) if len(names) == 1 else MIXED


@dataclass(frozen=True)
class Measured:
    """What survey, walk and sweep did."""

    allocation: dict[str, JsonValue]  # the report of the allocation; empty for uniform
    heads: dict[str, str]  # types of embedding and head by tensor
    linears: list[LinearResult]
    sweeps: list[SweepPass]  # the divergence from the dense model after each pass
    held_out: HeldOut | None
    unmeasured: list[str]  # a warning if that is None
    memory: Memory
    peak_rss: int  # bytes, of earlier processes


class PruneResult(RunRecord):
    """The result of a pruning run: its record, and what only the process that ran it has."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    path: Path | None = None  # the checkpoint; None if pruned in memory only
    recipe: Recipe  # all settings, as used
    # pruned, if it is in memory
    model: PreTrainedModel | None = Field(None, exclude=True)
    resumed: int = Field(0, exclude=True)  # blocks that an earlier process had finished
    versions: dict[str, str] = Field(default_factory=versions)
    environment: dict[str, str] = Field(default_factory=environment)
    # Names in a command may not be UTF-8, and a record must be.
    command: str = Field(
        default_factory=lambda: command_line().encode(errors="replace").decode()
    )

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over every matrix of the blocks, pruned or not."""
        return self.matrices.sparsity

    @property
    def record(self) -> Pruning:
        """The contents of ``pruning.json``, where paths in recipe and command have no folders."""
        command = shlex.join(map(without_folders, shlex.split(self.command)))
        recipe = self.recipe.named.model_dump(mode="json")
        values = self.model_dump(mode="json", exclude={"path"})
        return Pruning.model_validate({**values, "recipe": recipe, "command": command})

    @property
    def report(self) -> Path | None:
        """The report in HTML in the checkpoint; None if there is none."""
        if self.path is None or not (self.path / REPORT).is_file():
            return None
        return self.path / REPORT

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        return summary_html(self.record, self.path)

    def to_dict(self) -> dict[str, JsonValue]:
        """Record and path as plain JSON values, as in ``--json``."""
        return {
            "path": str(self.path) if self.path is not None else None,
            **self.record.model_dump(mode="json"),
        }
