"""Rows and columns of packed weights, and several packed weights as one, for programs that divide or fuse linears.

All work on stored numbers, so nothing is rounded again. Weights have passed
``sparsepack.validation.validate``, are on the CPU, and are bitmasks or dense, as
``sparsepack.layout.as_bitmask`` returns them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsepack.codes import bytes_of_codes, codes_of_bytes, offsets_of
from sparsepack.errors import FormatError
from sparsepack.layout import PackedWeight, dense_offsets
from sparsepack.masks import from_bits

WORD = 64  # columns in a word of a mask


def rows_of(packed: PackedWeight, first: int, last: int) -> PackedWeight:
    """Rows ``first:last`` of a packed weight."""
    offsets = packed.offsets[first : last + 1]
    in_element = 2 if packed.value_type == "int4" else 1
    begin = int(offsets[0]) // in_element
    end = int(offsets[-1]) // in_element
    mask = packed.mask
    if packed.layout != "dense":
        mask = mask[first:last]
    scales = packed.scales
    if scales is not None:
        scales = scales[first:last].clone()
    return dataclasses.replace(
        packed,
        shape=(last - first, packed.shape[1]),
        mask=mask.clone(),
        values=packed.values[begin:end].clone(),
        offsets=offsets - offsets[0],
        scales=scales,
    )


def columns_of(packed: PackedWeight, part: int, parts: int, name: str) -> PackedWeight:
    """The columns of one of some parts of equal width.

    Raises:
        FormatError: with ``name``, if a part is not a whole number of words of the mask and of groups with one scale.
    """
    out, columns = packed.shape
    unit = max(WORD, packed.group or 1)
    if columns % (parts * unit):
        raise FormatError(
            f"packed weight {name} has {columns} columns, which {parts} ranks cannot share in multiples of {unit}; "
            "take fewer ranks"
        )
    width = columns // parts
    part_of_columns = slice(part * width, (part + 1) * width)
    kept = from_bits(packed.mask, columns).expand(out, -1)
    stored = packed.values
    if packed.value_type == "int4":
        stored = codes_of_bytes(stored, kept.count_nonzero(dim=1))
    table = torch.zeros(kept.shape, dtype=stored.dtype)
    table[kept] = stored
    kept = kept[:, part_of_columns]
    values = table[:, part_of_columns][kept]
    counts = kept.count_nonzero(dim=1)
    if packed.value_type == "int4":
        values = bytes_of_codes(values, counts)
    mask = packed.mask[:, part * width // 8 : (part + 1) * width // 8]
    scales = packed.scales
    if scales is not None and packed.group is not None:
        first_group = part * width // packed.group
        scales = scales[:, first_group : first_group + width // packed.group]
        scales = scales.contiguous()
    exponents = packed.exponents
    if exponents is not None:
        exponents = exponents[part_of_columns].clone()
    return dataclasses.replace(
        packed,
        shape=(out, width),
        mask=mask.contiguous(),
        values=values,
        offsets=offsets_of(counts, packed.value_type),
        scales=scales,
        exponents=exponents,
    )


def with_rows(packed: PackedWeight, rows: int) -> PackedWeight:
    """The weight with rows of zeros after its own, ``rows`` in all."""
    out, columns = packed.shape
    more = rows - out
    scales = packed.scales
    if scales is not None:
        scales = torch.cat((scales, scales.new_zeros(more, *scales.shape[1:])))
    mask = packed.mask
    values = packed.values
    offsets = torch.cat((packed.offsets, packed.offsets[-1:].expand(more)))
    if packed.layout == "dense":
        offsets = dense_offsets((rows, columns), packed.value_type)
        values = torch.cat((values, values.new_zeros(len(values) // out * more)))
    else:
        mask = torch.cat((mask, mask.new_zeros(more, mask.shape[1])))
    return dataclasses.replace(
        packed,
        shape=(rows, columns),
        mask=mask,
        values=values,
        offsets=offsets,
        scales=scales,
    )


def joined(weights: Sequence[PackedWeight]) -> list[PackedWeight]:
    """The weights with the same columns one below the other, as few as their forms allow.

    Neighbours become one weight if they have one layout, one type, one group, and the same exponents and levels."""
    runs: list[list[PackedWeight]] = []
    for packed in weights:
        if runs and _alike(runs[-1][-1], packed):
            runs[-1].append(packed)
        else:
            runs.append([packed])
    return [_one_below_the_other(run) for run in runs]


def _alike(one: PackedWeight, other: PackedWeight) -> bool:
    forms = [
        (packed.shape[1], packed.layout, packed.value_type, packed.group)
        for packed in (one, other)
    ]
    return (
        forms[0] == forms[1]
        and _same(one.exponents, other.exponents)
        and _same(one.levels, other.levels)
    )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _one_below_the_other(weights: Sequence[PackedWeight]) -> PackedWeight:
    first = weights[0]
    if len(weights) == 1:
        return first
    mask = first.mask
    if first.layout != "dense":
        mask = torch.cat([packed.mask for packed in weights])
    offsets = [first.offsets[:1]]
    for packed in weights:
        offsets.append(packed.offsets[1:] + offsets[-1][-1])
    scales = None
    if first.scales is not None:
        scales = torch.cat([packed.scales for packed in weights])  # type: ignore[misc]
    return dataclasses.replace(
        first,
        shape=(sum(packed.shape[0] for packed in weights), first.shape[1]),
        mask=mask,
        values=torch.cat([packed.values for packed in weights]),
        offsets=torch.cat(offsets),
        scales=scales,
        narrower=None,
    )
