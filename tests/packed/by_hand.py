"""The packed format written down a second time, value by value, as docs/format.md tells it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor


def bitmask_by_hand(weight: Tensor) -> tuple[list[list[int]], list[float], list[int]]:
    """Mask bytes of each row, kept values, offsets."""
    rows, columns = weight.shape
    stride = 8 * math.ceil(columns / 64)
    mask, values, offsets = [], [], [0]
    for row in range(rows):
        line = [0] * stride
        for column in range(columns):
            value = weight[row, column].item()
            if value != 0:
                line[column // 8] += 2 ** (column % 8)
                values.append(value)
        mask.append(line)
        offsets.append(len(values))
    return mask, values, offsets


def nm_by_hand(kept: list[list[bool]], n: int, m: int) -> list[list[int]]:
    """The bytes of the codes of each row, from the positions that are kept."""
    possible = list(itertools.combinations(range(m), n))
    width = math.ceil(math.log2(len(possible)))
    lines = []
    for row in kept:
        bits: list[int] = []
        for start in range(0, len(row), m):
            code = possible.index(tuple(place for place in range(m) if row[start + place]))
            bits += [code >> place & 1 for place in range(width)]
        bits += [0] * (-len(bits) % 8)
        lines.append([sum(bits[start + place] << place for place in range(8)) for start in range(0, len(bits), 8)])
    return lines


def int4_by_hand(packed: Any) -> Tensor:
    """The dense weight of a packed int4 one in the layout bitmask, fp32."""
    rows, columns = packed.shape
    dense = torch.zeros(rows, columns)
    group = next(size for size in (32, 64, 128, 256, 512, 1024) if math.ceil(columns / size) == packed.scales.shape[1])
    for row in range(rows):
        first, last = int(packed.offsets[row]), int(packed.offsets[row + 1])
        rank = 0
        for column in range(columns):
            if not int(packed.mask[row, column // 8]) >> column % 8 & 1:
                continue
            byte = int(packed.values[(first + rank) // 2])
            nibble = byte & 15 if rank % 2 == 0 else byte >> 4
            number = nibble - 8 if packed.levels is None else int(packed.levels[nibble])
            dense[row, column] = number * packed.scales[row, column // group].float()
            rank += 1
        assert rank <= last - first <= rank + 1
    return dense


def sparse_weight(
    rows: int, columns: int, sparsity: float, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """A random weight with random zeros; an empty row where there are at least three."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    if rows > 2:
        weight[1] = 0
    return weight.to(dtype)
