"""Checks of a packed weight: all conditions that keep a kernel's memory accesses inside the tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsellm.errors import StorageError
from sparsellm.patterns import NM
from sparsepack.codes import CODES, EXPONENTS, FLOAT_TYPES, SCALES_OF, STORED_AS, VALUE_TYPES, group_of
from sparsepack.layout import LAYOUTS, PackedWeight
from sparsepack.masks import PATTERNS, decode_groups, from_bits, mask_stride, popcount, row_bytes

PACK_AGAIN = "the checkpoint is damaged or was not written by sparsellm: pack the model again"


def validate(packed: PackedWeight, name: str) -> None:
    """Checks that a packed weight is consistent. Kernels must only get weights that pass.

    Raises:
        StorageError: value type, layout or pattern is unknown; types or shapes of the tensors do not fit together; an
            offset is out of range or less than the one before it; the number of values in a row is not the number of
            inputs that its mask keeps; a padding bit is set, or a bit of a dense weight's mask is not; a code is not
            below C(m, n); a scale is not finite; an exponent is not -8 … 7; or there are levels of other values than
            int4, or not 16 of them.
            The message contains ``name``.
    """
    try:
        _check_description(packed)
        offsets = _check_offsets(packed)
        _check_counts(_counts(packed), offsets, packed.value_type)
        _check_scales(packed)
        _check_exponents(packed)
        _check_levels(packed)
    except ValueError as error:
        raise StorageError(f"packed weight {name}: {error}; {PACK_AGAIN}") from None


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _check_description(packed: PackedWeight) -> None:
    out, columns = packed.shape
    _require(out > 0 and columns > 0, f"shape {packed.shape} is empty or negative")
    _require(packed.value_type in VALUE_TYPES, f"unknown value type {packed.value_type!r}")
    _require(packed.layout in LAYOUTS, f"unknown layout {packed.layout!r}")
    rows = 1 if packed.layout == "dense" else out
    if packed.layout != "nm":
        _require(packed.pattern is None, f"layout {packed.layout} with n and m")
        width = mask_stride(columns)
    else:
        _require(packed.pattern is not None, "layout nm without n and m")
        assert packed.pattern is not None
        n, m = packed.pattern
        known = any((n, m) == (pattern.n, pattern.m) for pattern in PATTERNS)
        _require(known, f"pattern {n}:{m} is none of {', '.join(map(str, PATTERNS))}")
        _require(columns % m == 0, f"{n}:{m} does not fit {columns} inputs")
        width = row_bytes(NM(n, m), columns)
    _check_tensor("mask", packed.mask, torch.uint8, (rows, width))


def _check_offsets(packed: PackedWeight) -> Tensor:
    """The offsets, checked, on the CPU."""
    _check_tensor("offsets", packed.offsets, torch.int64, (packed.shape[0] + 1,))
    offsets = packed.offsets.cpu()
    _require(int(offsets[0]) == 0, f"the first offset is {int(offsets[0])}, not 0")
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    _require(len(falls) == 0, f"offsets decrease after row {int(falls[0]) if len(falls) else 0}")
    stored = STORED_AS[packed.value_type]
    _require(packed.values.dtype == stored, f"values are {packed.values.dtype}, not {stored}")
    held = packed.values.numel() * (2 if packed.value_type == "int4" else 1)
    total = int(offsets[-1])
    _require(packed.values.dim() == 1 and held == total, f"{held} values, where offsets end at {total}")
    return offsets


def _counts(packed: PackedWeight) -> Tensor:
    """The number of kept inputs of each row, int64 ``(out,)``."""
    out, columns = packed.shape
    if packed.pattern is not None:
        pattern = NM(*packed.pattern)
        decode_groups(packed.mask, pattern, columns)
        return torch.full((out,), columns // pattern.m * pattern.n, dtype=torch.int64)
    bits = packed.mask.shape[1] * 8
    if bits > columns:
        _require(not bool(from_bits(packed.mask, bits)[:, columns:].any()), "a padding bit is set")
    counts = popcount(packed.mask)
    if packed.layout == "dense":
        _require(int(counts) == columns, "a bit of a dense weight's mask is not set")
    return counts.expand(out)


def _check_counts(counts: Tensor, offsets: Tensor, value_type: str) -> None:
    if value_type == "int4":  # every row begins on a byte
        counts = counts + counts % 2
    wrong = (counts != offsets.diff()).nonzero()
    if len(wrong):
        row = int(wrong[0])
        _require(False, f"row {row} has {int(offsets.diff()[row])} values, its mask keeps {int(counts[row])}")


def _check_scales(packed: PackedWeight) -> None:
    if packed.value_type in FLOAT_TYPES:
        _require(packed.scales is None, f"scales with values of type {packed.value_type}")
        return
    _require(packed.scales is not None, f"no scales with values of type {packed.value_type}")
    assert packed.scales is not None
    out, columns = packed.shape
    shape: tuple[int, ...] = (out,)
    if packed.value_type == "int4":
        _require(packed.scales.dim() == 2, f"scales is {tuple(packed.scales.shape)}, not ({out}, groups of columns)")
        groups = packed.scales.shape[1]
        _require(group_of(columns, groups) is not None, f"{groups} scales a row do not divide {columns} columns")
        shape = (out, groups)
    _check_tensor("scales", packed.scales, SCALES_OF[packed.value_type], shape)
    _require(bool(torch.isfinite(packed.scales).all()), "a scale is not finite")


def _check_exponents(packed: PackedWeight) -> None:
    if packed.exponents is None:
        return
    _require(packed.value_type not in FLOAT_TYPES, f"exponents with values of type {packed.value_type}")
    _check_tensor("exponents", packed.exponents, torch.int8, (packed.shape[1],))
    least, most = int(packed.exponents.min()), int(packed.exponents.max())
    wrong = least if least < EXPONENTS.start else most
    _require(wrong in EXPONENTS, f"an exponent is {wrong}, not one of {EXPONENTS.start} to {EXPONENTS.stop - 1}")


def _check_levels(packed: PackedWeight) -> None:
    if packed.levels is not None:
        _require(packed.value_type == "int4", f"levels with values of type {packed.value_type}")
        _check_tensor("levels", packed.levels, torch.int8, (CODES,))


def _check_tensor(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    _require(
        tensor.dtype == dtype and tuple(tensor.shape) == shape,
        f"{what} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}",
    )
