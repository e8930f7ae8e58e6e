"""The packed format written down a second time, value by value, as docs/format.md tells it."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from sparsepack import PackedWeight, pack
from sparsepack.validation import validate


def bitmask(weight: Tensor) -> tuple[list[list[int]], list[float], list[int]]:
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


def nm(kept: list[list[bool]], n: int, m: int) -> list[list[int]]:
    """The bytes of the codes of each row, from the positions that are kept."""
    possible = list(itertools.combinations(range(m), n))
    width, lines = math.ceil(math.log2(len(possible))), []
    for row in kept:
        bits: list[int] = []
        for start in range(0, len(row), m):
            code = possible.index(
                tuple(place for place in range(m) if row[start + place])
            )
            bits += [code >> place & 1 for place in range(width)]
        bits += [0] * (-len(bits) % 8)
        lines.append(
            [
                sum(bits[start + place] << place for place in range(8))
                for start in range(0, len(bits), 8)
            ]
        )
    return lines


def in_bits(numbers: list[int], bits: int, lowest: int) -> list[int]:
    """Bytes of numbers minus the lowest one, in some bits each, the least significant first."""
    stream = sum(
        number - lowest << bits * place for place, number in enumerate(numbers)
    )
    return list(stream.to_bytes(-(-bits * len(numbers) // 8), "little"))


def grouped(packed: PackedWeight) -> Tensor:
    """The dense weight of a packed one in the layout bitmask or dense whose groups of columns have scales, fp32."""
    rows, columns = packed.shape
    dense = torch.zeros(rows, columns)
    assert packed.scales is not None
    group = next(
        size
        for size in (32, 64, 128, 256, 512, 1024)
        if math.ceil(columns / size) == packed.scales.shape[1]
    )
    for row in range(rows):
        first, last = int(packed.offsets[row]), int(packed.offsets[row + 1])
        mask = packed.mask[row if packed.layout == "bitmask" else 0]
        kept = [
            column
            for column in range(columns)
            if int(mask[column // 8]) >> column % 8 & 1
        ]
        pairs = packed.value_type == "int4"
        assert last - first == len(kept) + (len(kept) % 2 if pairs else 0)
        for rank, column in enumerate(kept):
            if pairs:
                byte = int(packed.values[(first + rank) // 2])
                code = byte & 15 if rank % 2 == 0 else byte >> 4
                number = code - 8 if packed.levels is None else int(packed.levels[code])
            else:
                number = int(packed.values[first + rank])
            power = (
                1.0
                if packed.exponents is None
                else 2.0 ** int(packed.exponents[column])
            )
            dense[row, column] = (
                number * packed.scales[row, column // group].float() * power
            )
    return dense


def two_of_four(weight: Tensor) -> Tensor:
    """The weight with the two largest magnitudes of every four columns, and zeros."""
    groups = weight.reshape(-1, 4)
    return (
        groups
        * torch.zeros_like(groups).scatter_(1, groups.abs().topk(2, dim=1).indices, 1)
    ).view_as(weight)


def version_2(
    dense: dict[str, Tensor], packed: list[str]
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and ``quantization_config`` as format version 2 has them, from dense tensors in fp32.
    The named weights are packed: bitmasks with their values, and the first one dense int8 with offsets."""
    tensors, linears = dict(dense), {}
    for name in packed:
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = torch.zeros(1)
        mask, values, offsets = bitmask(weight)
        linears[name] = {
            "shape": list(weight.shape),
            "layout": "bitmask",
            "value_type": "fp32",
            "dtype": "float32",
        }
        parts = {
            "mask": torch.tensor(mask, dtype=torch.uint8),
            "values": torch.tensor(values),
        }
        if name == packed[0]:
            linears[name] |= {"layout": "dense", "value_type": "int8"}
            rows, columns = weight.shape
            scales = weight.abs().amax(dim=1) / 127
            codes = (weight / scales[:, None]).round().to(torch.int8)
            full, _, _ = bitmask(torch.ones(1, columns))
            parts = {
                "mask": torch.tensor(full, dtype=torch.uint8),
                "values": codes.view(-1),
                "scales": scales,
            }
            offsets = [row * columns for row in range(rows + 1)]
        parts["offsets"] = torch.tensor(offsets)
        tensors |= {f"{name}.weight_{field}": tensor for field, tensor in parts.items()}
    return tensors, {
        "quant_method": "sparsellm",
        "format_version": 2,
        "linears": linears,
    }


def sparse_weight(
    rows: int,
    columns: int,
    share: float,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensor:
    """A random weight with a share of random zeros; an empty row where there are at least three."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < share] = 0
    if rows > 2:
        weight[1] = 0
    return weight.to(dtype)


def packed_of(
    weight: Tensor,
    values: str = "keep",
    layout: str = "bitmask",
    exponents: Tensor | None = None,
) -> PackedWeight:
    packed = pack(weight, values, layout, exponents)
    assert packed is not None
    validate(packed, "w")
    return packed


def exponents_of(columns: int) -> Tensor:
    return torch.arange(columns).mul(7).remainder(16).sub(8).to(torch.int8)
