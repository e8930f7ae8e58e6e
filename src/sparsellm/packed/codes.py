"""Storage of kept values: floating types unchanged, int8 with scales of rows, int4 with scales of groups of columns.

int4 values are stored plus 8, two to a byte, the earlier one in the low nibble; every row begins on a byte. Integers
may have an exponent for each column besides: a value is then its whole number, times its scale, times 2 to that power.
"""

from __future__ import annotations

import math
import string

import numpy
import torch
from torch import Tensor, nn

from sparsellm.errors import NumericalError, RecipeError, StorageError, nearest

FLOAT_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VALUE_TYPES = (*FLOAT_TYPES, "int8", "int4")  # in memory
WRITTEN_TYPES = (*VALUE_TYPES, "int3")  # in files; int3 becomes int4 when it is read
GROUPED = ("int4", "int3")  # types whose scales are of groups of columns
ENDS = {"int4": (-8, 7), "int3": (-4, 3)}
STORED_AS = {**FLOAT_TYPES, "int8": torch.int8, "int4": torch.uint8}
SCALES_OF = {"int8": torch.float32, "int4": torch.bfloat16}
_NAME_OF = {dtype: name for name, dtype in FLOAT_TYPES.items()}

GROUP = 32  # columns in the smallest group of int4 that shares a scale; a larger one is this times a power of two
LARGEST_GROUP = 1024
_ZERO_NIBBLE = 8  # an int4 value is stored plus 8
EXPONENTS = range(-8, 8)  # of columns; one is a hexadecimal digit in the records of a run

# Fractions of the smallest scale at which nothing saturates. If an outlier saturates, the step is finer for all other
# values; below 0.7 that never lowered the error on normal or Laplace weights.
_SCALE_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_GROUPS_AT_ONCE = 8192  # whose scales are tried: what a trial needs stays in the cache, which is three times as fast


def resolve_value_type(value_type: str, dtype: torch.dtype) -> str:
    """``keep`` as the name of ``dtype``; any other name is checked.

    Raises:
        RecipeError: the name is unknown.
        StorageError: ``keep``, and the dtype has no packed form.
    """
    if value_type == "keep":
        if dtype not in _NAME_OF:
            raise StorageError(f"values of {dtype} have no packed form; choose one of {', '.join(VALUE_TYPES)}")
        return _NAME_OF[dtype]
    if value_type not in WRITTEN_TYPES:
        raise RecipeError(f"unknown value type {value_type!r}; {nearest(value_type, ('keep', *WRITTEN_TYPES))}")
    return value_type


def type_of_values(dtype: torch.dtype) -> str:
    """The value type that is stored as ``dtype``.

    Raises:
        StorageError: there is none.
    """
    for name, stored in STORED_AS.items():
        if stored == dtype:
            return name
    raise StorageError(f"packed values cannot be {dtype}; pack the model again")


def group_of(columns: int, groups: int) -> int | None:
    """The columns that share a scale (32, 64, … 1024) where a row has so many scales; None if none fits."""
    sizes = (GROUP << step for step in range((LARGEST_GROUP // GROUP).bit_length()))
    return next((size for size in sizes if groups_of(columns, size) == groups), None)


def best_group(share: float) -> int:
    """The columns that share a scale where this share of the weights is kept: so many that about 32 are kept."""
    group = GROUP
    while group < LARGEST_GROUP and group * share < GROUP / math.sqrt(2):
        group *= 2
    return group


def groups_of(columns: int, group: int) -> int:
    """The scales of one row of int4."""
    return (columns + group - 1) // group


def powers_of(exponents: Tensor) -> Tensor:
    """Two to the power of each exponent, fp32."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)


def text_of_exponents(exponents: Tensor | None) -> str:
    """One hexadecimal digit for each column, the exponent plus 8; empty for None."""
    return "" if exponents is None else "".join(f"{exponent - EXPONENTS.start:x}" for exponent in exponents.tolist())


def exponents_of_text(text: str) -> Tensor | None:
    """The inverse of :func:`text_of_exponents`: int8 ``(in,)``, or None."""
    if not text:
        return None
    digits = bytes(int(chr(code), 16) if chr(code) in string.hexdigits else 0 for code in range(256))
    return torch.frombuffer(bytearray(text.encode("ascii").translate(digits)), dtype=torch.int8) + EXPONENTS.start


def encode_values(
    weight: Tensor, kept: Tensor, value_type: str, group: int | None, exponents: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values, offsets and scales of the kept values of a weight ``(out, in)``; ``kept`` is bool of its shape.

    ``exponents`` are those of the columns, for integers alone. Values of int3 are those of int4, -4 … 3.

    Raises:
        NumericalError: a value overflows the type, or is not finite and the type is an integer.
    """
    counts = kept.count_nonzero(dim=1)
    offsets = torch.cat((counts.new_zeros(1), (counts + counts % 2 if value_type in GROUPED else counts).cumsum(0)))
    values = weight[kept]
    if value_type in FLOAT_TYPES:
        stored = values.to(FLOAT_TYPES[value_type])
        overflowed = int((torch.isfinite(values) & ~torch.isfinite(stored)).sum())
        if overflowed:
            raise NumericalError(f"{overflowed} weights are too large for {value_type}; choose bf16 or fp32")
        return stored, offsets, None
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(f"a weight is NaN or infinite and cannot be stored as {value_type}")
    exact = weight.float() if exponents is None else weight.float() * powers_of(-exponents)
    if value_type == "int8":
        scales = exact.abs().amax(dim=1) / 127
        return (exact / scales.unsqueeze(1)).round_().clamp_(-127, 127)[kept].to(torch.int8), offsets, scales
    assert group is not None
    groups = groups_of(weight.shape[1], group)
    padded = nn.functional.pad(exact, (0, groups * group - weight.shape[1])).view(-1, group)
    whole, scales = _quantise_groups(padded, *ENDS[value_type])
    codes = whole.view(len(weight), -1)[:, : weight.shape[1]][kept]
    rows, rank = _places(counts)
    slots = torch.full((int(offsets[-1]),), _ZERO_NIBBLE, dtype=torch.uint8)
    slots[offsets[rows] + rank] = (codes + _ZERO_NIBBLE).to(torch.uint8)
    pairs = slots.view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4), offsets, scales.view(len(weight), groups)


def decode_values(
    value_type: str,
    values: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    rows: slice,
    kept: Tensor,
    group: int | None,
    exponents: Tensor | None = None,
) -> Tensor:
    """The kept values of some rows, in order, with their scales applied.

    Args:
        value_type: one of :data:`VALUE_TYPES`.
        values, offsets, scales: of the whole weight, as :func:`encode_values` returns them.
        rows: the rows, ``first:last``.
        kept: bool ``(rows, in)``, the columns that are kept in each of these rows.
        group: the columns that share a scale of int4.
        exponents: of the columns, or None.

    Returns:
        One number for each kept weight; floating types as they are stored, integers as fp32.
    """
    start, stop = int(offsets[rows.start]), int(offsets[rows.stop])
    if value_type in FLOAT_TYPES:
        return values[start:stop]
    assert scales is not None
    counts = kept.count_nonzero(dim=1)
    factor = None if exponents is None else powers_of(exponents).expand(kept.shape)[kept]
    if value_type == "int8":
        found = values[start:stop].float() * scales[rows].repeat_interleave(counts)
        return found if factor is None else found.mul_(factor)
    assert group is not None
    data = values[start // 2 : stop // 2]
    slots = torch.stack((data & 15, data >> 4), dim=1).view(-1)
    row, rank = _places(counts)
    whole = slots[(offsets[rows] - start)[row] + rank].float() - _ZERO_NIBBLE
    column = kept.nonzero()[:, 1]
    found = whole * scales[rows][row, column // group].float()
    return found if factor is None else found.mul_(factor)


def bytes_of_values(counts: Tensor, value_type: str, groups: int) -> int:
    """Bytes of values and scales, for ``counts (out,)`` values in each row and ``groups`` scales of int4 a row."""
    kept = int(counts.sum())
    if value_type == "int8":
        return kept + 4 * len(counts)
    if value_type in GROUPED:
        pairs = int(((counts + 1) // 2).sum())
        return (pairs if value_type == "int4" else bytes_of_three_bits(2 * pairs)) + 2 * groups * len(counts)
    return kept * FLOAT_TYPES[value_type].itemsize


def bytes_of_three_bits(values: int) -> int:
    """Bytes of so many values of int3."""
    return (3 * values + 7) // 8


def narrowed(nibbles: Tensor) -> Tensor:
    """Values of int4 that are all -4 … 3 in three bits each, plus 4, least significant bit first: uint8."""
    codes = torch.stack((nibbles & 15, nibbles >> 4), dim=1).view(-1, 1) - (_ZERO_NIBBLE + ENDS["int3"][0])
    bits = numpy.unpackbits(codes.numpy(), axis=1, count=3, bitorder="little")
    return torch.from_numpy(numpy.packbits(bits.reshape(-1), bitorder="little"))


def widened(data: Tensor, values: int) -> Tensor:
    """The inverse of :func:`narrowed` for an even number of values.

    Raises:
        StorageError: there are not so many values, or a bit after the last is set.
    """
    if values < 0 or values % 2 or data.dtype != torch.uint8 or tuple(data.shape) != (bytes_of_three_bits(values),):
        raise StorageError(
            f"{data.dtype} {tuple(data.shape)} are not {values} values of three bits; pack the model again"
        )
    bits = numpy.unpackbits(data.numpy(), bitorder="little")
    if bits[3 * values :].any():
        raise StorageError("a bit after the last value of three bits is set; pack the model again")
    codes = numpy.packbits(bits[: 3 * values].reshape(-1, 3), axis=1, bitorder="little")
    pairs = torch.from_numpy(codes).view(-1, 2) + (_ZERO_NIBBLE + ENDS["int3"][0])
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _quantise_groups(grouped: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """Integers ``lowest`` … ``highest`` ``(groups, columns)`` and bf16 scales ``(groups,)``: the best of those tried.

    The value of largest magnitude becomes the lowest, which has no positive counterpart, so a scale may be negative.
    """
    whole, scales = torch.empty_like(grouped), grouped.new_empty(len(grouped), dtype=torch.bfloat16)
    for first in range(0, len(grouped), _GROUPS_AT_ONCE):
        part = slice(first, first + _GROUPS_AT_ONCE)
        whole[part], scales[part] = _best_of_scales(grouped[part], lowest, highest)
    return whole, scales


def _best_of_scales(grouped: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    extreme = grouped.gather(1, grouped.abs().argmax(dim=1, keepdim=True))  # (groups, 1)
    best = torch.full_like(extreme, math.inf)
    whole, scales = torch.zeros_like(grouped), torch.zeros_like(extreme)
    for fraction in _SCALE_FRACTIONS:
        scale = (extreme / lowest * fraction).bfloat16().float()  # rounded as it will be read
        tried = torch.where(scale == 0, 0.0, grouped / scale).round_().clamp_(lowest, highest)
        error = (tried * scale - grouped).square().sum(dim=1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        whole = torch.where(better, tried, whole)
    return whole, scales.squeeze(1).bfloat16()


def _places(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The row of each kept value, and its rank in that row, from 0."""
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    return rows, torch.arange(len(rows), device=counts.device) - starts[rows]
