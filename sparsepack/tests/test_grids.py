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
from sparsepack.grid import codes_of, on_grid, split
from sparsepack.grids import GRIDS, Grid
from sparsepack.minima import split_lines

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


def check_lines(twin: Tensor, grid: Grid, codes: Tensor, lines: Tensor) -> None:
    """Numbers times scales, less minima, are the twin; and both are whole numbers of units that fp16 has."""
    exact = [part.repeat_interleave(grid.group, dim=1) for part in lines.unbind(2)]
    values = codes.float() * exact[0] + exact[1]  # rounded once, as programs do
    assert torch.equal(values.to(twin.dtype), twin)
    assert {*codes.unique().tolist()} <= {*grid.numbers}
    for part in (lines[..., 0], -lines[..., 1]):
        units, whole = split_lines(part, grid)
        assert torch.equal(units.half().float(), units)
        assert torch.equal((units * whole).view_as(part), part)
        assert 0 <= int(whole.min()) <= int(whole.max()) <= grid.lowest_scale


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["q2_k", "q4_k"]),
    st.sampled_from(DTYPES),
    st.sampled_from(["one sign", "far from 0", "constant", "zeros", "sizes"]),
    st.integers(0, 2**32),
)
def test_lines_are_read_off_exactly(
    name: str, dtype: torch.dtype, kind: str, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    sizes = torch.exp(3 * torch.randn(16, 16, generator=random))
    sizes = sizes.repeat_interleave(16, dim=1)
    weight = torch.randn(16, 256, generator=random) * sizes
    signs = torch.randint(2, (16, 1), generator=random) * 2 - 1
    if kind == "one sign":
        weight = weight.abs() * signs
    if kind == "far from 0":
        weight = 0.01 * weight + sizes * signs
    if kind == "constant":
        weight = sizes.round() * signs
    if kind == "zeros":
        weight[torch.rand(16, 256, generator=random) < 0.9] = 0.0
    weight *= 10.0 ** (-5 * torch.rand(16, 1, generator=random))
    weight = weight.clamp(-3e4, 3e4).to(dtype).float()
    rounded = on_grid(weight, name, dtype)
    assert torch.equal(on_grid(rounded, name, dtype), rounded)
    twin = rounded.to(dtype)
    check_lines(twin, GRIDS[name], *codes_of(twin, GRIDS[name], "a"))


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
    if grid.minima:
        check_lines(twin, grid, codes, scales)
        return
    factors = scales.double().repeat_interleave(
        codes.shape[1] // scales.shape[1], dim=1
    )
    assert torch.equal((codes.double() * factors).to(dtype), twin)  # rounded once
    units = scales
    if grid.parts:
        units, whole = split(scales, grid)
        assert torch.equal((units * whole).view_as(scales), scales)
        assert grid.lowest_scale <= int(whole.min())
        assert int(whole.max()) <= grid.highest_scale
    if grid.half or dtype == torch.float16:
        assert torch.equal(units.half().float(), units)
    assert torch.equal(units.bfloat16().float(), units)
    assert bool(scales.isfinite().all())
    assert {*codes.unique().tolist()} <= {*grid.numbers}
    if grid.has_zero:
        assert not bool(codes[weight == 0].any())
    size = 256 // scales.shape[1]
    assert size == (grid.group or 256)
    lowest = codes.view(20, -1, size).amin(dim=2)
    # the extreme of every group, but where its scale was rounded up much
    free = (scales == 0) | (scales.abs() < 2.0**-17)
    if grid.anchored:
        free = scales == 0
    assert bool(((lowest == grid.lowest) | free).all())


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("largest", "most"), [(1.0, 1.1), (1e-3, 1.1), (1e-4, 1.2), (3e-5, 1.5)]
)
def test_small_weights_are_rounded_like_large_ones(
    name: str, dtype: torch.dtype, largest: float, most: float
) -> None:
    """Down to where fp16 has few scales: 3e-5 is 4 of its least numbers times 128."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    weight /= weight.abs().max()
    few_scales = {"iq4_nl": 0.03, "iq4_xs": 0.03, "q4_k": 0.5}.get(name, 0.0)
    exact = float((on_grid(weight, name, torch.float32) - weight).norm())
    small = on_grid((weight * largest).to(dtype).float(), name, dtype) / largest
    share = few_scales if largest < 1e-3 else 0.0
    digits = torch.finfo(dtype).eps + 2.0**-25 / largest * (dtype == torch.float16)
    allowed = most * exact + (share + digits) * float(weight.norm())
    assert float((small - weight).norm()) <= allowed


@pytest.mark.parametrize("name", ["w4a16", "w3a16", "w8a16", "w8a8"])
def test_scales_that_bf16_stores_have_no_limit_of_fp16(name: str) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    for size in (2.0**-40, 2.0**40):
        there = on_grid(weight * size, name, torch.bfloat16) / size
        assert torch.equal(there, on_grid(weight, name, torch.bfloat16))


@pytest.mark.parametrize(
    "name", [name for name, grid in sorted(GRIDS.items()) if not grid.minima]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_a_grid_is_told_from_the_next(
    name: str, dtype: torch.dtype
) -> None:
    """All numbers with all scales of eight bits, of both signs and in subnormal numbers of fp16 too."""
    grid = GRIDS[name]
    size = grid.group or 256
    numbers = torch.tensor(grid.numbers)[torch.arange(256) % len(grid.numbers)]
    numbers = numbers.view(-1, size)
    numbers[:, 0] = grid.lowest
    digits = torch.arange(128, 256)
    if grid.uneven:
        digits = digits[digits != 192]  # 1.5 is the one that is not taken
    scales = torch.cat([digits * 2.0**exponent for exponent in (-24, -22, -13, 0, 1)])
    scales = torch.cat((scales, -scales, torch.tensor([1, 3, -5, 21]) * 2.0**-24))
    if dtype == torch.float16:
        end = grid.lowest * grid.lowest_scale
        scales = scales[(scales * end).abs() <= 65280]
    whole = torch.ones(len(scales), len(numbers), 1, dtype=torch.int64)
    if grid.parts:
        random = torch.Generator().manual_seed(4)
        ends = (grid.lowest_scale, grid.highest_scale + 1)
        whole = torch.randint(*ends, whole.shape, generator=random)
        whole[whole == 0] = 1
        whole[:, :: grid.parts] = grid.lowest_scale
    exact = numbers * whole * scales[:, None, None].double()
    twin = exact.to(dtype).view(-1, grid.columns or 256)
    codes, read_scales = codes_of(twin, grid, "a")
    every = numbers.to(torch.int8).repeat(len(scales), 1)
    assert torch.equal(codes.view(-1, size), every)
    assert torch.equal(read_scales.view(-1), (whole[..., 0] * scales[:, None]).view(-1))


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
