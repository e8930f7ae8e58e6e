"""Checks of a packed weight: all conditions that keep a kernel's memory accesses inside the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsepack.codes import (
    CODES,
    EXPONENTS,
    FLOAT_TYPES,
    STORED_AS,
    VALUE_TYPES,
    group_of,
    offsets_of,
)
from sparsepack.errors import FormatError
from sparsepack.layout import LAYOUTS, PackedWeight
from sparsepack.masks import (
    PATTERNS,
    decode_groups,
    from_bits,
    mask_stride,
    row_bytes,
    set_bits,
)

if TYPE_CHECKING:
    from sparsepack.checkpoint import PackedEntry

PACK_AGAIN = (
    "the checkpoint is damaged or was not written by sparsellm: pack the model again"
)


def validate(packed: PackedWeight, name: str) -> None:
    """Checks that a packed weight is consistent. Kernels must only get weights that pass.

    Raises:
        FormatError: with ``name`` and the first condition of ``docs/format.md`` that does not hold.
    """
    with refused_by_name(name):
        _require(
            packed.value_type in VALUE_TYPES,
            f"unknown value type {packed.value_type!r}",
        )
        check_shapes(packed, packed.tensors)
        _check_counts(packed, _check_offsets(packed))
        _check_scales(packed)
        if packed.exponents is not None:
            _require(
                packed.value_type not in FLOAT_TYPES,
                f"exponents with values of type {packed.value_type}",
            )
            _check_tensor("exponents", packed.exponents, torch.int8, (packed.shape[1],))
            for extreme in map(int, packed.exponents.aminmax()):
                _require(
                    extreme in EXPONENTS,
                    f"an exponent is {extreme}, not one of -8 to 7",
                )
        if packed.levels is not None:
            _require(
                packed.value_type == "int4",
                f"levels with values of type {packed.value_type}",
            )
            _check_tensor("levels", packed.levels, torch.int8, (CODES,))


@contextmanager
def refused_by_name(name: str) -> Iterator[None]:
    """Turns a ValueError into a FormatError that names a packed weight."""
    try:
        yield
    except ValueError as error:
        raise FormatError(f"packed weight {name}: {error}; {PACK_AGAIN}") from None


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _check_tensor(
    what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    fits = tensor.dtype == dtype and tuple(tensor.shape) == shape
    _require(
        fits, f"{what} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}"
    )
    _require(tensor.is_contiguous(), f"{what} is not contiguous")


def check_shapes(
    form: PackedWeight | PackedEntry, tensors: Mapping[str, Tensor]
) -> None:
    """Raises a ValueError if the pattern does not fit a weight of this form, or mask and offsets do not. They may be
    on the meta device: nothing is read, and no memory of the weight's size is taken."""
    out, columns = form.shape
    pattern = form.pattern
    _require(out > 0 and columns > 0, f"shape {form.shape} is empty or negative")
    _require(form.layout in LAYOUTS, f"unknown layout {form.layout!r}")
    width = mask_stride(columns)
    if form.layout != "nm":
        _require(pattern is None, f"layout {form.layout} with n and m")
    elif pattern is None:
        raise ValueError("layout nm without n and m")
    else:
        n, m = pattern
        known = ", ".join(f"{n}:{m}" for n, m in PATTERNS)
        _require(pattern in PATTERNS, f"pattern {n}:{m} is none of {known}")
        _require(columns % m == 0, f"{n}:{m} does not fit {columns} columns")
        width = row_bytes(pattern, columns)
    rows = 1 if form.layout == "dense" else out
    _check_tensor("mask", tensors["mask"], torch.uint8, (rows, width))
    if "offsets" in tensors:
        _check_tensor("offsets", tensors["offsets"], torch.int64, (out + 1,))


def _check_offsets(packed: PackedWeight) -> Tensor:
    """The offsets, checked, on the CPU."""
    offsets = packed.offsets.cpu()
    total = int(offsets[-1])
    _require(int(offsets[0]) == 0, f"the first offset is {int(offsets[0])}, not 0")
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if len(falls):
        raise ValueError(f"offsets decrease after row {int(falls[0])}")
    held = packed.values.numel()
    if packed.value_type == "int4":  # two in each
        held *= 2
    _require(held == total, f"{held} values, where offsets end at {total}")
    _check_tensor(
        "values", packed.values, STORED_AS[packed.value_type], (packed.values.numel(),)
    )
    return offsets


def _check_counts(packed: PackedWeight, offsets: Tensor) -> None:
    """Compares the kept columns of each row with its values."""
    out, columns = packed.shape
    if packed.pattern is not None:
        counts = decode_groups(packed.mask, packed.pattern, columns).count_nonzero(
            dim=1
        )
    else:
        padding = from_bits(packed.mask[:, -8:], 64)[
            :, columns - 64 * (packed.mask.shape[1] // 8) :
        ]
        _require(columns % 64 == 0 or not bool(padding.any()), "a padding bit is set")
        counts = set_bits(packed.mask)
        _require(
            packed.layout != "dense" or int(counts) == columns,
            "a bit of a dense weight's mask is not set",
        )
        counts = counts.expand(out)
    sizes = offsets.diff()
    needed = offsets_of(counts, packed.value_type).diff()
    wrong = (sizes != needed).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"row {row} has {int(sizes[row])} values, its mask keeps {int(needed[row])}"
        )


def _check_scales(packed: PackedWeight) -> None:
    scales = packed.scales
    out, columns = packed.shape
    kind = packed.value_type
    if kind in FLOAT_TYPES:
        _require(scales is None, f"scales with values of type {kind}")
        return
    if scales is None:
        raise ValueError(f"no scales with values of type {kind}")
    if kind == "int8" and packed.narrower is None and scales.dim() != 2:
        _check_tensor("scales", scales, torch.float32, (out,))
    else:
        _require(
            scales.dim() == 2,
            f"scales is {tuple(scales.shape)}, not ({out}, groups of columns)",
        )
        groups = scales.shape[1]
        _require(
            group_of(columns, groups) is not None,
            f"{groups} scales a row do not divide {columns} columns",
        )
        _check_tensor("scales", scales, torch.bfloat16, (out, groups))
    _require(bool(torch.isfinite(scales).all()), "a scale is not finite")
