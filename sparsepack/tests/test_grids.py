"""The grids of other programs: a rounded weight is read off exactly, and has the values that they compute."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsepack.errors import FormatError
from sparsepack.grid import codes_of, on_grid
from sparsepack.grids import GRIDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# subnormal in fp16 to overflow
SIZES = [
    0.0,
    3e-9,
    1e-7,
    2e-6,
    3e-4,
    0.05,
    1.0,
    300.0,
    9000.0,
    1e6,
]


def weight_of(seed: int, dtype: torch.dtype) -> Tensor:
    """A weight ``(20, 256)`` whose stretches of 32 columns have sizes from nothing to beyond fp16, in fp32."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(SIZES)[torch.randint(len(SIZES), (20, 8), generator=random)]
    sizes[:8] = sizes[:8, :1]  # rows of one size, for grids whose groups are long
    weight = torch.randn(20, 256, generator=random) * sizes.repeat_interleave(32, dim=1)
    weight[torch.rand(20, 256, generator=random) < 0.3] = 0.0
    largest = torch.finfo(dtype).max
    return weight.clamp(-largest, largest).to(dtype).float()


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(GRIDS)), st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_codes_and_scales_are_read_off_exactly(
    name: str, dtype: torch.dtype, seed: int
) -> None:
    grid, weight = GRIDS[name], weight_of(seed, dtype)
    rounded = on_grid(weight, name, dtype)
    assert torch.equal(on_grid(rounded, name, dtype), rounded)
    twin = rounded.to(dtype)
    codes, scales = codes_of(twin, grid, "a")
    factors = scales.double().repeat_interleave(
        codes.shape[1] // scales.shape[1], dim=1
    )
    assert torch.equal((codes.double() * factors).to(dtype), twin)  # rounded once
    assert torch.equal(scales.half().float(), scales)
    assert torch.equal(scales.bfloat16().float(), scales)
    assert bool(scales.isfinite().all())
    assert grid.lowest <= int(codes.min()) <= int(codes.max()) <= grid.highest
    assert not bool(codes[weight == 0].any())
    size = 256 // scales.shape[1]
    assert size == (grid.group or 256)
    lowest = codes.view(20, -1, size).amin(dim=2)
    # the extreme of every group
    assert bool(((lowest == grid.lowest) | (scales == 0)).all())


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_a_grid_is_told_from_the_next(
    name: str, dtype: torch.dtype
) -> None:
    """All numbers with all scales of eight bits, of both signs and in subnormal numbers of fp16 too."""
    grid = GRIDS[name]
    size = grid.group or 256
    numbers = (torch.arange(256) % 2**grid.bits + grid.lowest).view(-1, size)
    numbers[:, 0] = grid.lowest
    scales = torch.cat(
        [torch.arange(128, 256) * 2.0**exponent for exponent in (-24, -22, -13, 0, 1)]
    )
    scales = torch.cat((scales, -scales, torch.tensor([1, 3, -5, 21]) * 2.0**-24))
    twin = (
        (numbers[None].double() * scales[:, None, None].double())
        .to(dtype)
        .view(-1, size)
    )
    codes, read_scales = codes_of(twin, grid, "a")
    assert torch.equal(codes, numbers.to(torch.int8).repeat(len(scales), 1))
    assert torch.equal(
        read_scales.view(-1), scales.float().repeat_interleave(len(numbers))
    )


@pytest.mark.parametrize(("name", "kind"), [("q4_0", "Q4_0"), ("q8_0", "Q8_0")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gguf_computes_the_values_of_the_checkpoint(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    """The blocks are written by hand, the values are those of the gguf package."""
    twin = on_grid(weight_of(7, dtype), name, dtype).to(dtype)
    codes, scales = codes_of(twin, GRIDS[name], "a")
    numbers, d = (
        codes.view(-1, 32).numpy(),
        scales.view(-1, 1).numpy().astype(numpy.float16),
    )
    if name == "q4_0":
        low, high = numbers[:, :16] + 8, numbers[:, 16:] + 8
        numbers = (low | high << 4).astype(numpy.uint8)
    blocks = numpy.hstack((d.view(numpy.uint8), numbers.view(numpy.uint8)))
    values = quants.dequantize(blocks, GGMLQuantizationType[kind]).reshape(twin.shape)
    assert torch.equal(torch.from_numpy(values).to(dtype), twin)


def test_the_scale_of_a_group_is_near_the_best() -> None:
    """Against every scale that fp16 and bf16 share, in fp64, with the extreme at the lowest number."""
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(3)) * 0.02
    bits = (
        torch.arange(1, 2**15, dtype=torch.int32)
        .to(torch.int16)
        .view(torch.bfloat16)
        .double()
    )
    shared = bits[torch.isfinite(bits) & (bits.half().double() == bits)]
    for row, values in zip(
        weight.double(), on_grid(weight, "q4_0", torch.float32).double(), strict=True
    ):
        candidates = -shared * torch.sign(row[row.abs().argmax()])
        codes = (row / candidates[:, None]).round().clamp(-8, 7)
        codes[:, row.abs().argmax()] = -8
        ends = ((codes * candidates[:, None] - row)[:, row.abs().argmax()]).abs()
        nearest = int(ends.argmin())  # on_grid moves the extreme least
        assert torch.equal(values, codes[nearest] * candidates[nearest])


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("q4_0", lambda weight: weight.mul(1.001), "is not on the grid q4_0"),
        ("w8a8", lambda weight: weight[:, :-1] + 1e-4, "is not on the grid w8a8"),
        ("q8_0", lambda weight: weight * math.nan, "is not on the grid q8_0"),
        (
            "w4a16",
            lambda weight: weight[:, :192],
            "cannot be stored as w4a16: its 192 inputs are not a multiple",
        ),
    ],
)
def test_another_weight_is_refused_by_name(
    name: str, change: object, said: str
) -> None:
    weight = on_grid(weight_of(1, torch.float32), name, torch.float32)
    with pytest.raises(FormatError, match=f"layer.q {said}"):
        codes_of(change(weight), GRIDS[name], "layer.q")  # type: ignore[operator]
