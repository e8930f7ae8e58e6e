"""Blocks of GGUF, numbers of a row and their scales, as ``ggml-common.h`` of llama.cpp lays them out."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from sparsepack.codes import Levels, anchors, whole_numbers
from sparsepack.grid import in_units, split
from sparsepack.grids import BLOCK, GGUF, GRIDS, Grid, grid_for
from sparsepack.minima import split_lines

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
    elif grid.bits < 8:
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
    return _joined(pieces, rows)


def _joined(pieces: list[np.ndarray], rows: int) -> np.ndarray:
    """The bytes of rows from the pieces of their blocks, ``(blocks, …)``, which follow each other in each block."""
    flat = [piece.reshape(len(piece), -1).view(np.uint8) for piece in pieces]
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
    return [_pairs(numbers, 128), _twos(numbers >> 4, 128), parts, units]


def _twos(numbers: np.ndarray, together: int) -> np.ndarray:
    """The low two bits of numbers. A run of ``together`` numbers takes a quarter as many bytes: byte ``j`` has number
    ``j`` and, above it, those that are one, two and three quarters of a run later."""
    quarters = (numbers & 3).reshape(len(numbers), -1, 4, together // 4)
    shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(4, 1)
    twos: np.ndarray = np.bitwise_or.reduce(quarters << shifts, axis=2)
    return twos


def _q3_k(
    numbers: np.ndarray, parts: np.ndarray, units: np.ndarray
) -> list[np.ndarray]:
    """Numbers 0 … 7 ``(blocks, 256)``, scales ``(blocks, 16)`` and units: high bits of numbers, byte ``j`` for ``j``,
    ``j + 32`` and so on; their low two bits; low four bits of scales, high two; unit."""
    eighths = (numbers >> 2).reshape(-1, 8, 32)
    high = np.packbits(eighths, axis=1, bitorder="little")
    scales = (parts + 32).view(np.uint8)
    low = _pairs(scales, 16)
    return [high, _twos(numbers, 128), low, _twos(scales >> 4, 16), units]


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
        return [scales | minima << 4, _twos(numbers, 128), *halves]
    # six bits each; of the last four, the high two lie above the first four
    first = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scales, minima)]
    last = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return [*halves, *first, last, _pairs(numbers, 64)]


def quantised(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Rows ``(rows, columns)`` in fp32 in a type of GGUF, as uint8 or floating point; also Q6_K, unlike gguf-py."""
    if kind != gguf.GGMLQuantizationType.Q6_K:
        return gguf.quantize(values, kind)
    rows = torch.from_numpy(values).split(4096)
    return np.concatenate([_nearest_q6_k(few) for few in rows])


def _nearest_q6_k(rows: Tensor) -> np.ndarray:
    """Q6_K of values ``(rows, columns)``. Scales follow from the largest magnitudes, units from the largest scales."""
    grid = GRIDS["q6_k"]
    grouped = rows.reshape(-1, grid.group)
    extreme = grouped.gather(1, anchors(grouped))
    of_parts = (extreme / grid.lowest).view(-1, grid.parts)
    widest = of_parts.gather(1, anchors(of_parts)) / grid.lowest_scale
    halves = widest.numpy().astype(np.float16)  # numpy raises an overflow
    units = torch.from_numpy(halves).float()
    steps = in_units(of_parts, units, grid)
    scales = (steps * units).view(-1, 1)
    numbers = whole_numbers(grouped, scales, Levels(grid.numbers), zero=True)
    codes = (numbers - grid.lowest).view(-1, grid.columns)
    parts = steps.numpy().astype(np.int8)
    pieces = _q6_k(codes.numpy().astype(np.uint8), parts, halves.view(np.uint8))
    return _joined(pieces, len(rows))
