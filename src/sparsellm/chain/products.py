"""Matrix products of fp32 tensors in bf16, for passes that only run blocks.

Processors with bf16 units (AMX, AVX-512 BF16) multiply fp32 factors rounded to bf16 several times as fast, and add up
in fp32. Hidden states and weights stay fp32. Statistics and solvers always use full fp32 products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bf16_products(active: bool) -> Iterator[None]:
    """Allows torch to multiply fp32 matrices in bf16 (on CUDA: TF32 or bf16) until the context ends.

    With ``active`` false, nothing changes.
    """
    if not active:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def bf16_is_native() -> bool:
    """Whether this CPU has instructions for products in bf16."""
    probes = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(probe is not None and probe() for probe in probes)  # no, if torch is too old to have the probes
