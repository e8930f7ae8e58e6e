"""The packed layout against a second writing of it, exact round trips, bytes counted by hand, and damaged tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import by_hand
from by_hand import exponents_of, packed_of, sparse_weight, two_of_four
from sparsepack.codes import (
    FLOAT_TYPES,
    GAPPED,
    PLAIN,
    VALUE_TYPES,
    Levels,
    widened,
)
from sparsepack.errors import FormatError, SettingError
from sparsepack.layout import as_bitmask, pack, unpack, unpack_rows
from sparsepack.masks import PATTERNS, filled
from sparsepack.validation import validate

SHAPES = [(1, 1), (3, 8), (5, 63), (4, 64), (7, 65), (9, 200)]


def test_the_number_of_groups_rounded_at_once_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = sparse_weight(7, 200, 0.5, torch.float32)
    together = packed_of(weight, "int4")
    for at_once in (1, 4, 7):
        monkeypatch.setattr("sparsepack.codes._GROUPS_AT_ONCE", at_once)
        for field, tensor in packed_of(weight, "int4").tensors.items():
            assert torch.equal(tensor, together.tensors[field])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOAT_TYPES.values())
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_bitmask_is_what_the_format_says(
    shape: tuple[int, int], dtype: torch.dtype, sparsity: float
) -> None:
    weight = sparse_weight(*shape, sparsity, dtype)
    packed = packed_of(weight)
    mask, values, offsets = by_hand.bitmask(weight)
    assert (packed.mask.tolist(), packed.values.tolist(), packed.offsets.tolist()) == (
        mask,
        values,
        offsets,
    )
    assert packed.values.dtype == unpack(packed).dtype == dtype
    assert torch.equal(unpack(packed), weight)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("columns", [8, 40, 72])
def test_codes_are_what_the_format_says(pattern: tuple[int, int], columns: int) -> None:
    # Unseeded, six groups of 4:8 would all satisfy 2:4 as well in one run of fifty.
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    groups = weight.view(-1, pattern[1])
    kept = (
        torch.zeros_like(groups)
        .scatter_(1, groups.topk(pattern[0], dim=1).indices, 1)
        .view_as(weight)
        .bool()
    )
    packed = packed_of(weight * kept, layout="nm")
    assert packed.pattern == pattern
    assert packed.mask.tolist() == by_hand.nm(kept.tolist(), *pattern)
    assert torch.equal(unpack(packed), weight * kept)
    validate(as_bitmask(packed), "w")
    mask = packed.mask.clone()
    mask[1, 0] = 255
    if pattern != (1, 4):  # whose two bits have no code to spare
        with pytest.raises(FormatError, match=r"code|padding bit"):
            validate(dataclasses.replace(packed, mask=mask), "w")


def test_groups_with_more_zeros_than_needed_store_the_first() -> None:
    kept = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]]).bool()
    assert filled(kept, (2, 4)).int().tolist() == [[1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("layout", ["bitmask", "nm"])
@pytest.mark.parametrize(
    ("columns", "exponents"), [(40, None), (264, None), (100, exponents_of(100))]
)
def test_int4_is_what_the_format_says(
    layout: str, columns: int, exponents: Tensor | None
) -> None:
    weight = sparse_weight(6, columns, 0.3)
    packed = packed_of(
        two_of_four(weight) if layout == "nm" else weight, "int4", layout, exponents
    )
    assert torch.equal(unpack(packed), by_hand.grouped(as_bitmask(packed)))


@pytest.mark.parametrize(
    ("shape", "zero"), [((4096, 1024), [0, 1]), ((896, 896), [0, 7])]
)
def test_all_groups_of_a_row_tell_whether_it_is_on_a_grid(
    shape: tuple[int, int], zero: list[int]
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight.view(shape[0], -1, 64)[:, zero] = 0.0
    assert pack(weight, "int3", "bitmask").levels is None


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ("int3", GAPPED["int3"]),
        *((values, PLAIN[values]) for values in ("int3", "int4", "int5", "int6")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_on_its_grid_is_packed_exactly(
    values: str, levels: Levels, dtype: torch.dtype
) -> None:
    numbers = torch.tensor([number for number in levels.numbers if number])
    random = torch.Generator().manual_seed(0)
    integers = numbers[torch.randint(len(numbers), (8, 192), generator=random)]
    integers[torch.rand(integers.shape, generator=random) < 0.5] = 0
    integers[:, ::64] = levels.lowest  # in each group
    scales = (
        (torch.rand(8, 3, generator=random) + 0.1)
        .bfloat16()
        .float()
        .repeat_interleave(64, dim=1)
    )
    weight = (integers * scales).to(dtype)
    packed = packed_of(weight, values, "bitmask")
    assert (packed.group, packed.levels is None) == (64, levels.even)
    assert torch.equal(unpack(packed, dtype), weight)
    assert torch.equal(unpack(packed), by_hand.grouped(packed))


@pytest.mark.parametrize("values", ["int4", "int3"])
def test_other_weights_and_codes_of_nm_get_no_gap(values: str) -> None:
    """Small values may be those of large inputs, which the gap would enlarge; values of N:M may be zeros."""
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(0))
    weight[weight.abs() < 0.6745] = (
        0  # half of them; the gap would lower the squared error
    )
    weight[:, 100] = 0.001
    packed = packed_of(weight, values)
    assert packed.levels is None
    assert bool((unpack(packed)[:, 100].abs() <= 0.001).all())
    weight = two_of_four(torch.randn(8, 64))
    weight[0, :4] = 0
    packed = packed_of(weight, values, "nm")
    assert packed.levels is None
    assert not unpack(packed)[0, :4].any()


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_int3_is_int4_in_memory_and_three_bits_in_a_file(sparsity: float) -> None:
    weight = sparse_weight(7, 101, sparsity)
    packed = packed_of(weight, "int3", "auto")
    assert (packed.value_type, packed.narrower) == ("int4", "int3")
    slots, written = int(packed.offsets[-1]), packed.stored["values"]
    assert len(written) == (3 * slots + 7) // 8
    assert torch.equal(widened(written, slots, "int3"), packed.values)
    # The first value of the third row, bit by bit, as docs/format.md tells it.
    at = 3 * int(packed.offsets[2])
    code = sum(
        (int(written[(at + bit) // 8]) >> (at + bit) % 8 & 1) << bit for bit in range(3)
    )
    assert packed.scales is not None
    column = int(weight[2].nonzero()[0]) if packed.layout == "bitmask" else 0
    assert float(unpack(packed)[2, column]) == (code - 4) * float(
        packed.scales[2, column // int(packed.group or 1)]
    )


def test_only_whole_bytes_of_three_bits_are_widened() -> None:
    zeros = torch.zeros(4, dtype=torch.uint8)
    assert torch.equal(
        widened(zeros[:3], 6, "int3"), torch.full((3,), 4 | 4 << 4, dtype=torch.uint8)
    )
    for data, values in (
        (zeros[:3], -2),
        (zeros[:3], 7),
        (zeros, 6),
        (zeros[:3].char(), 6),
        (zeros[:3, None], 6),
    ):
        with pytest.raises(ValueError, match=f"are not {values} values of 3 bits"):
            widened(data, values, "int3")
    with pytest.raises(ValueError, match="a bit after the last value"):
        widened(torch.tensor([0, 0, 128], dtype=torch.uint8), 6, "int3")


BYTES = pytest.mark.parametrize(("values", "bits"), [("int6", 6), ("int5", 5)])


@BYTES
@pytest.mark.parametrize("layout", ["bitmask", "nm", "dense"])
@pytest.mark.parametrize(
    ("columns", "exponents"), [(40, None), (264, None), (100, exponents_of(100))]
)
def test_int6_and_int5_are_what_the_format_says(
    values: str, bits: int, layout: str, columns: int, exponents: Tensor | None
) -> None:
    weight = sparse_weight(6, columns, 0.0 if layout == "dense" else 0.3)
    if layout == "nm":
        weight = two_of_four(weight)
    packed = packed_of(weight, values, layout, exponents)
    assert (packed.value_type, packed.narrower) == ("int8", values)
    assert torch.equal(unpack(packed), by_hand.grouped(as_bitmask(packed)))
    written = packed.stored["values"].tolist()
    lowest = -(1 << bits - 1)
    assert written == by_hand.in_bits(packed.values.tolist(), bits, lowest)
    assert packed.nbytes == sum(tensor.nbytes for tensor in packed.stored.values())


@BYTES
def test_every_number_of_int6_and_int5_is_read_again(values: str, bits: int) -> None:
    lowest = -(1 << bits - 1)
    numbers = torch.arange(lowest, -lowest).to(torch.int8)
    for count in (0, 1, 3, len(numbers)):
        data = torch.tensor(
            by_hand.in_bits(numbers[:count].tolist(), bits, lowest), dtype=torch.uint8
        )
        assert torch.equal(widened(data, count, values), numbers[:count])
        for wrong in (torch.cat((data, data[:1])), data.char(), data.unsqueeze(0)):
            if wrong.dtype == torch.uint8 and wrong.shape == data.shape:
                continue  # nothing to add to
            with pytest.raises(ValueError, match=f"values of {bits} bits"):
                widened(wrong, count, values)
    with pytest.raises(ValueError, match=f"the last value of {bits} bits is set"):
        widened(torch.tensor([128], dtype=torch.uint8), 1, values)


@BYTES
def test_each_bit_more_halves_the_error(values: str, bits: int) -> None:
    """Dense, of normal numbers; the largest magnitude of a group is its lowest number or a smaller one."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    wrong = {
        name: float((unpack(packed_of(weight, name, "dense")) - weight).norm())
        for name in ("int4", "int5", "int6")
    }
    assert wrong["int6"] < 0.55 * wrong["int5"] < 0.55 * 0.55 * wrong["int4"]
    packed = packed_of(weight, values, "auto")
    assert (packed.layout, packed.group) == ("dense", 32)
    assert 8 * packed.nbytes == weight.numel() * (bits + 0.5) + 8 * 64


def test_a_dense_weight_has_one_mask_for_all_rows() -> None:
    weight = torch.randn(7, 130)
    for values in VALUE_TYPES:
        packed = packed_of(weight, values, "dense")
        assert (packed.mask.shape, packed.group) == (
            (1, 24),
            32 if values == "int4" else None,
        )
        assert torch.equal(unpack(packed), unpack(packed_of(weight, values, "bitmask")))
    with pytest.raises(FormatError, match="dense weight's mask is not set"):
        validate(
            dataclasses.replace(
                packed,
                mask=packed.mask ^ torch.tensor([1] + [0] * 23, dtype=torch.uint8),
            ),
            "w",
        )


def test_int8_error_is_within_half_a_step() -> None:
    weight = sparse_weight(16, 300, 0.5)
    packed = packed_of(weight, "int8")
    step = weight.abs().amax(dim=1) / 127
    assert torch.allclose(packed.tensors["scales"], step)
    assert ((unpack(packed) - weight).abs() <= step.unsqueeze(1) * 0.5001).all()
    assert not unpack(packed)[weight == 0].any()


def test_the_smallest_form_is_chosen() -> None:
    dense = torch.randn(64, 256).bfloat16()
    half = two_of_four(dense)
    emptied = half.clone()
    emptied[:, 64:] = 0  # still 2:4, but nm would store zeros as values
    layouts = [
        pack(dense),
        pack(sparse_weight(64, 256, 0.5, torch.bfloat16)),
        pack(half),
        pack(emptied),
    ]
    layouts.append(pack(torch.randn(64, 256), "int4"))  # dense fp32 is larger
    assert [packed and packed.layout for packed in layouts] == [
        None,
        "bitmask",
        "nm",
        "bitmask",
        "dense",
    ]


@pytest.mark.parametrize("values", VALUE_TYPES)
def test_rows_are_unpacked_alone(values: str) -> None:
    packed = packed_of(sparse_weight(11, 130, 0.5), values)
    dense = unpack(packed, torch.float32)
    for first, last in ((0, 11), (0, 1), (3, 7), (10, 11), (1, 2)):
        assert torch.equal(
            unpack_rows(packed, first, last, torch.float32), dense[first:last]
        )


def test_zeros_lose_their_sign_and_nan_stays() -> None:
    back = unpack(
        packed_of(torch.tensor([[0.0, -0.0, math.nan, math.inf, 1.0, 0.0, 0.0, 0.0]]))
    )
    assert torch.equal(
        torch.nan_to_num(back, 7.0, 8.0),
        torch.tensor([[0.0, 0.0, 7.0, 8.0, 1.0, 0.0, 0.0, 0.0]]),
    )


@pytest.mark.parametrize(
    ("weight", "values", "layout", "said"),
    [
        (torch.randn(4, 4), "int44", "auto", "int44.*int4, int6, int5, int3"),
        (torch.randn(4, 4), "keep", "csr", "layout"),
        (torch.randn(4, 8), "keep", "nm", "2:4"),
        (torch.randn(4, 4).double(), "keep", "auto", "float64"),
        (torch.randn(4), "keep", "auto", "cannot be packed"),
        (torch.randn(0, 4), "keep", "auto", "cannot be packed"),
        (
            torch.tensor([[math.nan, 0.0]]),
            "int8",
            "bitmask",
            "NaN, infinite or too large",
        ),
        (torch.tensor([[1e6, 0.0, 0.0, 0.0]]), "fp16", "bitmask", "too large for fp16"),
    ],
)
def test_weights_without_a_packed_form_are_refused(
    weight: Tensor, values: str, layout: str, said: str
) -> None:
    with pytest.raises((FormatError, SettingError), match=said):
        pack(weight, values, layout)


def test_a_group_of_no_file_is_refused_and_large_values_are_packed() -> None:
    for exponents in ([0], [9] * 64):
        with pytest.raises(SettingError, match="one whole number for each column"):
            pack(
                torch.ones(4, 64),
                "int4",
                exponents=torch.tensor(exponents, dtype=torch.int8),
            )
    with pytest.raises(SettingError, match="group is 48; give one of 32, 64"):
        pack(torch.randn(4, 96), "int4", "bitmask", group=48)
    weight, ones = torch.randn(64, 4).t(), torch.ones(64)
    packed = packed_of(weight.contiguous(), "int4", exponents=ones.to(torch.int8))
    assert torch.equal(
        unpack(packed_of(weight, "int4", exponents=ones)), unpack(packed)
    )
    large = 1e20 * torch.rand(1, 64)  # whose squares overflow
    assert (unpack(packed_of(large, "int4")) - large).abs().max() < 1e20 / 7


def at(index: Any, change: Callable[[int], int]) -> Callable[[Tensor], Tensor]:
    def changed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = change(int(tensor[index]))
        return tensor

    return changed


INT8S = torch.zeros(16, dtype=torch.int8)
DAMAGE: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("keep", "mask", at((2, 0), lambda byte: byte ^ 1), "row 2"),
    ("keep", "mask", at((0, -1), lambda byte: byte | 128), "padding"),
    ("keep", "mask", lambda mask: mask[:, :-1].contiguous(), "mask is"),
    ("keep", "offsets", at(0, lambda _: 1), "first offset"),
    ("keep", "offsets", at(1, lambda _: -5), "decrease"),
    ("keep", "offsets", at(3, lambda _: 2**62), "decrease"),
    ("keep", "values", lambda values: values[:-1], "values, where offsets end"),
    ("keep", "scales", lambda _: torch.ones(5), "scales with values"),
    ("int8", "scales", lambda _: None, "no scales"),
    ("int8", "scales", lambda scales: scales[:-1], "scales is"),
    ("int8", "scales", lambda scales: scales * math.nan, "not finite"),
    ("int6", "scales", lambda scales: scales.float(), "scales is torch.float32"),
    ("int6", "scales", lambda scales: scales.view(-1), "groups of columns"),
    ("int5", "scales", lambda _: torch.ones(5), "groups of columns"),
    ("int5", "scales", lambda scales: scales.repeat(1, 3), "6 scales a row do not"),
    ("int6", "values", lambda values: values[1:], "values, where offsets end"),
    ("int5", "levels", lambda _: INT8S, "levels with values of type int8"),
    ("int4", "scales", lambda scales: scales.repeat(1, 3), "6 scales a row do not"),
    ("int8", "levels", lambda _: INT8S, "levels with values of type int8"),
    (
        "keep",
        "exponents",
        lambda _: exponents_of(100),
        "exponents with values of type fp32",
    ),
    ("int4", "exponents", lambda _: exponents_of(99), "exponents is torch"),
    (
        "int4",
        "exponents",
        lambda _: exponents_of(100) - 1,
        "an exponent is -9, not one of -8 to 7",
    ),
    ("keep", "value_type", lambda _: "fp8", "fp8"),
    ("keep", "layout", lambda _: "nm", "without n and m"),
    ("keep", "pattern", lambda _: (2, 4), "with n and m"),
    ("keep", "shape", lambda _: (-5, 100), "negative"),
]


@pytest.mark.parametrize(("values", "field", "change", "said"), DAMAGE)
def test_damage_is_named_before_the_work(
    values: str, field: str, change: Callable[[Any], Any], said: str
) -> None:
    packed = packed_of(sparse_weight(5, 100, 0.5), values)
    with pytest.raises(FormatError, match=f"(?s)up_proj.*{said}"):
        validate(
            dataclasses.replace(packed, **{field: change(getattr(packed, field))}),
            "up_proj",
        )
