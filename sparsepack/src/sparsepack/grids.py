"""The grids of other programs: numbers times a scale, in groups of columns that do not depend on zeros.

A group has one scale, which may be negative: the value of largest magnitude, its *anchor*, stands at the lowest number.
A scale is a number that bf16 has, and fp16 where GGUF stores it. In grids with ``parts`` some groups of a row share one
such scale, their *unit*, and the scale of each is a small whole number of units; the largest is ``lowest_scale`` units.
A weight of a checkpoint is its number times the scale, rounded to its dtype. So numbers and scales can be read off the
anchors again, as ``sparsepack.grid.codes_of`` does.
"""

from __future__ import annotations

from dataclasses import dataclass

GGUF = "gguf"
COMPRESSED = "compressed-tensors"
LARGEST_FP16 = 65280.0  # the largest magnitude that fp16 and bf16 both have
LEAST = 2.0**-24  # the least number of fp16, which has all its multiples up to 2048
BLOCK = 32  # columns that share a scale in the simplest types of GGUF
# The numbers of IQ4_NL and IQ4_XS (``kvalues_iq4nl`` of llama.cpp). 0 is not among them.
UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Grid:
    """Numbers of ``bits`` bits; ``group`` consecutive columns of a row share a scale, or all of them with 0."""

    name: str
    bits: int
    group: int
    form: str  # the format of files that have it: gguf or compressed-tensors
    uneven: tuple[int, ...] = ()  # the numbers, ascending, if they do not follow by one
    parts: int = 0  # groups that share a unit; 0 where each has a scale of its own
    scale_bits: int = 16  # bits of the scale of each group
    # whether a value is its number times the scale, less a minimum
    minima: bool = False
    narrow: str = ""  # the grid of rows that ``parts`` groups do not divide

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers, ascending."""
        if self.uneven:
            return self.uneven
        if self.minima:
            return tuple(range(1 << self.bits))
        end = 1 << self.bits - 1
        return tuple(range(-end, end))

    @property
    def lowest(self) -> int:
        return self.numbers[0]

    @property
    def highest(self) -> int:
        return self.numbers[-1]

    @property
    def lowest_scale(self) -> int:
        """The scale of the group with the largest value of those that share a unit; 1 without parts."""
        if self.minima:
            return (1 << self.scale_bits) - 1
        return -(1 << self.scale_bits - 1) if self.parts else 1

    @property
    def highest_scale(self) -> int:
        """The largest whole number of units that a scale may be."""
        return -self.lowest_scale - 1

    @property
    def columns(self) -> int:
        """The columns that are stored together; they must divide a row. 0 for the whole row."""
        return self.group * max(1, self.parts)

    @property
    def anchored(self) -> bool:
        """Whether the anchor becomes the lowest number even where another one is nearer, because its scale was rounded
        by much. A reader takes every anchor for the lowest number, to find the scale or its sign."""
        return self.parts > 0 or self.uneven != ()

    @property
    def half(self) -> bool:
        """Whether fp16 must have the scales: GGUF stores them so, and takes any grid with its groups."""
        return self.form == GGUF or self.group == BLOCK

    @property
    def plain(self) -> bool:
        """Whether compressed-tensors stores it: numbers that follow by one, in 3, 4 or 8 bits, and no parts."""
        return self.bits in (3, 4, 8) and not self.parts and not self.uneven

    @property
    def values(self) -> str:
        """The packed type with as many bits; ``int8`` for a grid without a packed form."""
        if self.plain:
            return f"int{self.bits}"
        return "int8"

    @property
    def has_zero(self) -> bool:
        """Whether a zero of a pruned weight stays one, in rows of any length."""
        narrow = GRIDS[self.narrow].has_zero if self.narrow else True
        return narrow and 0 in self.numbers and not self.minima

    def bits_per_weight(self, columns: int) -> float:
        """Bits of a weight in rows of this length, with all scales."""
        grid = grid_for(self.name, columns)
        if not grid.parts:
            return grid.bits + 16 / (grid.group or columns)
        scales = grid.scale_bits / grid.group + 16 / grid.columns
        return grid.bits + (2 if grid.minima else 1) * scales


def grid_for(name: str, columns: int) -> Grid:
    """The grid of this name for rows of this length: where its parts do not fit, the one that llama.cpp takes there."""
    grid = GRIDS[name]
    if grid.narrow and columns % grid.columns:
        return GRIDS[grid.narrow]
    return grid


def _with_minima(
    name: str, bits: int, group: int, scale_bits: int, narrow: str
) -> Grid:
    """A type of GGUF with minima: 256 numbers share a unit of scales and one of minima."""
    return Grid(
        name,
        bits,
        group,
        GGUF,
        parts=256 // group,
        scale_bits=scale_bits,
        minima=True,
        narrow=narrow,
    )


GRIDS = {
    grid.name: grid
    for grid in (
        Grid("q4_0", 4, BLOCK, GGUF),
        Grid("q8_0", 8, BLOCK, GGUF),
        Grid("q6_k", 6, 16, GGUF, parts=16, scale_bits=8, narrow="q8_0"),
        Grid("q5_0", 5, BLOCK, GGUF),
        Grid("iq4_nl", 4, BLOCK, GGUF, UNEVEN),
        Grid("iq4_xs", 4, 32, GGUF, UNEVEN, parts=8, scale_bits=6, narrow="iq4_nl"),
        Grid("q3_k", 3, 16, GGUF, parts=16, scale_bits=6, narrow="iq4_nl"),
        _with_minima("q2_k", 2, 16, 4, "iq4_nl"),
        _with_minima("q4_k", 4, 32, 6, "q5_0"),
        Grid("w4a16", 4, 128, COMPRESSED),
        Grid("w4a16-64", 4, 64, COMPRESSED),
        Grid("w4a16-32", 4, 32, COMPRESSED),
        Grid("w3a16", 3, 128, COMPRESSED),
        Grid("w8a16", 8, 0, COMPRESSED),
        Grid("w8a8", 8, 0, COMPRESSED),
    )
}
