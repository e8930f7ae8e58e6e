"""Blocks of GGUF, numbers of a row and their scales, as ``ggml-common.h`` of llama.cpp lays them out."""

from __future__ import annotations

import gguf
import numpy as np
from torch import Tensor

from sparsepack.grids import Grid

SIZE = 32  # numbers in a block of Q4_0 or Q8_0
TYPES = {4: "Q4_0", 8: "Q8_0"}  # by bits


def block_type(grid: Grid) -> str | None:
    """The type of GGUF that has this grid; None if there is none."""
    if grid.group == SIZE:
        return TYPES.get(grid.bits)
    return None


def to_blocks(codes: Tensor, scales: Tensor, bits: int) -> np.ndarray:
    """Blocks as uint8 ``(out, bytes of a row)``: the scale in fp16, then the numbers, of ``codes`` int8 ``(out, in)``,
    where ``in`` is a multiple of 32, and ``scales (out, in/32)``, which fp16 has exactly.

    Q4_0 stores number + 8; the low nibble of byte ``j`` is number ``j`` of the block, the high one number ``j + 16``.
    Q8_0 stores one byte a number."""
    numbers = codes.numpy().reshape(len(codes), -1, SIZE)
    if bits == 4:
        shifted = (numbers + 8).astype(np.uint8)
        numbers = shifted[..., : SIZE // 2] | (shifted[..., SIZE // 2 :] << 4)
    halves = (
        scales.half().contiguous().numpy().view(np.uint8).reshape(*numbers.shape[:2], 2)
    )
    return np.concatenate((halves, numbers.view(np.uint8)), axis=-1).reshape(
        len(codes), -1
    )


def quantised(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Rows ``(rows, columns)`` in fp32 in a type of GGUF, as uint8 or floating point; also Q6_K, unlike gguf-py."""
    if kind != gguf.GGMLQuantizationType.Q6_K:
        return gguf.quantize(values, kind)
    return np.concatenate(
        [_q6_k(values[start : start + 4096]) for start in range(0, len(values), 4096)]
    )


def _q6_k(values: np.ndarray) -> np.ndarray:
    """Q6_K: 256 numbers, -32 … 31, in 16 parts with scales of int8 times one in fp16; the largest magnitude is -32."""
    parts = values.reshape(-1, 16, 16)
    scales = _extreme(parts) / -32  # (blocks, 16, 1)
    unit = (_extreme(scales[..., 0]) / -128).astype(np.float16)  # (blocks, 1)
    levels = np.clip(_rounded(scales[..., 0], unit.astype(np.float32)), -128, 127)
    steps = (unit.astype(np.float32) * levels)[..., None]
    numbers = (
        (np.clip(_rounded(parts, steps), -32, 31) + 32)
        .astype(np.uint8)
        .reshape(-1, 2, 4, 32)
    )
    low = numbers & 15
    high = numbers >> 4
    fours = low[:, :, :2] | low[:, :, 2:] << 4
    twos = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    pieces = (fours, twos, levels.astype(np.int8).view(np.uint8), unit.view(np.uint8))
    return np.concatenate(
        [piece.reshape(len(parts), -1) for piece in pieces], axis=1
    ).reshape(len(values), -1)


def _extreme(values: np.ndarray) -> np.ndarray:
    """The value of largest magnitude along the last axis, which stays."""
    return np.take_along_axis(values, np.abs(values).argmax(-1, keepdims=True), -1)


def _rounded(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The nearest whole numbers of steps; 0 where a step is 0."""
    numbers: np.ndarray = np.rint(
        np.divide(values, steps, out=np.zeros_like(values), where=steps != 0)
    )
    return numbers
