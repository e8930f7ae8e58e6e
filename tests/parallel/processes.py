"""Running a function in several processes that have joined by gloo. What is run lives in a module, not in a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests import killing

LIMIT = 400  # seconds, far beyond what any test here takes: one that hangs is ended, not waited for


def run_in(
    size: int, function: Callable[..., None], folder: Path, *arguments: Any
) -> None:
    """Calls ``function(folder, *arguments)`` in each of ``size`` joined processes; fails if one of them does."""
    process = partial(killing.context().Process, target=_join, daemon=True)
    workers = [
        process(args=(rank, size, function, folder, *arguments)) for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(LIMIT)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert codes == [0] * size


def _join(
    rank: int, size: int, function: Callable[..., None], folder: Path, *arguments: Any
) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / f'store-{size}'}"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=size
    )
    function(folder, *arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


LIMIT = 300  # seconds, far beyond what any run here takes: one that hangs is ended, not waited for


def by_torchrun(size: int, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={size}",
    ]
    command += [f"--max-restarts={restarts}"] if restarts else []
    return subprocess.Popen(
        [*command, "-m", "sparsellm", *arguments],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=LIMIT)
    finally:
        process.kill()
