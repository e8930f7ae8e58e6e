"""Blocks of GGUF, read by the library of the format."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from sparsellm.exports.blocks import block_type, quantised, to_blocks
from sparsepack.grid import on_grid
from sparsepack.grids import GRIDS, Grid, grid_for


def random_scales(grid: Grid, rows: int, columns: int) -> Tensor:
    """Scales that blocks can hold: numbers of fp16, or any whole numbers of one of them."""
    generator = torch.Generator().manual_seed(2)
    groups = columns // grid.group
    if not grid.parts:
        scales = torch.randn(rows, groups, generator=generator).half().float()
        scales[0, 0] = 0.0
        return scales
    shape = (rows, groups // grid.parts, grid.parts)
    ends = (grid.lowest_scale, grid.highest_scale + 1)
    steps = torch.randint(*ends, shape, generator=generator)
    steps[..., 3] = grid.lowest_scale
    # with the digits of bf16, as the product with a number must be exact in fp32
    units = torch.randn(*shape[:2], 1, generator=generator).bfloat16().half().float()
    units[0, 0] = 2.0**-24
    return (units * steps).view(rows, groups)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, grid in GRIDS.items()
        if block_type(grid) is not None and not grid.minima
    ],
)
@pytest.mark.parametrize("columns", [96, 512])
def test_blocks_are_numbers_times_scales(name: str, columns: int) -> None:
    """As the format's own library reads them; in rows that are too narrow for a type, in the one that follows it."""
    grid = grid_for(name, columns)
    generator = torch.Generator().manual_seed(1)
    numbers = torch.tensor(grid.numbers, dtype=torch.int8)
    places = torch.randint(len(numbers), (6, columns), generator=generator)
    codes = numbers[places]
    scales = random_scales(grid, 6, columns)
    kind = gguf.GGMLQuantizationType[block_type(grid) or ""]
    read = gguf.dequantize(to_blocks(codes, scales, GRIDS[name]), kind)
    exact = codes.float() * scales.repeat_interleave(grid.group, dim=1)
    assert torch.equal(torch.from_numpy(read), exact)


@pytest.mark.parametrize("name", ["q2_k", "q4_k"])
def test_blocks_have_minima(name: str) -> None:
    grid = GRIDS[name]
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(1 << grid.bits, (6, 512), generator=generator)
    steps = torch.randint(
        grid.lowest_scale + 1, (6, 2, grid.parts, 2), generator=generator
    )
    steps[:, :, 1] = grid.lowest_scale
    units = torch.rand(6, 2, 1, 2, generator=generator).half().float()
    lines = (units * steps).view(6, -1, 2) * torch.tensor([1.0, -1.0])
    kind = gguf.GGMLQuantizationType[name.upper()]
    read = gguf.dequantize(to_blocks(codes.to(torch.int8), lines, grid), kind)
    scales = [part.repeat_interleave(grid.group, dim=1) for part in lines.unbind(2)]
    exact = codes.float() * scales[0] + scales[1]
    assert torch.equal(torch.from_numpy(read), exact)


def test_the_reference_finds_every_block_of_q4_0_again() -> None:
    """The reference takes the largest magnitude for -8, which is where our scales stand."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(19_999, 32, generator=generator) * 0.05
    values = on_grid(weight, "q4_0", torch.float32).numpy()
    kind = gguf.GGMLQuantizationType.Q4_0
    again = gguf.dequantize(gguf.quantize(values, kind), kind)
    assert np.array_equal(again, values)


def test_q6_k_keeps_numbers_that_it_has_and_is_near_others() -> None:
    generator = torch.Generator().manual_seed(1)
    # more rows than are done at a time
    units = torch.randn(4097, 1, 1, 1, generator=generator).half().float()
    levels = torch.randint(-127, 128, (4097, 2, 16, 1), generator=generator)
    numbers = torch.randint(-32, 32, (4097, 2, 16, 16), generator=generator)
    numbers[..., 3], levels[:, :, 5] = -32, -128
    exact, normal = (
        (units * levels * numbers).view(-1, 512),
        torch.randn(64, 512, generator=generator),
    )
    kind = gguf.GGMLQuantizationType.Q6_K
    there, near = (
        torch.from_numpy(gguf.dequantize(quantised(x.numpy(), kind), kind))
        for x in (exact, normal)
    )
    assert torch.equal(there, exact)
    # in steps
    error = (
        32
        * (near - normal).view(-1, 16)
        / normal.view(-1, 16).abs().amax(1, keepdim=True)
    )
    # 1 at the end without a number, and half a level of 128 for the scale
    assert error.abs().max() < 1.3
    assert error.square().mean() == pytest.approx(1 / 12, rel=0.2)  # that of rounding


def test_other_groups_have_no_block() -> None:
    others = {name for name, grid in GRIDS.items() if block_type(grid) is None}
    assert others == {"w4a16", "w4a16-64", "w3a16", "w8a16", "w8a8"}
