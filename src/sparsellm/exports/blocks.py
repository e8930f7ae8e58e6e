"""Blocks of GGUF, numbers of a row and their scales, as ``ggml-common.h`` of llama.cpp lays them out."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from sparsepack.grid import split
from sparsepack.grids import BLOCK, GGUF, Grid, grid_for
from sparsepack.minima import split_lines

SUPER = 256  # numbers in a block of the types that end in K, and of IQ4_XS
TYPES = {4: "Q4_0", 8: "Q8_0"}  # types of the grids of compressed-tensors, by bits


def block_type(grid: Grid) -> str | None:
    """The type of GGUF that has this grid; None if there is none."""
    if grid.form == GGUF:
        return grid.name.upper()
    if grid.group == BLOCK:
        return TYPES.get(grid.bits)
    return None


def to_blocks(codes: Tensor, scales: Tensor, grid: Grid) -> np.ndarray:
    """The numbers ``codes`` of a grid, int8 ``(out, in)``, and scales as ``sparsepack.grid.codes_of`` has them, as
    blocks: uint8 ``(out, bytes of a row)``. The blocks are those of the grid for rows of this length."""
    grid = grid_for(grid.name, codes.shape[1])
    rows = len(codes)
    if grid.uneven:
        levels = torch.tensor(grid.numbers, dtype=torch.int8)
        codes = torch.bucketize(codes, levels)  # their places
    elif grid.bits < 8 and grid.name != "q3_k" and not grid.minima:
        codes = codes - grid.lowest
    numbers = codes.numpy().astype(np.int8).reshape(-1, grid.columns)
    if not grid.parts:
        units = scales.reshape(-1, 1)
        pieces = [_halves(units), *_simple(numbers, grid)]
    elif grid.minima:
        pieces = _with_minima(numbers.view(np.uint8), scales, grid)
    else:
        units, steps = split(scales, grid)
        parts = steps.numpy().astype(np.int8)
        form = {"q6_k": _q6_k, "q3_k": _q3_k, "iq4_xs": _iq4_xs}[grid.name]
        pieces = form(numbers.view(np.uint8), parts, _halves(units))
    flat = [piece.reshape(len(numbers), -1).view(np.uint8) for piece in pieces]
    return np.concatenate(flat, axis=1).reshape(rows, -1)


def _halves(scales: Tensor) -> np.ndarray:
    """Scales as the bytes of fp16, which has them exactly."""
    return scales.half().contiguous().numpy().view(np.uint8)


def _simple(numbers: np.ndarray, grid: Grid) -> list[np.ndarray]:
    """The numbers of Q4_0, Q5_0, Q8_0 and IQ4_NL, from 0 on but for Q8_0, ``(blocks, 32)``. Q5_0 has the fifth bits
    first."""
    if grid.bits == 8:
        return [numbers]
    pairs = _pairs(numbers.view(np.uint8), BLOCK)
    if grid.bits == 4:
        return [pairs]
    return [np.packbits(numbers >> 4, axis=1, bitorder="little"), pairs]


def _pairs(numbers: np.ndarray, together: int) -> np.ndarray:
    """The low four bits of numbers. A run of ``together`` numbers takes half as many bytes: byte ``j`` has number ``j``
    and, above it, the number that is half a run later."""
    halves = (numbers & 15).reshape(len(numbers), -1, 2, together // 2)
    pairs: np.ndarray = halves[:, :, 0] | halves[:, :, 1] << 4
    return pairs


def _q6_k(
    numbers: np.ndarray, parts: np.ndarray, units: np.ndarray
) -> list[np.ndarray]:
    """Numbers 0 … 63 ``(blocks, 256)``, scales int8 ``(blocks, 16)`` and units as bytes: low four bits, high two,
    scales, unit."""
    low = numbers.reshape(-1, 2, 128)
    fours = [_pairs(low[:, half], 128) for half in range(2)]
    return [np.concatenate(fours, axis=1), _twos(numbers >> 4), parts, units]


def _twos(bits: np.ndarray) -> np.ndarray:
    """Two bits of each of 256 numbers. Each half takes 32 bytes: byte ``j`` has those of ``j``, ``j + 32``, ``j + 64``
    and ``j + 96``."""
    quarters = (bits & 3).reshape(len(bits), 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(4, 1)
    twos: np.ndarray = np.bitwise_or.reduce(quarters << shifts, axis=2)
    return twos


def _q3_k(
    numbers: np.ndarray, parts: np.ndarray, units: np.ndarray
) -> list[np.ndarray]:
    """Numbers -4 … 3 as bytes ``(blocks, 256)``, scales ``(blocks, 16)`` and units: whether numbers are not negative,
    byte ``j`` for ``j``, ``j + 32`` and so on; their low two bits; low four bits of scales, high two; unit."""
    above = (numbers < 128).astype(np.uint8).reshape(-1, 8, 32)
    high = np.packbits(above, axis=1, bitorder="little")
    scales = (parts + 32).view(np.uint8)
    low = _pairs(scales, 16)
    shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(4, 1)
    top = np.bitwise_or.reduce((scales >> 4).reshape(-1, 4, 4) << shifts, axis=1)
    return [high, _twos(numbers), low, top, units]


def _iq4_xs(
    numbers: np.ndarray, parts: np.ndarray, units: np.ndarray
) -> list[np.ndarray]:
    """Places of numbers ``(blocks, 256)``, scales ``(blocks, 8)`` and units: unit, high two bits of scales, low four,
    places."""
    scales = (parts + 32).view(np.uint8)
    shifts = np.arange(0, 16, 2, dtype=np.uint16)
    high = (scales >> 4).astype(np.uint16) << shifts
    top = np.bitwise_or.reduce(high, axis=1, keepdims=True)
    low = (scales[:, 0::2] & 15) | (scales[:, 1::2] & 15) << 4
    return [units, top.astype("<u2").view(np.uint8), low, _pairs(numbers, BLOCK)]


def _with_minima(numbers: np.ndarray, lines: Tensor, grid: Grid) -> list[np.ndarray]:
    """Numbers ``(blocks, 256)`` of Q2_K or Q4_K, and scales and minima, ``(out, groups, 2)``."""
    units, steps = split_lines(lines[..., 0], grid)
    of_minima, depths = split_lines(-lines[..., 1], grid)
    scales = steps.numpy().astype(np.uint8)
    minima = depths.numpy().astype(np.uint8)
    halves = [_halves(units), _halves(of_minima)]
    if grid.bits == 2:
        return [scales | minima << 4, _twos(numbers), *halves]
    # six bits each; of the last four, the high two lie above the first four
    first = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scales, minima)]
    last = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return [*halves, *first, last, _pairs(numbers, 64)]


def quantised(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Rows ``(rows, columns)`` in fp32 in a type of GGUF, as uint8 or floating point; also Q6_K, unlike gguf-py."""
    if kind != gguf.GGMLQuantizationType.Q6_K:
        return gguf.quantize(values, kind)
    return np.concatenate(
        [
            _to_q6_k(values[start : start + 4096])
            for start in range(0, len(values), 4096)
        ]
    )


def _to_q6_k(values: np.ndarray) -> np.ndarray:
    """Q6_K: 256 numbers, -32 … 31, in 16 parts with scales of int8 times one in fp16; the largest magnitude is -32."""
    parts = values.reshape(-1, 16, 16)
    scales = _extreme(parts) / -32  # (blocks, 16, 1)
    unit = (_extreme(scales[..., 0]) / -128).astype(np.float16)  # (blocks, 1)
    levels = np.clip(_rounded(scales[..., 0], unit.astype(np.float32)), -128, 127)
    steps = (unit.astype(np.float32) * levels)[..., None]
    numbers = (np.clip(_rounded(parts, steps), -32, 31) + 32).astype(np.uint8)
    pieces = _q6_k(
        numbers.reshape(-1, SUPER), levels.astype(np.int8), unit.view(np.uint8)
    )
    return np.concatenate(
        [piece.reshape(len(parts), -1).view(np.uint8) for piece in pieces], axis=1
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
