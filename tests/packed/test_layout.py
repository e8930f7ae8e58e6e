"""The packed layout against a second writing of it, exact round trips, bytes counted by hand, and damaged tensors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsellm.patterns import NM
from sparsepack.codes import (
    FLOAT_TYPES,
    GAPPED,
    PLAIN,
    VALUE_TYPES,
    Levels,
    best_group,
    widened,
)
from sparsepack.errors import FormatError, PackError, SettingError
from sparsepack.layout import PackedWeight, as_bitmask, pack, unpack, unpack_rows
from sparsepack.validation import validate
from tests.packed.by_hand import bitmask_by_hand, int4_by_hand, nm_by_hand, sparse_weight

SHAPES = [(1, 1), (3, 8), (5, 63), (4, 64), (7, 65), (9, 200)]


def packed_of(weight: Tensor, values: str = "keep", layout: str = "bitmask") -> PackedWeight:
    packed = pack(weight, values, layout)
    assert packed is not None
    validate(packed, "w")
    return packed


@pytest.mark.parametrize("at_once", [1, 4, 7])
def test_the_groups_that_are_rounded_at_once_change_no_bit(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse_weight(7, 200, 0.5, torch.float32)
    together = packed_of(weight, "int4")
    monkeypatch.setattr("sparsepack.codes._GROUPS_AT_ONCE", at_once)
    parted = packed_of(weight, "int4")
    assert together.scales is not None
    assert parted.scales is not None
    assert together.values.equal(parted.values)
    assert together.scales.equal(parted.scales)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOAT_TYPES.values())
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_bitmask_is_what_the_format_says(shape: tuple[int, int], dtype: torch.dtype, sparsity: float) -> None:
    weight = sparse_weight(*shape, sparsity, dtype)
    packed = packed_of(weight)
    mask, values, offsets = bitmask_by_hand(weight)
    assert packed.mask.tolist() == mask
    assert packed.values.tolist() == values
    assert packed.values.dtype == dtype
    assert packed.offsets.tolist() == offsets
    assert torch.equal(unpack(packed), weight)
    assert unpack(packed).dtype == dtype


@pytest.mark.parametrize("pattern", [NM(1, 4), NM(2, 4), NM(4, 8)], ids=str)
@pytest.mark.parametrize("columns", [8, 40, 72])
def test_codes_are_what_the_format_says(pattern: NM, columns: int) -> None:
    # Unseeded, six groups of 4:8 would all satisfy 2:4 as well in one run of fifty.
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    kept = pattern.mask(weight.abs())
    packed = packed_of(weight * kept, layout="nm")
    assert packed.pattern == (pattern.n, pattern.m)
    assert packed.mask.tolist() == nm_by_hand(kept.tolist(), pattern.n, pattern.m)
    assert torch.equal(unpack(packed), weight * kept)
    assert torch.equal(unpack(as_bitmask(packed)), weight * kept)
    validate(as_bitmask(packed), "w")


def test_the_documented_codes_of_2_4() -> None:
    """01 02 03 12 13 23 are 0 … 5, three bits each, least significant first."""
    groups = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    weight = torch.zeros(1, 24)
    for index, places in enumerate(groups):
        weight[0, [4 * index + place for place in places]] = 1
    stream = sum(code << 3 * code for code in range(6))  # 18 bits
    assert packed_of(weight, layout="nm").mask.tolist() == [[stream & 255, stream >> 8 & 255, stream >> 16]]


def test_groups_with_more_zeros_than_they_need() -> None:
    weight = torch.zeros(4, 16)
    weight[0, 3], weight[2, 5], weight[2, 6] = 1.0, 2.0, 3.0
    packed = packed_of(weight, layout="nm")
    assert packed.pattern == (1, 4) or packed.pattern == (2, 4)
    assert torch.equal(unpack(packed), weight)


@pytest.mark.parametrize("layout", ["bitmask", "nm"])
@pytest.mark.parametrize("columns", [40, 96, 264])
def test_int4_is_what_the_format_says(layout: str, columns: int) -> None:
    weight = sparse_weight(6, columns, 0.3)
    if layout == "nm":
        weight = weight * NM(2, 4).mask(weight.abs())
    packed = packed_of(weight, "int4", layout)
    assert torch.equal(unpack(packed), int4_by_hand(as_bitmask(packed)))
    assert not unpack(packed)[weight == 0].any()


def test_int4_error_is_within_half_a_step_unless_it_saturates() -> None:
    """The best of the scales tried is never worse than the one at which nothing saturates."""
    weight = sparse_weight(16, 512, 0.5)
    packed = packed_of(weight, "int4")
    found = unpack(packed)
    assert packed.group == 64
    for start in range(0, 512, 64):
        group, wrong = weight[:, start : start + 64], (found - weight)[:, start : start + 64]
        extreme = group.gather(1, group.abs().argmax(dim=1, keepdim=True))
        scale = (extreme / -8).bfloat16().float()
        plain = torch.where(scale == 0, 0.0, (group / scale)).round().clamp(-8, 7) * scale - group
        assert (wrong.square().sum(dim=1) <= plain.square().sum(dim=1) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("values", "levels"), [("int3", GAPPED["int3"]), ("int3", PLAIN["int3"]), ("int4", PLAIN["int4"])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_on_either_grid_is_found_again(values: str, levels: Levels, dtype: torch.dtype) -> None:
    numbers = torch.tensor([number for number in levels.numbers if number])
    random = torch.Generator().manual_seed(0)
    whole = numbers[torch.randint(len(numbers), (32, 192), generator=random)]
    whole[torch.rand(whole.shape, generator=random) < 0.5] = 0
    whole[:, ::64] = levels.lowest  # of each group
    scales = (torch.rand(32, 3, generator=random) + 0.1).bfloat16().float().repeat_interleave(64, dim=1)
    weight = (whole * scales).to(dtype)
    packed = packed_of(weight, values, "bitmask")
    assert (packed.group, packed.levels is None) == (64, levels.even)
    assert torch.equal(unpack(packed, dtype), weight)
    assert torch.equal(unpack(packed), int4_by_hand(packed))


@pytest.mark.parametrize("values", ["int4", "int3"])
def test_a_weight_on_no_grid_gets_no_gap(values: str) -> None:
    """Its few small values may be those of large inputs, which the gap would enlarge."""
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(0))
    weight[weight.abs() < 0.6745] = 0  # half of them; the gap would lower the squared error
    weight[:, 100] = 0.001
    packed = packed_of(weight, values)
    assert (packed.layout, packed.levels) == ("bitmask", None)
    assert bool((unpack(packed)[:, 100].abs() <= 0.001).all())


@pytest.mark.parametrize("values", ["int4", "int3"])
def test_codes_of_nm_may_stand_for_zeros_so_they_have_no_gap(values: str) -> None:
    weight = torch.randn(8, 64) * NM(2, 4).mask(torch.rand(8, 64))
    weight[0, :4] = 0
    packed = packed_of(weight, values, "nm")
    assert packed.levels is None
    assert not unpack(packed)[0, :4].any()
    assert as_bitmask(packed).levels is None


@pytest.mark.parametrize(("share", "group"), [(1.0, 32), (0.8, 32), (0.5, 64), (0.3, 128), (0.1, 256), (0.001, 1024)])
def test_about_32_kept_values_share_a_scale(share: float, group: int) -> None:
    assert best_group(share) == group
    assert group == 1024 or 22 < share * group < 46


def test_a_dense_weight_has_one_mask_for_all_rows() -> None:
    weight = torch.randn(7, 130)
    for values in VALUE_TYPES:
        packed = packed_of(weight, values, "dense")
        assert (packed.mask.shape, packed.group) == ((1, 24), 32 if values == "int4" else None)
        assert torch.equal(unpack(packed), unpack(packed_of(weight, values, "bitmask")))
    assert pack(weight, "int4").layout == "dense"  # type: ignore[union-attr]
    damaged = dataclasses.replace(packed, mask=packed.mask ^ torch.tensor([1] + [0] * 23, dtype=torch.uint8))
    with pytest.raises(FormatError, match="dense weight's mask is not set"):
        validate(damaged, "w")


def test_int8_error_is_within_half_a_step() -> None:
    weight = sparse_weight(16, 300, 0.5)
    packed = packed_of(weight, "int8")
    assert packed.scales is not None
    step = weight.abs().amax(dim=1) / 127
    assert torch.allclose(packed.scales, step)
    assert ((unpack(packed) - weight).abs() <= step.unsqueeze(1) * 0.5001).all()
    assert not unpack(packed)[weight == 0].any()


@pytest.mark.parametrize("values", VALUE_TYPES)
@pytest.mark.parametrize("layout", ["bitmask", "nm"])
def test_bytes_are_those_of_the_arithmetic(values: str, layout: str) -> None:
    rows, columns = 32, 640
    weight = sparse_weight(rows, columns, 0.6)
    if layout == "nm":
        weight = torch.randn(rows, columns)
        weight = weight * NM(2, 4).mask(weight.abs())
    packed = packed_of(weight, values, layout)
    counts = [int(count) for count in (weight != 0).sum(dim=1)]
    index = rows * (columns // 8 if layout == "bitmask" else columns // 4 * 3 // 8) + 8 * (rows + 1)
    if values == "int4":
        group = 64 if layout == "nm" or sum(counts) / weight.numel() > 0.36 else 128
        wanted = index + sum(math.ceil(count / 2) + 2 * columns // group for count in counts)
    else:
        width = {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 1}[values]
        wanted = index + width * sum(counts) + (4 * rows if values == "int8" else 0)
    assert packed.nbytes == wanted


def test_the_smallest_form_is_chosen() -> None:
    dense = torch.randn(64, 256).bfloat16()
    assert pack(dense) is None
    unstructured = sparse_weight(64, 256, 0.5, torch.bfloat16)
    assert pack(unstructured).layout == "bitmask"  # type: ignore[union-attr]
    half = dense * NM(2, 4).mask(dense.float().abs())
    assert pack(half).layout == "nm"  # type: ignore[union-attr]
    emptied = half.clone()
    emptied[:, 64:] = 0  # still 2:4, but nm would store zeros as values
    assert pack(emptied).layout == "bitmask"  # type: ignore[union-attr]
    assert pack(torch.randn(64, 256), "int4") is not None  # dense fp32 is larger than int4 with a mask


@pytest.mark.parametrize("values", VALUE_TYPES)
def test_rows_are_unpacked_on_their_own(values: str) -> None:
    packed = packed_of(sparse_weight(11, 130, 0.5), values)
    whole = unpack(packed, torch.float32)
    for first, last in ((0, 11), (0, 1), (3, 7), (10, 11), (1, 2)):
        assert torch.equal(unpack_rows(packed, first, last, torch.float32), whole[first:last])


def test_signs_of_zeros_and_values_that_are_not_finite() -> None:
    weight = torch.tensor([[0.0, -0.0, math.nan, math.inf, 1.0, 0.0, 0.0, 0.0]])
    back = unpack(packed_of(weight))
    assert torch.equal(torch.nan_to_num(back, 7.0, 8.0), torch.tensor([[0.0, 0.0, 7.0, 8.0, 1.0, 0.0, 0.0, 0.0]]))
    with pytest.raises(FormatError, match="NaN or infinite"):
        pack(weight, "int8", "bitmask")
    with pytest.raises(FormatError, match="fp16"):
        pack(torch.tensor([[1e6, 0.0, 0.0, 0.0]]), "fp16", "bitmask")


def test_what_cannot_be_packed_is_said() -> None:
    with pytest.raises(SettingError, match=r"int44.*int4, int3"):
        pack(torch.randn(4, 4), "int44")
    with pytest.raises(SettingError, match="layout"):
        pack(torch.randn(4, 4), layout="csr")
    with pytest.raises(SettingError, match="2:4"):
        pack(torch.randn(4, 8), layout="nm")
    with pytest.raises(FormatError, match="float64"):
        pack(torch.randn(4, 4).double())
    eight_bits = torch.randn(4, 4).to(torch.float8_e4m3fn)
    for wrong in (torch.randn(4), torch.ones(2, 2, dtype=torch.int8), torch.randn(0, 4), eight_bits):
        with pytest.raises(FormatError, match="cannot be packed"):
            pack(wrong)


def flip_bit(mask: Tensor) -> Tensor:
    changed = mask.clone()
    changed[2, 0] ^= 1
    return changed


def set_at(index: int, value: int) -> Any:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[index] = value
        return changed

    return change


def padding_bit(mask: Tensor) -> Tensor:
    changed = mask.clone()
    changed[0, -1] |= 128
    return changed


DAMAGE: dict[str, tuple[str, str, Any, str]] = {
    "a flipped bit": ("keep", "mask", flip_bit, "row 2"),
    "a padding bit": ("keep", "mask", padding_bit, "padding"),
    "a mask too narrow": ("keep", "mask", lambda mask: mask[:, :-1].contiguous(), "mask is"),
    "a mask of another type": ("keep", "mask", lambda mask: mask.to(torch.int32), "mask is torch.int32"),
    "a first offset": ("keep", "offsets", set_at(0, 1), "first offset"),
    "a negative offset": ("keep", "offsets", set_at(1, -5), "decrease"),
    "a huge offset": ("keep", "offsets", set_at(3, 2**62), "decrease"),
    "a huge last offset": ("keep", "offsets", set_at(-1, 2**62), "values, where offsets end"),
    "decreasing offsets": ("keep", "offsets", lambda offsets: offsets.flip(0), "first offset"),
    "short offsets": ("keep", "offsets", lambda offsets: offsets[:-1], "offsets is"),
    "offsets of another type": ("keep", "offsets", lambda offsets: offsets.int(), "offsets is torch.int32"),
    "too few values": ("keep", "values", lambda values: values[:-1], "values, where offsets end"),
    "values of another type": ("keep", "values", lambda values: values.double(), "values are torch.float64"),
    "values in a matrix": ("keep", "values", lambda values: values.unsqueeze(0), "values, where"),
    "scales with floats": ("keep", "scales", lambda _: torch.ones(5), "scales with values"),
    "no scales": ("int8", "scales", lambda _: None, "no scales"),
    "too few scales": ("int8", "scales", lambda scales: scales[:-1], "scales is"),
    "a scale that is no number": ("int8", "scales", lambda scales: scales * math.nan, "not finite"),
    "int4 with a row of scales missing": ("int4", "scales", lambda scales: scales[1:], "scales is"),
    "int4 with one scale too many": ("int4", "scales", lambda scales: scales.repeat(1, 3), "6 scales a row do not"),
    "int4 with scales of values": ("int4", "scales", lambda scales: scales.view(-1), "groups of columns"),
    "int4 with half a row": ("int4", "values", lambda values: values[1:], "values, where offsets end"),
    "int8 with levels": (
        "int8",
        "levels",
        lambda _: torch.zeros(16, dtype=torch.int8),
        "levels with values of type int8",
    ),
    "int4 with fifteen levels": (
        "int4",
        "levels",
        lambda _: torch.zeros(15, dtype=torch.int8),
        r"levels is torch.int8 \(15,\)",
    ),
    "levels of another type": ("int4", "levels", lambda _: torch.zeros(16), "levels is torch.float32"),
    "an unknown type": ("keep", "value_type", lambda _: "fp8", "fp8"),
    "an unknown layout": ("keep", "layout", lambda _: "csr", "csr"),
    "nm without numbers": ("keep", "layout", lambda _: "nm", "without n and m"),
    "numbers without nm": ("keep", "pattern", lambda _: (2, 4), "with n and m"),
    "another shape": ("keep", "shape", lambda _: (5, 2**40), "mask is"),
    "a negative shape": ("keep", "shape", lambda _: (-5, 100), "negative"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_before_anything_computes_with_it(damage: str) -> None:
    values, field, change, said = DAMAGE[damage]
    packed = packed_of(sparse_weight(5, 100, 0.5), values)
    damaged = dataclasses.replace(packed, **{field: change(getattr(packed, field))})
    with pytest.raises(FormatError, match=f"(?s)up_proj.*{said}"):
        validate(damaged, "up_proj")


def test_a_pattern_that_has_no_codes_is_refused() -> None:
    packed = dataclasses.replace(packed_of(torch.eye(8), layout="nm"), pattern=(3, 4))
    with pytest.raises(FormatError, match="3:4 is none of 1:4, 2:4, 4:8"):
        validate(packed, "w")


@pytest.mark.parametrize(("pattern", "code"), [(NM(2, 4), 255), (NM(4, 8), 127)])
def test_codes_that_are_none_are_refused(pattern: NM, code: int) -> None:
    weight = torch.randn(3, 64)
    packed = packed_of(weight * pattern.mask(weight.abs()), layout="nm")
    mask = packed.mask.clone()
    mask[1, 0] = code
    with pytest.raises(FormatError, match="code"):
        validate(dataclasses.replace(packed, mask=mask), "w")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_bytes_in_a_tensor_are_refused_or_unpack_inside_their_bounds(data: st.DataObject) -> None:
    """What passes the check must unpack to the shape it claims; what does not raises this library's error."""
    values = data.draw(st.sampled_from(VALUE_TYPES))
    packed = packed_of(sparse_weight(4, 70, 0.5, seed=data.draw(st.integers(0, 5))), values)
    field = data.draw(st.sampled_from(["mask", "offsets"]))
    tensor = getattr(packed, field).clone()
    raw = tensor.view(-1).view(torch.uint8)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    changed = dataclasses.replace(packed, **{field: tensor})
    try:
        validate(changed, "w")
    except PackError:
        return
    assert unpack(changed).shape == (4, 70)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 150), st.floats(0, 1), st.sampled_from(VALUE_TYPES), st.integers(0, 99))
def test_packing_round_trips(rows: int, columns: int, sparsity: float, values: str, seed: int) -> None:
    weight = sparse_weight(rows, columns, sparsity, FLOAT_TYPES.get(values, torch.float32), seed)
    packed = packed_of(weight, values)
    if values in FLOAT_TYPES:
        assert torch.equal(unpack(packed), weight)
    again = packed_of(unpack(packed, torch.float32), values if values in FLOAT_TYPES else "fp32")
    assert torch.equal(unpack(again, torch.float32), unpack(packed, torch.float32))


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_int3_is_int4_of_few_numbers_and_three_bits_in_a_file(sparsity: float) -> None:
    weight = sparse_weight(7, 101, sparsity)
    packed = pack(weight, "int3")
    assert packed is not None
    validate(packed, "w")
    assert (packed.value_type, packed.written_type) == ("int4", "int3")
    slots = int(packed.offsets[-1])
    written = packed.stored["values"]
    assert len(written) == (3 * slots + 7) // 8
    assert torch.equal(widened(written, slots), packed.values)
    # The first value of the second row, bit by bit, as docs/format.md tells it.
    at = 3 * int(packed.offsets[2])
    code = sum((int(written[(at + bit) // 8]) >> (at + bit) % 8 & 1) << bit for bit in range(3))
    assert packed.scales is not None
    column = int(weight[2].nonzero()[0]) if packed.layout == "bitmask" else 0
    value = (code - 4) * float(packed.scales[2, column // int(packed.group or 1)])
    assert float(unpack(packed)[2, column]) == value


def test_only_whole_bytes_of_three_bits_are_widened() -> None:
    zeros = torch.zeros(4, dtype=torch.uint8)
    assert torch.equal(widened(zeros[:3], 6), torch.full((3,), 4 | 4 << 4, dtype=torch.uint8))
    padded = torch.tensor([0, 0, 128], dtype=torch.uint8)
    for data, values in ((zeros[:3], -2), (zeros[:3], 7), (zeros, 6), (zeros[:3].char(), 6), (zeros[:3, None], 6)):
        with pytest.raises(ValueError, match=f"are not {values} values of three bits"):
            widened(data, values)
    with pytest.raises(ValueError, match="a bit after the last value"):
        widened(padded, 6)
