"""What the processor of one process does in a second: measured here, or by the data sheet of a GPU."""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sparsellm.errors import RecipeError, nearest
from sparsellm.machine import machine_name

EFFICIENCY = 0.4  # share of a data sheet's operations and bytes a second that is assumed to be reached
ROWS, NARROWEST, WIDEST = (
    512,
    256,
    4096,
)  # a measured product, whose matrix is as wide as the model
ELEMENTS = 1 << 24  # a measured sum: more than caches hold
ROUNDS = 6  # the fastest counts: the first starts threads and libraries, others wait for what else the machine does


@dataclass(frozen=True)
class Speeds:
    """Operations and bytes a second of one process."""

    name: str  # the machine or GPU
    blocks: float  # operations in products when blocks run, which may be in bf16
    exact: float  # operations in products of statistics and solvers, in fp32
    memory: float  # bytes read or written in the memory that blocks run in
    link: float = math.inf  # bytes between host and GPU
    gpu_bytes: int = 0  # memory of the GPU; 0 on a CPU
    exchanged: float = 4e9  # bytes between processes, here those on CPUs


def _gpu(
    name: str,
    blocks: float,
    exact: float,
    memory: float,
    links: tuple[float, float],
    size: float,
) -> Speeds:
    """A GPU by TFLOP/s in bf16 and fp32, GB/s of its memory and its links to the host and to other GPUs, and GB."""
    tera, giga = EFFICIENCY * 1e12, EFFICIENCY * 1e9
    to_host, to_gpus = (giga * link for link in links)
    return Speeds(
        name,
        tera * blocks,
        tera * exact,
        giga * memory,
        to_host,
        int(1e9 * size),
        to_gpus,
    )


# Peaks of dense products with fp32 sums; fp32 is that without TF32. The link to the host is PCI Express of 16 lanes,
# generation 4 or 5; that to other GPUs NVLink, on MI300X Infinity Fabric, or the same; all one way. By copies of
# NVIDIA's data sheets: A100 (nvidia-a100-datasheet-us-nvidia-1758950-r4), H100 SXM (nvidia-tensor-core-gpu-datasheet),
# L4, L40S; H200 computes as H100 does. By lists of others, since we read no page from the vendor: RTX 3090 and 4090
# (white papers of GA102 and Ada have them), MI300X (AMD's data sheet).
GPUS = {
    "a100": _gpu("A100 80GB", 312, 19.5, 2039, (32, 300), 80),
    "h100": _gpu("H100", 989, 67, 3350, (64, 450), 80),
    "h200": _gpu("H200", 989, 67, 4800, (64, 450), 141),
    "l4": _gpu("L4", 121, 30.3, 300, (32, 32), 24),
    "l40s": _gpu("L40S", 362, 91.6, 864, (32, 32), 48),
    "mi300x": _gpu("MI300X", 1307, 163, 5300, (64, 448), 192),
    "rtx3090": _gpu("RTX 3090", 71, 35.6, 936, (32, 32), 24),
    "rtx4090": _gpu("RTX 4090", 165, 82.6, 1008, (32, 32), 24),
}


def named(gpu: str) -> Speeds:
    """The speeds of a GPU in the table. Raises RecipeError if it is not there."""
    if gpu.lower() not in GPUS:
        raise RecipeError(
            f"GPU {gpu!r:.100} is not in the table; {nearest(gpu[:100], GPUS)}"
        )
    return GPUS[gpu.lower()]


@cache
def measured(device: torch.device, dtype: torch.dtype, width: int) -> Speeds:
    """The speeds of a device for a model of this width whose blocks multiply in ``dtype``, in three seconds at most."""
    values = torch.ones(ELEMENTS, device=device)
    gpu = device.type != "cpu"
    there = (
        4 * ELEMENTS / _least(lambda: torch.ones(ELEMENTS).to(device))
        if gpu
        else math.inf
    )
    size = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else 0
    )
    blocks, exact = (
        _products(device, kind, min(max(width, NARROWEST), WIDEST))
        for kind in (dtype, torch.float32)
    )
    memory = 8 * ELEMENTS / _least(lambda: values.add_(values, alpha=0.5))
    return Speeds(
        machine_name(device),
        blocks,
        exact,
        memory,
        there,
        size,
        there if gpu else Speeds.exchanged,
    )


def _products(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Operations a second in a large matrix product."""
    left = torch.ones(ROWS, width, device=device, dtype=dtype)
    right = torch.ones(width, width, device=device, dtype=dtype)
    return 2.0 * ROWS * width * width / _least(lambda: left @ right)


def _least(work: Callable[[], Tensor]) -> float:
    """The least seconds of some rounds."""
    return max(
        1e-9,
        min(timeit.repeat(lambda: work().flatten()[0].item(), repeat=ROUNDS, number=1)),
    )
