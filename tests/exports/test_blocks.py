"""Blocks of GGUF, read by the library of the format."""

from __future__ import annotations

import gguf
import pytest
import torch

from sparsellm.exports.blocks import block_type, quantised, to_blocks
from sparsepack.grids import GRIDS


@pytest.mark.parametrize("grid", ["q4_0", "q8_0"])
def test_blocks_are_numbers_times_scales(grid: str) -> None:
    of, generator = GRIDS[grid], torch.Generator().manual_seed(1)
    codes = torch.randint(
        of.lowest, of.highest + 1, (6, 96), generator=generator, dtype=torch.int8
    )
    scales = torch.randn(6, 3, generator=generator).half().float()
    scales[0, 0] = 0.0
    read = gguf.dequantize(
        to_blocks(codes, scales, of.bits), gguf.GGMLQuantizationType[block_type(of)]
    )
    assert torch.equal(
        torch.from_numpy(read), codes.float() * scales.repeat_interleave(32, dim=1)
    )


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
    assert {name for name, grid in GRIDS.items() if block_type(grid) is not None} == {
        "q4_0",
        "q8_0",
        "w4a16-32",
    }
