"""One sparse weight, packed: kept values, a bit or a code for where they stand, and row offsets.

The layout is the one of the files (``docs/format.md``), so that a loaded tensor is used as it is. Everything here is
plain torch and numpy; the kernels that compute on it read the same tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy
import torch
from torch import Tensor

from sparsellm.errors import NumericalError, RecipeError, StorageError, nearest
from sparsellm.packed.masks import decode_groups, encode_groups, row_bytes
from sparsellm.patterns import NM, detect

Layout = Literal["bitmask", "nm"]

FLOAT_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VALUE_TYPES = (*FLOAT_TYPES, "int8", "int4")
_NAME_OF = {dtype: name for name, dtype in FLOAT_TYPES.items()}

GROUP = 32  # kept int4 values that share a scale
_ZERO_NIBBLE = 8  # an int4 value is stored plus 8

# Fractions of the smallest scale at which nothing saturates. Letting an outlier saturate makes the step finer for all
# the others; below 0.7 that never paid on normal or Laplace weights.
_SCALE_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class PackedWeight:
    """A sparse matrix ``W (out, in)``.

    Attributes:
        shape: ``(out, in)``.
        layout: ``bitmask``, or ``nm`` where every ``m`` consecutive inputs keep exactly ``n`` values.
        mask: uint8. ``bitmask``: ``(out, 8·⌈in/64⌉)``; bit ``j`` (the ``j``-th least significant) of byte ``k`` says
            whether column ``8k + j`` is kept; bits from column ``in`` on are 0. ``nm``: ``(out, ⌈in/m·w/8⌉)``, one
            code of ``w`` bits for each group of ``m``; see :mod:`sparsellm.packed.masks`.
        values: the kept values, row by row. One-dimensional bf16, fp16, fp32 or int8; or, for int4, uint8 that holds
            two values, the earlier one in the low nibble, each plus 8, every row beginning on a byte.
        offsets: int64 ``(out + 1,)``: where each row's values begin, counted in values, and where the last row's end.
            For int4, a row with an odd number of values counts one more, so that every offset is even.
        scales: None for floating types. int8: fp32 ``(out,)``, one for each row. int4: bf16 ``(groups,)``, one for
            each 32 consecutive values of a row, the last group of a row possibly shorter; row ``r`` has
            ``⌈(offsets[r + 1] - offsets[r]) / 32⌉`` of them, and the rows' follow one another.
        value_type: ``bf16``, ``fp16``, ``fp32``, ``int8`` or ``int4``.
        pattern: ``(n, m)`` of the layout ``nm``, else None.
    """

    shape: tuple[int, int]
    layout: str
    mask: Tensor
    values: Tensor
    offsets: Tensor
    scales: Tensor | None
    value_type: str
    pattern: tuple[int, int] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names of the fields."""
        found = {"mask": self.mask, "values": self.values, "offsets": self.offsets}
        return found if self.scales is None else {**found, "scales": self.scales}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, in memory as on disk."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, **moved)  # type: ignore[arg-type]


def pack(weight: Tensor, value_type: str = "keep", layout: str = "auto") -> PackedWeight | None:
    """Packs a weight, or says that it is smaller as it is.

    For floating types, :func:`unpack` gives back every value exactly, except that ``-0.0`` returns as ``0.0``. int8 is
    symmetric with one scale a row, the largest magnitude over 127; int4 (-8 … 7) has a scale for each group of 32,
    chosen among seven for the least squared error.

    Args:
        weight: ``(out, in)``, floating; it is read on the CPU.
        value_type: one of :data:`VALUE_TYPES`, or ``keep`` for the weight's own type.
        layout: ``bitmask``, ``nm`` (1:4, 2:4 or 4:8, whichever the weight satisfies), or ``auto`` for the smaller one.

    Returns:
        The packed weight on the CPU; None if ``layout`` is ``auto`` and the dense weight takes no more bytes.

    Raises:
        RecipeError: the value type or the layout is unknown, or the weight satisfies no N:M pattern.
        StorageError: the weight is no floating matrix, or ``keep`` meets a type that has no packed form.
        NumericalError: a value is not finite, and integers were asked for; or it overflows the type asked for.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise StorageError(f"a weight of {weight.dtype} and shape {tuple(weight.shape)} cannot be packed")
    if layout not in ("auto", "bitmask", "nm"):
        raise RecipeError(f"unknown layout {layout!r}; {nearest(layout, ('auto', 'bitmask', 'nm'))}")
    value_type = resolve_value_type(value_type, weight.dtype)
    weight = weight.detach().cpu()
    kept = weight != 0
    pattern = _detect(weight) if layout != "bitmask" else None
    if layout == "nm" and pattern is None:
        raise RecipeError("the weight satisfies none of 1:4, 2:4 and 4:8; leave the layout to 'auto'")
    mask = _to_bits(kept)
    pair: tuple[int, int] | None = None
    counts = _popcount(mask)
    sizes = {"bitmask": _bytes(weight.shape, counts, value_type, None)}
    if pattern is not None:
        full = torch.full_like(counts, weight.shape[1] // pattern.m * pattern.n)
        sizes["nm"] = _bytes(weight.shape, full, value_type, pattern)
    if layout == "auto":
        layout = min(sizes, key=lambda name: sizes[name])
        if sizes[layout] >= weight.numel() * weight.element_size():
            return None
    if layout == "nm":
        assert pattern is not None
        # A group with more zeros than it must have keeps its lowest-numbered ones as values.
        kept = pattern.mask(kept.to(torch.float32))
        counts, mask, pair = full, encode_groups(kept, pattern), (pattern.n, pattern.m)
    values, offsets, scales = _encode(weight[kept], counts, value_type)
    shape = (weight.shape[0], weight.shape[1])
    return PackedWeight(shape, layout, mask, values, offsets, scales, value_type, pair)


def unpack(packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight ``(out, in)``, on the device of the packed one; ``dtype`` None for the type of the values, fp32
    for integers. Exact if the values' type is floating and ``dtype`` can hold it."""
    dtype = dtype or FLOAT_TYPES.get(packed.value_type, torch.float32)
    return unpack_rows(as_bitmask(packed), 0, packed.shape[0], dtype)


def unpack_rows(packed: PackedWeight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows ``first:last`` of a weight in the layout ``bitmask``, dense: ``(last - first, in)``."""
    kept = _from_bits(packed.mask[first:last], packed.shape[1])
    values = decode_rows(packed, first, last, kept).to(dtype)
    dense = torch.zeros(kept.shape, dtype=dtype, device=kept.device)
    return dense.masked_scatter_(kept, values)


def decode_rows(packed: PackedWeight, first: int, last: int, kept: Tensor) -> Tensor:
    """The kept values of rows ``first:last``, in order, with their scales applied: floating types as they are, integers
    as fp32. ``kept (rows, in)`` says where they stand."""
    start, stop = (int(packed.offsets[index]) for index in (first, last))
    if packed.value_type in FLOAT_TYPES:
        return packed.values[start:stop]
    assert packed.scales is not None
    counts = kept.count_nonzero(dim=1)
    if packed.value_type == "int8":
        return packed.values[start:stop].float() * packed.scales[first:last].repeat_interleave(counts)
    data = packed.values[start // 2 : stop // 2]
    slots = torch.stack((data & 15, data >> 4), dim=1).view(-1)
    rows, rank = _places(counts)
    firsts = packed.offsets[first:last] - start
    groups = group_offsets(packed.offsets)[first:last]
    whole = slots[firsts[rows] + rank].float() - _ZERO_NIBBLE
    return whole * packed.scales[groups[rows] + rank // GROUP].float()


def as_bitmask(packed: PackedWeight) -> PackedWeight:
    """The same weight in the layout that kernels compute with: codes of N:M become bits, values stay as they are."""
    if packed.layout == "bitmask":
        return packed
    assert packed.pattern is not None
    kept = decode_groups(packed.mask, NM(*packed.pattern), packed.shape[1])
    mask = _to_bits(kept).to(packed.mask.device)
    return dataclasses.replace(packed, layout="bitmask", mask=mask, pattern=None)


def group_offsets(offsets: Tensor) -> Tensor:
    """``(out + 1,)``: where each row's int4 scales begin, and where the last row's end."""
    groups = (offsets.diff() + GROUP - 1) // GROUP
    return torch.cat((groups.new_zeros(1), groups.cumsum(0)))


def mask_stride(columns: int) -> int:
    """Bytes of one row of a bitmask: whole 64-bit words."""
    return 8 * ((columns + 63) // 64)


def validate(packed: PackedWeight, name: str) -> None:
    """Everything that a kernel relies on to stay inside the tensors; no kernel may see what did not pass.

    Raises:
        StorageError: types or shapes do not fit together, an offset is out of range or less than the one before it,
            a row has not as many values as its mask says, a padding bit is set, a code is none, or a scale is not
            finite. ``name`` is in the message.
    """

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise StorageError(f"packed weight {name}: {what}; the file is damaged or not ours: pack the model again")

    out, columns = packed.shape
    require(out > 0 and columns > 0, f"shape {packed.shape} is empty or negative")
    require(packed.value_type in VALUE_TYPES, f"unknown value type {packed.value_type!r}")
    require(packed.layout in ("bitmask", "nm"), f"unknown layout {packed.layout!r}")
    if packed.layout == "nm":
        require(packed.pattern is not None, "layout nm without n and m")
        assert packed.pattern is not None
        n, m = packed.pattern
        require(0 < n < m <= 8 and columns % m == 0, f"{n}:{m} does not fit {columns} inputs")
        width = row_bytes(NM(n, m), columns)
    else:
        require(packed.pattern is None, f"layout {packed.layout} with n and m")
        width = mask_stride(columns)
    _require_tensor(require, "mask", packed.mask, torch.uint8, (out, width))
    _require_tensor(require, "offsets", packed.offsets, torch.int64, (out + 1,))
    offsets = packed.offsets.cpu()
    require(int(offsets[0]) == 0, f"the first offset is {int(offsets[0])}, not 0")
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    require(len(falls) == 0, f"offsets decrease after row {int(falls[0]) if len(falls) else 0}")
    total = int(offsets[-1])
    stored = {"int8": torch.int8, "int4": torch.uint8}.get(packed.value_type) or FLOAT_TYPES[packed.value_type]
    require(packed.values.dtype == stored, f"values are {packed.values.dtype}, not {stored}")
    held = packed.values.numel() * (2 if packed.value_type == "int4" else 1)
    require(packed.values.dim() == 1 and held == total, f"{held} values, where offsets end at {total}")
    if packed.layout == "nm":
        pattern = NM(*packed.pattern)  # type: ignore[misc]
        try:
            decode_groups(packed.mask, pattern, columns)
        except ValueError as error:
            require(False, str(error))
        counts = torch.full((out,), columns // pattern.m * pattern.n, dtype=torch.int64)
    else:
        counts = _popcount(packed.mask)
        spare = packed.mask.shape[1] * 8 - columns
        if spare:
            require(not bool(_from_bits(packed.mask, columns + spare)[:, columns:].any()), "a padding bit is set")
    if packed.value_type == "int4":
        counts = counts + counts % 2
    wrong = (counts != offsets.diff()).nonzero()
    if len(wrong):
        row = int(wrong[0])
        require(False, f"row {row} has {int(offsets.diff()[row])} values, its mask says {int(counts[row])}")
    if packed.value_type in FLOAT_TYPES:
        require(packed.scales is None, f"scales with values of type {packed.value_type}")
        return
    require(packed.scales is not None, f"no scales with values of type {packed.value_type}")
    assert packed.scales is not None
    if packed.value_type == "int8":
        _require_tensor(require, "scales", packed.scales, torch.float32, (out,))
    else:
        _require_tensor(require, "scales", packed.scales, torch.bfloat16, (int(group_offsets(offsets)[-1]),))
    require(bool(torch.isfinite(packed.scales).all()), "a scale is not finite")


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
    if value_type not in VALUE_TYPES:
        raise RecipeError(f"unknown value type {value_type!r}; {nearest(value_type, ('keep', *VALUE_TYPES))}")
    return value_type


def _detect(weight: Tensor) -> NM | None:
    """:func:`detect`, but an unstructured weight, which hardly passes in its first rows, is not read through."""
    return detect(weight) if detect(weight[:16]) is not None else None


def _encode(kept: Tensor, counts: Tensor, value_type: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kept values ``(kept,)``, ``counts (out,)`` of them in each row, as values, offsets and scales."""
    offsets = torch.cat((counts.new_zeros(1), (counts + counts % 2 if value_type == "int4" else counts).cumsum(0)))
    if value_type in FLOAT_TYPES:
        values = kept.to(FLOAT_TYPES[value_type])
        overflowed = int((torch.isfinite(kept) & ~torch.isfinite(values)).sum())
        if overflowed:
            raise NumericalError(f"{overflowed} weights are too large for {value_type}; choose bf16 or fp32")
        return values, offsets, None
    if not bool(torch.isfinite(kept).all()):
        raise NumericalError(f"a weight is NaN or infinite and cannot be stored as {value_type}")
    rows, rank = _places(counts)
    exact = kept.float()
    if value_type == "int8":
        largest = exact.new_zeros(len(counts)).scatter_reduce_(0, rows, exact.abs(), "amax")
        scales = largest / 127
        return (exact / scales[rows]).round_().clamp_(-127, 127).to(torch.int8), offsets, scales
    starts = group_offsets(offsets)
    grouped = exact.new_zeros(int(starts[-1]), GROUP)
    place = starts[rows] * GROUP + rank
    grouped.view(-1)[place] = exact
    whole, scales = _quantise_groups(grouped)
    slots = torch.full((int(offsets[-1]),), _ZERO_NIBBLE, dtype=torch.uint8)
    slots[offsets[rows] + rank] = (whole.view(-1)[place] + _ZERO_NIBBLE).to(torch.uint8)
    pairs = slots.view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4), offsets, scales


def _quantise_groups(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers -8 … 7 ``(groups, 32)`` and bf16 scales ``(groups,)``, of the scales tried the best for each group.

    The value of largest magnitude takes -8, the number without a mirror image, so a scale may be negative.
    """
    extreme = grouped.gather(1, grouped.abs().argmax(dim=1, keepdim=True))  # (groups, 1)
    best = torch.full_like(extreme, math.inf)
    whole, scales = torch.zeros_like(grouped), torch.zeros_like(extreme)
    for fraction in _SCALE_FRACTIONS:
        scale = (extreme / -8 * fraction).bfloat16().float()  # as it will be read
        tried = torch.where(scale == 0, 0.0, grouped / scale).round_().clamp_(-8, 7)
        error = (tried * scale - grouped).square().sum(dim=1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        whole = torch.where(better, tried, whole)
    return whole, scales.squeeze(1).bfloat16()


def _places(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each kept value its row, and how many stand before it in that row."""
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    return rows, torch.arange(len(rows), device=counts.device) - starts[rows]


def _bytes(shape: torch.Size, counts: Tensor, value_type: str, pattern: NM | None) -> int:
    """Bytes of a packed weight with so many values in each row."""
    out, columns = shape
    index = out * (row_bytes(pattern, columns) if pattern else mask_stride(columns)) + 8 * (out + 1)
    kept = int(counts.sum())
    if value_type == "int8":
        return index + kept + 4 * out
    if value_type == "int4":
        return index + int(((counts + 1) // 2).sum()) + 2 * int(((counts + GROUP - 1) // GROUP).sum())
    return index + kept * FLOAT_TYPES[value_type].itemsize


def _to_bits(kept: Tensor) -> Tensor:
    """Bool ``(out, in)`` as a bitmask ``(out, stride)``."""
    out, columns = kept.shape
    padded = numpy.zeros((out, 8 * mask_stride(columns)), dtype=bool)
    padded[:, :columns] = kept.cpu().numpy()
    return torch.from_numpy(numpy.packbits(padded, axis=1, bitorder="little"))


def _from_bits(mask: Tensor, columns: int) -> Tensor:
    """A bitmask ``(rows, stride)`` as bool ``(rows, columns)``, on its device."""
    if mask.device.type == "cpu":
        return torch.from_numpy(numpy.unpackbits(mask.numpy(), axis=1, count=columns, bitorder="little")).view(
            torch.bool
        )
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.view(len(mask), -1)[:, :columns].bool()


def _popcount(mask: Tensor) -> Tensor:
    """Bits set in each row of a bitmask, int64 ``(rows,)``: 64 at a time, by adding up pairs, nibbles, bytes."""
    words = numpy.ascontiguousarray(mask.cpu().numpy()).view(numpy.uint64)
    words = words - ((words >> numpy.uint64(1)) & numpy.uint64(0x5555555555555555))
    quads = numpy.uint64(0x3333333333333333)
    words = (words & quads) + ((words >> numpy.uint64(2)) & quads)
    words = (words + (words >> numpy.uint64(4))) & numpy.uint64(0x0F0F0F0F0F0F0F0F)
    return torch.from_numpy(words.view(numpy.uint8).sum(axis=1, dtype=numpy.int64))


def _require_tensor(
    require: Callable[[bool, str], None], what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    require(
        tensor.dtype == dtype and tuple(tensor.shape) == shape,
        f"{what} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}",
    )
