"""Blocks of GGUF: 32 numbers of a row and their scale, as ``ggml-common.h`` of llama.cpp lays them out."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from sparsepack.grids import Grid

SIZE = 32  # numbers in a block
TYPES = {4: "Q4_0", 8: "Q8_0"}  # by bits


def block_type(grid: Grid) -> str | None:
    """The type of GGUF that has this grid; None if there is none."""
    return TYPES.get(grid.bits) if grid.group == SIZE else None


def to_blocks(codes: Tensor, scales: Tensor, bits: int) -> np.ndarray:
    """Blocks as uint8 ``(out, bytes of a row)``: the scale in fp16, then the numbers.

    Q4_0 stores number + 8; the low nibble of byte ``j`` is number ``j`` of the block, the high one number ``j + 16``.
    Q8_0 stores one byte a number.

    Args:
        codes: int8 ``(out, in)``; ``in`` is a multiple of 32.
        scales: ``(out, in/32)``, which fp16 has exactly.
        bits: 4 or 8.
    """
    numbers = codes.numpy().reshape(len(codes), -1, SIZE)
    if bits == 4:
        shifted = (numbers + 8).astype(np.uint8)
        numbers = shifted[..., : SIZE // 2] | (shifted[..., SIZE // 2 :] << 4)
    halves = scales.half().contiguous().numpy().view(np.uint8).reshape(*numbers.shape[:2], 2)
    return np.concatenate((halves, numbers.view(np.uint8)), axis=-1).reshape(len(codes), -1)
