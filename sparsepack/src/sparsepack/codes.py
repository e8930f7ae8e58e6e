"""Storage of kept values: floating types unchanged, int8 with scales of rows, others with scales of groups of columns.

int6 and int5 are whole numbers -32 … 31 and -16 … 15, which take a byte in memory, and six or five bits in a file.
int4 values are codes, two to a byte, the earlier one in the low nibble; every row begins on a byte. A code stands for a
whole number: -8 … 7 for int4; for int3, -4 … 3 or eight uneven ones that leave out the gap around 0 where pruned values
were (``Levels``). Integers may have an exponent for each column: a value is then its whole number, times its
scale, times 2 to that power.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from sparsepack.arguments import SHORT_DTYPES
from sparsepack.errors import FormatError, SettingError
from sparsepack.masks import bits_of_bytes, bytes_of_bits

FLOAT_TYPES: dict[str, torch.dtype] = {
    short: getattr(torch, name) for short, name in SHORT_DTYPES.items()
}
STORED_AS = {**FLOAT_TYPES, "int8": torch.int8, "int4": torch.uint8}
VALUE_TYPES = tuple(STORED_AS)  # in memory
TYPE_OF = {dtype: value_type for value_type, dtype in STORED_AS.items()}
BITS = {  # bits that a value has in a file
    "bf16": 16,
    "fp16": 16,
    "fp32": 32,
    "int8": 8,
    "int4": 4,
    "int6": 6,
    "int5": 5,
    "int3": 3,
}
WRITTEN_TYPES = tuple(BITS)  # in files
# What a reader makes of a type in a file, since kernels run it. int8 has the scales of groups then.
READ_AS = {value_type: value_type for value_type in VALUE_TYPES}
READ_AS |= {"int6": "int8", "int5": "int8", "int3": "int4"}

GROUPS = (32, 64, 128, 256, 512, 1024)  # columns that may share a scale
CODES = 16  # those of int4; int3 has the eight in the middle
# a column has one; it is a hexadecimal digit in the records of a run
EXPONENTS = range(-8, 8)

# Fractions of the scale with which the value of largest magnitude becomes the lowest number. If an outlier saturates,
# the step is finer for all other values; below 0.7 that never lowered the error on normal or Laplace weights.
_SCALE_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_JUDGES = 2048  # groups that tell whether a weight is on a grid
ON_GRID = 1e-4  # relative squared error of a weight that is on a grid; rounding to bf16 is below 4e-6
_GROUPS_AT_ONCE = 8192  # whose scales are tried: what a trial needs stays in the cache, which is three times as fast


@dataclass(frozen=True)
class Levels:
    """The whole numbers that values of an integer type are, in units of their scale, ascending.

    Of two neighbours in uneven ones, one is odd and one even, so their middle is not a whole number: a value that is
    rounded to a whole number first still has the same nearest one."""

    numbers: tuple[int, ...]

    @property
    def lowest(self) -> int:
        """The number that the value of largest magnitude in a group becomes."""
        return self.numbers[0]

    @property
    def closest(self) -> int:
        """The least distance of two numbers."""
        return min(
            after - before
            for before, after in zip(self.numbers, self.numbers[1:], strict=False)
        )

    @property
    def even(self) -> bool:
        """Whether they follow each other by one, 0 included."""
        return len(self.numbers) == 1 + self.numbers[-1] - self.numbers[0]

    def nearest(self, units: Tensor, *, zero: bool = False) -> Tensor:
        """The nearest numbers. With ``zero``, 0 is one like any other, or none; else only a value of 0 becomes 0."""
        rounded = units.round().clamp_(self.lowest, self.numbers[-1])
        # Signs are added and multiplied: bools take a CPU up to fifty times as long as numbers.
        if self.even and zero:
            return rounded
        if self.even:
            is_zero = rounded.abs().clamp_(max=1).sub_(1).neg_()
            return rounded.add_(is_zero.mul_(units.sign()))
        # a scale is NaN where a value is
        places = rounded.sub_(self.lowest).nan_to_num_().to(torch.int32)
        nearest = (
            nearest_levels(self.numbers, units.device)
            .index_select(0, places.view(-1))
            .view_as(units)
        )
        if zero:
            return nearest
        return nearest.mul_(units.sign().abs_())

    def codes(self, numbers: Tensor) -> Tensor:
        """The codes 0 … 15 of some of the numbers, uint8."""
        if self.even:
            return (numbers + CODES // 2).to(torch.uint8)
        table = torch.zeros(1 - self.lowest + self.numbers[-1], dtype=torch.uint8)
        table[torch.tensor(self.numbers) - self.lowest] = torch.arange(
            len(self.numbers), dtype=torch.uint8
        )
        return table[(numbers - self.lowest).long()] + (CODES - len(self.numbers)) // 2

    @property
    def table(self) -> Tensor | None:
        """The number of each code, int8 ``(16,)``, as weights store it; None for plain ones: the code minus 8."""
        if self.even:
            return None
        margin = (CODES - len(self.numbers)) // 2
        return nn.functional.pad(
            torch.tensor(self.numbers, dtype=torch.int8), (margin, margin)
        )


@cache
def nearest_levels(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The number that is nearest to each whole number from the first to the last, fp32."""
    levels = torch.tensor(numbers)
    every = torch.arange(int(levels[0]), int(levels[-1]) + 1)
    return levels[(every[:, None] - levels).abs().argmin(dim=1)].float().to(device)


PLAIN = {
    "int8": Levels(tuple(range(-127, 128))),
    "int6": Levels(tuple(range(-32, 32))),
    "int5": Levels(tuple(range(-16, 16))),
    "int4": Levels(tuple(range(-8, 8))),
    "int3": Levels(tuple(range(-4, 4))),
}
GROUPED = ("int6", "int5", "int4", "int3")  # whose scales belong to groups of columns
# Least squared errors of the demo model's linears in the metric of their inputs, for 50 and 70 % of zeros (Lloyd's
# method); those of single linears and other sparsities are within a few units of these. -128 is a power of two, so that
# a scale can be read off the value of largest magnitude exactly. int4 has none: such numbers lower the error of its
# linears by a tenth at most and not the divergence of the whole model.
GAPPED = {"int3": Levels((-128, -83, -52, -25, 24, 51, 80, 117))}


def anchors(grouped: Tensor) -> Tensor:
    """The place of the value of largest magnitude in each group, ``(groups, 1)``."""
    return grouped.abs().max(dim=1, keepdim=True).indices


def whole_numbers(
    values: Tensor, scales: Tensor, levels: Levels, *, zero: bool = False
) -> Tensor:
    """The nearest of ``levels`` in units of ``scales``; ``zero`` as in ``Levels.nearest``."""
    return levels.nearest(in_units_of(scales, values), zero=zero)


def in_units_of(units: Tensor, values: Tensor) -> Tensor:
    """Values as multiples of units, which are broadcast; 0 where a unit is 0."""
    return values / torch.where(units == 0, math.inf, units)


def levels_of(value_type: str, layout: str) -> Levels:
    """The numbers to which `prune --values` rounds a weight: with a gap for bitmasks alone; others store zeros."""
    if layout == "bitmask" and value_type in GAPPED:
        return GAPPED[value_type]
    return PLAIN[value_type]


def resolve_value_type(value_type: str, dtype: torch.dtype) -> str:
    """``keep`` as the name of ``dtype`` (FormatError if it has no packed form); a SettingError for an unknown name."""
    if value_type == "keep":
        if dtype not in TYPE_OF:
            raise FormatError(
                f"values of {dtype} have no packed form; choose one of {', '.join(VALUE_TYPES)}"
            )
        return TYPE_OF[dtype]
    if value_type not in WRITTEN_TYPES:
        raise SettingError(
            f"unknown value type {value_type!r:.100}; choose one of keep, {', '.join(WRITTEN_TYPES)}"
        )
    return value_type


def group_of(columns: int, groups: int) -> int | None:
    """The columns that share a scale (32, 64, … 1024) where a row has this number of scales; None if none fits."""
    return next((size for size in GROUPS if groups_of(columns, size) == groups), None)


def best_group(share: float) -> int:
    """The columns that share a scale where this share of the weights is kept, so that about 32 of them are kept."""
    return next(
        (size for size in GROUPS if size * share >= GROUPS[0] / math.sqrt(2)),
        GROUPS[-1],
    )


def groups_of(columns: int, group: int) -> int:
    """The scales of one row whose columns share them."""
    return (columns + group - 1) // group


def powers_of(exponents: Tensor) -> Tensor:
    """Two to the power of each exponent, fp32."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)


def text_of_exponents(exponents: Tensor | None) -> str:
    """One hexadecimal digit for each column, the exponent plus 8; empty for None."""
    if exponents is None:
        return ""
    return "".join(f"{exponent - EXPONENTS.start:x}" for exponent in exponents.tolist())


def exponents_of_text(text: str) -> Tensor | None:
    """The inverse of ``text_of_exponents``: int8 ``(in,)``, or None."""
    if not text:
        return None
    exponents = [int(digit, 16) + EXPONENTS.start for digit in text]
    return torch.tensor(exponents, dtype=torch.int8)


def encode_values(
    weight: Tensor,
    kept: Tensor,
    value_type: str,
    group: int | None,
    exponents: Tensor | None,
    layout: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The values of a floating weight ``(out, in)`` where bool ``kept`` is set, scales and levels, as
    ``sparsepack.layout.PackedWeight`` has them.

    Args:
        weight, kept: see above.
        value_type: one of ``WRITTEN_TYPES``. Values of int3 become codes of int4, the eight in the middle; those of
            int6 and int5 become int8.
        group: the columns that share a scale, for types of ``GROUPED``.
        exponents: int8 ``(in,)``, for integers alone.
        layout: a weight that does not stand on the numbers of its layout gets plain ones.

    Raises:
        FormatError: a value overflows the type, or is not finite and the type is an integer.
    """
    if value_type in FLOAT_TYPES:
        values = weight[kept]
        stored = values.to(FLOAT_TYPES[value_type])
        overflowed = int((torch.isfinite(values) & ~torch.isfinite(stored)).sum())
        if overflowed:
            raise FormatError(
                f"{overflowed} weights are too large for {value_type}; choose bf16 or fp32"
            )
        return stored, None, None
    exact = weight.float()
    if exponents is not None:
        exact = exact * powers_of(-exponents)
    if not bool(torch.isfinite(exact).all()):
        raise FormatError(
            f"a weight is NaN, infinite or too large, and cannot be stored as {value_type}"
        )
    if value_type == "int8":
        scales = exact.abs().amax(dim=1) / 127
        numbers = whole_numbers(exact, scales.unsqueeze(1), PLAIN["int8"], zero=True)
        return numbers[kept].to(torch.int8), scales, None
    assert group is not None
    rows, columns = weight.shape
    grouped = nn.functional.pad(exact, (0, -columns % group)).reshape(-1, group)
    levels = levels_of(value_type, layout)
    if not levels.even and not _is_on(grouped, levels):
        levels = PLAIN[value_type]
    numbers, scales, _ = _quantise_groups(grouped, levels)
    scales = scales.view(rows, -1)
    numbers = numbers.view(rows, -1)[:, :columns][kept]
    if READ_AS[value_type] == "int8":
        return numbers.to(torch.int8), scales, None
    codes = levels.codes(numbers)
    return bytes_of_codes(codes, kept.count_nonzero(dim=1)), scales, levels.table


def offsets_of(counts: Tensor, value_type: str) -> Tensor:
    """Where the values of each row begin, from their numbers ``(rows,)``, and where the last ones end, int64
    ``(rows + 1,)``. A row of int4 begins on a byte."""
    if READ_AS[value_type] == "int4":
        counts = counts + counts % 2
    return nn.functional.pad(counts.cumsum(0), (1, 0))


def bytes_of_codes(codes: Tensor, counts: Tensor) -> Tensor:
    """Codes of int4, of rows with ``counts (rows,)`` of them, two to a byte; a row begins on a byte."""
    places, slots = _slots(counts)
    padded = torch.full((slots,), CODES // 2, dtype=torch.uint8)
    padded[places] = codes
    return _in_pairs(padded)


def codes_of_bytes(data: Tensor, counts: Tensor) -> Tensor:
    """The inverse of ``bytes_of_codes``."""
    places, _ = _slots(counts)
    return _nibbles(data)[places]


def _slots(counts: Tensor) -> tuple[Tensor, int]:
    """Where each code of int4 stands, in codes, from their numbers in each row; and where the last row ends."""
    offsets = offsets_of(counts, "int4")
    # by how much the rows before are longer than their codes
    unused = offsets[:-1] - (counts.cumsum(0) - counts)
    places = unused.repeat_interleave(counts)
    places += torch.arange(len(places), device=counts.device)
    return places, int(offsets[-1])


def bytes_of_values(counts: Tensor, value_type: str, groups: int, layout: str) -> int:
    """Bytes of values, scales and levels, for ``counts (out,)`` values and ``groups`` scales in each row."""
    bits = int(offsets_of(counts, value_type)[-1]) * BITS[value_type]
    size = -(-bits // 8)
    if value_type == "int8":
        size += 4 * len(counts)
    elif value_type in GROUPED:
        size += 2 * groups * len(counts)
        if not levels_of(value_type, layout).even:
            size += CODES
    return size


def narrowed(values: Tensor, value_type: str) -> Tensor:
    """Values in memory as a file has those of int6, int5 or int3: uint8, in ``BITS`` bits each.

    The bits are those of the number minus the lowest one of the type, the least significant first. Values of int3 are
    codes of int4 that are all 4 … 11, two to a byte."""
    if value_type == "int3":
        codes = _nibbles(values) - CODES // 4
    else:
        # wraps around: -1 becomes 255, and then half the range minus 1
        codes = values.view(torch.uint8) - PLAIN[value_type].lowest
    bits = bits_of_bytes(codes.view(-1, 1).numpy(), count=BITS[value_type])
    return torch.from_numpy(bytes_of_bits(bits.reshape(-1)))


def widened(data: Tensor, values: int, value_type: str) -> Tensor:
    """The inverse of ``narrowed``; a ValueError if the data are not this number of values, even for int3."""
    count = BITS[value_type]
    if (
        values < 0
        or (values % 2 and value_type == "int3")
        or data.dtype != torch.uint8
        or tuple(data.shape) != (-(-count * values // 8),)
    ):
        raise ValueError(
            f"{data.dtype} {tuple(data.shape)} are not {values} values of {count} bits"
        )
    bits = bits_of_bytes(data.numpy())
    if bits[count * values :].any():
        raise ValueError(f"a bit after the last value of {count} bits is set")
    places = bits[: count * values].reshape(-1, count)
    codes = torch.from_numpy(bytes_of_bits(places)).view(-1)
    if value_type == "int3":
        return _in_pairs(codes + CODES // 4)
    return codes.view(torch.int8) + PLAIN[value_type].lowest


def _nibbles(pairs: Tensor) -> Tensor:
    """The codes of int4, two from each byte."""
    return torch.stack((pairs & 15, pairs >> 4), dim=1).view(-1)


def _in_pairs(codes: Tensor) -> Tensor:
    """The inverse of ``_nibbles``."""
    pairs = codes.view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _is_on(grouped: Tensor, levels: Levels) -> bool:
    """Whether the values are these numbers times scales already, up to a dtype's rounding, judged by some groups.

    Others must not be brought to a grid with a gap: small values of large inputs would become many times as large."""
    step = max(1, len(grouped) // _JUDGES)
    while math.gcd(step, len(grouped)) > 1:  # so that it meets every column of a row
        step += 1
    judges = grouped[::step]
    return _quantise_groups(judges, levels)[2] <= ON_GRID * float(
        judges.double().square().sum()
    )


def _quantise_groups(grouped: Tensor, levels: Levels) -> tuple[Tensor, Tensor, float]:
    """Whole numbers ``(groups, columns)``, the best bf16 scales ``(groups,)`` of those tried, and the squared error.

    The anchor becomes the lowest number, which has no positive counterpart, so a scale may be negative."""
    numbers = torch.empty_like(grouped)
    scales = grouped.new_empty(len(grouped), dtype=torch.bfloat16)
    total = 0.0
    for first in range(0, len(grouped), _GROUPS_AT_ONCE):
        part = slice(first, first + _GROUPS_AT_ONCE)
        numbers[part], scales[part], error = _best_of_scales(grouped[part], levels)
        total += float(error.double().sum())
    return numbers, scales, total


def _best_of_scales(grouped: Tensor, levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
    extreme = grouped.gather(1, anchors(grouped))  # (groups, 1)
    # an error that overflows is better than none
    best = torch.full_like(extreme, math.nan)
    numbers = torch.zeros_like(grouped)
    scales = torch.zeros_like(extreme)
    for fraction in _SCALE_FRACTIONS:
        # rounded as it will be read
        scale = (extreme / levels.lowest * fraction).bfloat16().float()
        # numbers with a gap are those of weights whose zeros stay
        tried = whole_numbers(grouped, scale, levels, zero=levels.even)
        error = (tried * scale - grouped).square().sum(dim=1, keepdim=True)
        better = ~(error >= best)
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        numbers = torch.where(better, tried, numbers)
    return numbers, scales.squeeze(1).bfloat16(), best
