"""One packed sparse weight: kept values, a bitmask or codes for their positions, and row offsets.

The layout is that of the files (``docs/format.md``), so a loaded tensor needs no conversion.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsepack import masks
from sparsepack.codes import (
    CODES,
    EXPONENTS,
    FLOAT_TYPES,
    GROUPED,
    GROUPS,
    READ_AS,
    best_group,
    bytes_of_values,
    codes_of_bytes,
    encode_values,
    group_of,
    groups_of,
    narrowed,
    offsets_of,
    powers_of,
    resolve_value_type,
)
from sparsepack.errors import FormatError, SettingError

LAYOUTS = ("bitmask", "nm", "dense")
FIELDS = ("mask", "values", "offsets", "scales", "exponents", "levels")
"""The tensors of a packed weight; the last three may be missing."""

_DENSE_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PackedWeight:
    """A sparse matrix of ``shape (out, in)``.

    Attributes:
        layout: ``bitmask``; ``nm`` if every ``m`` consecutive columns keep exactly ``n`` values; or ``dense``.
        mask: uint8. ``bitmask``: ``(out, 8·⌈in/64⌉)``; bit ``j`` (the ``j``-th least significant) of byte ``k`` is set
            if column ``8k + j`` is kept; bits from column ``in`` on are 0. ``nm``: ``(out, ⌈in/m·w/8⌉)``, one
            code of ``w`` bits for each group of ``m``; see ``sparsepack.masks``. ``dense``: the bitmask of
            one row, ``(1, 8·⌈in/64⌉)``, with all columns kept; all rows share it.
        values: the kept values, row by row. One-dimensional bf16, fp16, fp32 or int8; or, for int4, uint8 that holds
            two codes, the earlier one in the low nibble, every row beginning on a byte.
        offsets: int64 ``(out + 1,)``: where each row's values begin, counted in values, and where the last row's end.
            For int4, a row with an odd number of values counts one more, so that every offset is even.
        scales: None for floating types. int8: fp32 ``(out,)``, one for each row. int4, and int8 that was int6 or int5:
            bf16 ``(out, ⌈in/group⌉)``, one for each ``group`` (32, 64, … 1024) columns of a row, kept or not.
        value_type: ``bf16``, ``fp16``, ``fp32``, ``int8`` or ``int4``.
        pattern: ``(n, m)`` of the layout ``nm``, else None.
        exponents: int8 ``(in,)``, -8 … 7, for integers: column ``j`` is multiplied by ``2^exponents[j]``; None for
            none.
        levels: the whole number of each code of int4, int8 ``(16,)``; None for the code minus 8.
        narrower: int6, int5 or int3 if a file has the values so: those of int8 are in its range, or all codes of int4
            are 4 … 11; else None."""

    shape: tuple[int, int]
    layout: str
    mask: Tensor
    values: Tensor
    offsets: Tensor
    scales: Tensor | None
    value_type: str
    pattern: masks.NM | None = None
    exponents: Tensor | None = None
    levels: Tensor | None = None
    narrower: str | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors in memory, by field."""
        return {
            field: getattr(self, field)
            for field in FIELDS
            if getattr(self, field) is not None
        }

    @property
    def stored(self) -> dict[str, Tensor]:
        """The tensors in a file, by field: all rows of a dense weight have the same length, so no offsets there."""
        written = self.tensors
        if self.layout == "dense":
            del written["offsets"]
        if self.narrower is not None:
            written["values"] = narrowed(self.values, self.narrower)
        return written

    @property
    def group(self) -> int | None:
        """Columns that share a scale (32, 64, … 1024); None for scales of rows, for none, or if they do not fit."""
        if self.scales is None or self.scales.dim() != 2:
            return None
        return group_of(self.shape[1], self.scales.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in a file."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, **moved)  # type: ignore[arg-type]


def pack(
    weight: Tensor,
    value_type: str = "keep",
    layout: str = "auto",
    exponents: Tensor | None = None,
    group: int | None = None,
) -> PackedWeight | None:
    """Packs a weight on the CPU; returns None if ``layout`` is ``auto`` and the packed form would save no bytes.

    For floating types, ``unpack`` returns every value exactly, except that ``-0.0`` becomes ``0.0``. int8 has a
    scale a row; int6 to int3 have one for each group of columns, the best of seven by squared error.

    Args:
        weight: ``(out, in)``, floating; it is read on the CPU.
        value_type: one of ``sparsepack.codes.WRITTEN_TYPES``, or ``keep`` for the type of the weight.
        layout: ``bitmask``, ``nm`` (1:4, 2:4 or 4:8, whichever the weight satisfies), ``dense`` (all values and no
            bits), or ``auto`` for the smallest one.
        exponents: integers ``(in,)``, -8 to 7: column ``j`` is multiplied by ``2^exponents[j]``; not used for floats.
        group: the columns that share a scale of int6 to int3, 32, 64, … 1024; None for as many as keep about 32.

    Raises:
        SettingError: the value type, layout, group or exponents are wrong, or the weight satisfies no N:M pattern.
        FormatError: the weight is not a floating matrix; ``keep`` is given for a type that has no packed form; or a
            value overflows the value type, or is not finite and the value type is an integer.
    """
    _check_arguments(weight, layout, exponents, group)
    value_type = resolve_value_type(value_type, weight.dtype)
    weight = weight.detach().cpu()
    kept = weight != 0
    pattern = None
    if layout in ("auto", "nm"):
        pattern = masks.detect(kept)
    if layout == "nm" and pattern is None:
        raise SettingError(
            "the weight satisfies none of 1:4, 2:4 and 4:8; leave the layout to 'auto'"
        )
    out, columns = weight.shape
    counts = kept.count_nonzero(dim=1)
    forms = _forms(columns, counts, pattern, value_type=value_type, group=group)
    smallest = min(form for form in forms if layout in ("auto", form.layout))
    if layout == "auto" and smallest.nbytes >= weight.nbytes:
        return None
    if smallest.layout != "nm":
        pattern = None
    kept, mask = _positions(kept, smallest.layout, pattern)
    if value_type in FLOAT_TYPES:
        exponents = None
    if exponents is not None:
        exponents = exponents.to("cpu", torch.int8)
    values, scales, levels = encode_values(
        weight,
        kept,
        value_type=value_type,
        group=smallest.group,
        exponents=exponents,
        layout=smallest.layout,
    )
    read_as = READ_AS[value_type]
    return PackedWeight(
        (out, columns),
        smallest.layout,
        mask=mask,
        values=values,
        offsets=offsets_of(kept.count_nonzero(dim=1), value_type),
        scales=scales,
        value_type=read_as,
        pattern=pattern,
        exponents=exponents,
        levels=levels,
        narrower=None if value_type == read_as else value_type,
    )


def _check_arguments(
    weight: Tensor, layout: str, exponents: Tensor | None, group: int | None
) -> None:
    """Raises the errors of ``pack`` that do not depend on the values."""
    if weight.dim() != 2 or weight.dtype not in _DENSE_TYPES or weight.numel() == 0:
        raise FormatError(
            f"a weight of {weight.dtype} and shape {tuple(weight.shape)} cannot be packed; "
            "only matrices of fp64, fp32, fp16 and bf16 are"
        )
    if layout not in ("auto", *LAYOUTS):
        raise SettingError(
            f"unknown layout {layout!r:.100}; choose one of auto, {', '.join(LAYOUTS)}"
        )
    if group is not None and group not in GROUPS:
        raise SettingError(
            f"group is {group}; give one of {', '.join(map(str, GROUPS))}"
        )
    if exponents is not None and (
        exponents.shape != weight.shape[1:] or not {*exponents.tolist()} <= {*EXPONENTS}
    ):
        raise SettingError("exponents are one whole number for each column, -8 to 7")


def _positions(
    kept: Tensor, layout: str, pattern: masks.NM | None
) -> tuple[Tensor, Tensor]:
    """The positions whose values a layout stores, bool ``(out, in)``, and its mask; ``kept`` are those not zero."""
    if pattern is not None:
        stored = masks.filled(kept, pattern)
        return stored, masks.encode_groups(stored, pattern)
    if layout == "dense":
        stored = torch.ones_like(kept)
        return stored, masks.to_bits(stored[:1])
    return kept, masks.to_bits(kept)


class Form(NamedTuple):
    """A way to store a weight; the least one takes the fewest bytes."""

    nbytes: int
    layout: str
    group: int | None  # columns that share a scale, if any do


def form_of(weight: Tensor, value_type: str) -> Form:
    """The form in which ``pack`` stores a weight ``(out, in)``, which depends on its zeros alone."""
    kept = weight.detach() != 0
    counts = kept.count_nonzero(dim=1).cpu()
    return min(_forms(weight.shape[1], counts, masks.detect(kept), value_type))


def predicted_bytes(
    shape: tuple[int, int],
    zeros: int,
    value_type: str,
    pattern: masks.NM | None = None,
    *,
    exponents: bool = False,
    group: int | None = None,
) -> int:
    """Bytes of a weight ``(out, in)`` in its smallest form, with its zeros spread evenly over the rows.

    ``pattern`` is the N:M that it satisfies, if any; ``exponents``, whether its columns have exponents; ``group`` is
    that of ``pack``."""
    out, columns = shape
    counts = (torch.arange(out + 1) * (out * columns - zeros) // out).diff()
    coded = next(
        (
            other
            for other in masks.PATTERNS
            if pattern is not None and masks.implies(pattern, other)
        ),
        None,
    )
    smallest = min(_forms(columns, counts, coded, value_type=value_type, group=group))
    if exponents:
        return smallest.nbytes + columns
    return smallest.nbytes


def dense_offsets(shape: tuple[int, int], value_type: str) -> Tensor:
    """The offsets of a weight in the layout ``dense``, int64 ``(out + 1,)``."""
    out, columns = shape
    return offsets_of(torch.full((out,), columns), value_type)


def _forms(
    columns: int,
    counts: Tensor,
    pattern: masks.NM | None,
    value_type: str,
    group: int | None = None,
) -> list[Form]:
    """Every form that a weight can have, from the kept values of each row."""
    out = len(counts)
    index_of_rows = 8 * (out + 1)
    parts = {  # values of each row, and bytes of mask and offsets
        "bitmask": (counts, out * masks.mask_stride(columns) + index_of_rows),
        "dense": (torch.full_like(counts, columns), masks.mask_stride(columns)),
    }
    if pattern is not None:
        kept = torch.full_like(counts, columns // pattern[1] * pattern[0])
        parts["nm"] = (kept, out * masks.row_bytes(pattern, columns) + index_of_rows)
    forms = []
    for layout, (values, index) in parts.items():
        size = None
        if value_type in GROUPED:
            size = group or best_group(int(values.sum()) / (out * columns))
        stored = bytes_of_values(
            values, value_type, groups=groups_of(columns, size or 1), layout=layout
        )
        forms.append(Form(index + stored, layout, size))
    return forms


def unpack(packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight ``(out, in)``, on the device of the packed one; by default in the type of floating values, which
    is exact, or in fp32."""
    dtype = dtype or FLOAT_TYPES.get(packed.value_type, torch.float32)
    return unpack_rows(as_bitmask(packed), 0, packed.shape[0], dtype)


def unpack_rows(
    packed: PackedWeight, first: int, last: int, dtype: torch.dtype
) -> Tensor:
    """Rows ``first:last`` of a weight in the layout ``bitmask`` or ``dense``, dense: ``(last - first, in)``."""
    mask = packed.mask
    if packed.layout == "dense":
        mask = mask.expand(last, -1)
    kept = masks.from_bits(mask[first:last], packed.shape[1])
    values = _kept_values(packed, first, last, kept)
    return torch.zeros(kept.shape, dtype=dtype, device=kept.device).masked_scatter_(
        kept, values.to(dtype)
    )


def _kept_values(packed: PackedWeight, first: int, last: int, kept: Tensor) -> Tensor:
    """The kept values of rows ``first:last``, in order; floating types as they are stored, integers as fp32.

    ``kept`` is bool ``(last - first, in)``."""
    start = int(packed.offsets[first])
    stop = int(packed.offsets[last])
    if packed.scales is None:
        return packed.values[start:stop]
    scales = packed.scales[first:last]
    counts = kept.count_nonzero(dim=1)
    if packed.value_type == "int4":
        data = packed.values[start // 2 : stop // 2]
        codes = codes_of_bytes(data, counts)
        if packed.levels is None:
            exact = codes.float() - CODES // 2
        else:
            exact = packed.levels.float()[codes.int()]
    else:
        exact = packed.values[start:stop].float()
    group = packed.group
    if group is None:
        exact *= scales.repeat_interleave(counts)
    else:
        row, column = kept.nonzero(as_tuple=True)
        exact *= scales[row, column // group].float()
    if packed.exponents is not None:
        exact *= powers_of(packed.exponents).expand(kept.shape)[kept]
    return exact


def as_bitmask(packed: PackedWeight) -> PackedWeight:
    """The same weight as kernels read it: codes of N:M become a bitmask; other layouts and values do not change."""
    if packed.pattern is None:
        return packed
    mask = masks.to_bits(
        masks.decode_groups(packed.mask, packed.pattern, packed.shape[1])
    ).to(packed.mask.device)
    return dataclasses.replace(packed, layout="bitmask", mask=mask, pattern=None)
