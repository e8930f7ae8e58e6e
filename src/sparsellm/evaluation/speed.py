"""Records of measurements: when and where, and the speed of a packed model next to a dense one."""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from sparsellm.errors import ModelError
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.inputs import read_object
from sparsellm.machine import machine_name, resolve_device
from sparsellm.progress import Progress, ProgressCallback, ignore
from sparsellm.records import Benchmark, Stamp
from sparsellm.version import __version__
from sparsepack import bench
from sparsepack.checkpoint import is_packed


def stamp(device: torch.device) -> Stamp:
    """The stamp of a measurement that ends now, on this device."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Stamp(sparsellm=__version__, machine=machine_name(device), date=date)


def compared_speed(
    packed: str | os.PathLike[str],
    dense: str | os.PathLike[str] | None = None,
    *,
    progress: ProgressCallback = ignore,
    device: str = "cpu",
    **settings: Any,
) -> Benchmark:
    """Same as ``sparsepack.bench.compare`` for models by name, as a record. Raises ModelError if one is not found,
    or the first is not packed."""
    measured_on = resolve_device(device)
    place = checkpoint_directory(os.fspath(packed))
    if not is_packed(read_object(place / "config.json")):
        raise ModelError(
            f"{packed} is not packed; pack it first: sparsellm pack {packed} --out DIR"
        )
    if dense is not None:
        dense = checkpoint_directory(os.fspath(dense), "dense")

    def tell(phase: str, done: float, total: float, detail: str) -> None:
        progress(Progress(phase, done, total=total, detail=detail))

    compared = bench.compare(place, dense, device=device, progress=tell, **settings)
    return Benchmark(**asdict(compared), **vars(stamp(measured_on)))
