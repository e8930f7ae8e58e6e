"""Running a function in several processes that have joined by gloo. What is run lives in a module, not in a test."""

from __future__ import annotations

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
