"""Records of measurements: when and where, and the speed of a packed model next to a dense one."""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from sparsellm.machine import machine_name, resolve_device
from sparsellm.progress import Progress, ProgressCallback, ignore
from sparsellm.records import Benchmark, Stamp
from sparsellm.version import __version__
from sparsepack import bench


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
    """Same as :func:`sparsepack.bench.compare`, as a record."""
    measured_on = resolve_device(device)

    def tell(phase: str, done: float, total: float, detail: str) -> None:
        progress(Progress(phase, done, total=total, detail=detail))

    compared = bench.compare(
        packed,
        dense,
        device=device,
        progress=tell,
        **settings,
    )
    return Benchmark(**asdict(compared), **vars(stamp(measured_on)))
