"""Blocks of GGUF, read by the library of the format."""

from __future__ import annotations

import gguf
import pytest
import torch

from sparsellm.exports.blocks import block_type, to_blocks
from sparsepack.grids import GRIDS


@pytest.mark.parametrize("grid", ["q4_0", "q8_0"])
def test_blocks_are_numbers_times_scales(grid: str) -> None:
    of = GRIDS[grid]
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(of.lowest, of.highest + 1, (6, 96), generator=generator, dtype=torch.int8)
    scales = torch.randn(6, 3, generator=generator).half().float()
    scales[0, 0] = 0.0
    read = gguf.dequantize(to_blocks(codes, scales, of.bits), gguf.GGMLQuantizationType[block_type(of)])
    assert torch.equal(torch.from_numpy(read), codes.float() * scales.repeat_interleave(32, dim=1))


def test_other_groups_have_no_block() -> None:
    have = {name for name, grid in GRIDS.items() if block_type(grid) is not None}
    assert have == {"q4_0", "q8_0", "w4a16-32"}
