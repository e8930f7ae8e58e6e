"""What the processor of one process does in a second: measured here, or by the data sheet of a card."""

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
ROWS, NARROWEST, WIDEST = 512, 256, 4096  # a measured product, whose matrix is as wide as the model
ELEMENTS = 1 << 24  # a measured sum: more than caches hold
ROUNDS = 6  # the fastest counts: the first starts threads and libraries, others wait for what else the machine does


@dataclass(frozen=True)
class Speeds:
    """Operations and bytes a second of one process."""

    name: str  # the machine or card
    blocks: float  # operations in products when blocks run, which may be in bf16
    exact: float  # operations in products of statistics and solvers, in fp32
    memory: float  # bytes read or written in the memory that blocks run in
    link: float = math.inf  # bytes between host and card
    card_bytes: int = 0  # memory of the card; 0 on a CPU
    exchanged: float = 4e9  # bytes between processes, here those on CPUs


def _card(name: str, blocks: float, exact: float, memory: float, links: tuple[float, float], size: float) -> Speeds:
    """A card by TFLOP/s in bf16 and fp32, GB/s of its memory and its links to the host and to other cards, and GB."""
    tera, giga = EFFICIENCY * 1e12, EFFICIENCY * 1e9
    to_host, to_cards = (giga * link for link in links)
    return Speeds(name, tera * blocks, tera * exact, giga * memory, to_host, int(1e9 * size), to_cards)


# Peaks of dense products with fp32 sums; fp32 is that without TF32. The link to the host is PCI Express of 16 lanes,
# generation 4 or 5; that to other cards NVLink, on MI300X Infinity Fabric, or the same; all one way. By copies of
# NVIDIA's data sheets: A100 (nvidia-a100-datasheet-us-nvidia-1758950-r4), H100 SXM (nvidia-tensor-core-gpu-datasheet),
# L4, L40S; H200 computes as H100 does. By lists of others, since we read no page from the vendor: RTX 3090 and 4090
# (white papers of GA102 and Ada have them), MI300X (AMD's data sheet).
CARDS = {
    "a100": _card("A100 80GB", 312, 19.5, 2039, (32, 300), 80),
    "h100": _card("H100", 989, 67, 3350, (64, 450), 80),
    "h200": _card("H200", 989, 67, 4800, (64, 450), 141),
    "l4": _card("L4", 121, 30.3, 300, (32, 32), 24),
    "l40s": _card("L40S", 362, 91.6, 864, (32, 32), 48),
    "mi300x": _card("MI300X", 1307, 163, 5300, (64, 448), 192),
    "rtx3090": _card("RTX 3090", 71, 35.6, 936, (32, 32), 24),
    "rtx4090": _card("RTX 4090", 165, 82.6, 1008, (32, 32), 24),
}


def named(card: str) -> Speeds:
    """The speeds of a card in the table. Raises RecipeError if it is not there."""
    if card.lower() not in CARDS:
        raise RecipeError(f"card {card!r:.100} is not in the table; {nearest(card[:100], CARDS)}")
    return CARDS[card.lower()]


@cache
def measured(device: torch.device, dtype: torch.dtype, width: int) -> Speeds:
    """The speeds of a device for a model of this width whose blocks multiply in ``dtype``, in three seconds at most."""
    values = torch.ones(ELEMENTS, device=device)
    card = device.type != "cpu"
    there = 4 * ELEMENTS / _least(lambda: torch.ones(ELEMENTS).to(device)) if card else math.inf
    size = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    blocks, exact = (_products(device, kind, min(max(width, NARROWEST), WIDEST)) for kind in (dtype, torch.float32))
    memory = 8 * ELEMENTS / _least(lambda: values.add_(values, alpha=0.5))
    return Speeds(machine_name(device), blocks, exact, memory, there, size, there if card else Speeds.exchanged)


def _products(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Operations a second in a large matrix product."""
    left = torch.ones(ROWS, width, device=device, dtype=dtype)
    right = torch.ones(width, width, device=device, dtype=dtype)
    return 2.0 * ROWS * width * width / _least(lambda: left @ right)


def _least(work: Callable[[], Tensor]) -> float:
    """The least seconds of some rounds."""
    return max(1e-9, min(timeit.repeat(lambda: work().flatten()[0].item(), repeat=ROUNDS, number=1)))
