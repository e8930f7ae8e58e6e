"""The grids of other programs: whole numbers times a scale, in groups of columns that do not depend on zeros.

A group has the numbers ``lowest … highest``, 0 among them, and one scale, which may be negative: the value of largest
magnitude stands at ``lowest``. A scale is a number that fp16 (as GGUF stores it) and bf16 both have. A weight of a
checkpoint is its number times the scale, rounded to its dtype; :func:`sparsepack.grid.codes_of` reads both again.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Whole numbers of ``bits`` bits; ``group`` consecutive columns of a row share a scale, or all of them with 0."""

    name: str
    bits: int
    group: int
    form: str  # the format of files that have it: gguf or compressed-tensors

    @property
    def lowest(self) -> int:
        return -(1 << self.bits - 1)

    @property
    def highest(self) -> int:
        return (1 << self.bits - 1) - 1

    @property
    def values(self) -> str:
        """The packed type with as many bits."""
        return f"int{self.bits}"

    def bits_per_weight(self, columns: int) -> float:
        """Bits of a weight in rows of this length, with 16 for each scale."""
        return self.bits + 16 / (self.group or columns)


GRIDS = {
    grid.name: grid
    for grid in (
        Grid("q4_0", 4, 32, "gguf"),
        Grid("q8_0", 8, 32, "gguf"),
        Grid("w4a16", 4, 128, "compressed-tensors"),
        Grid("w4a16-64", 4, 64, "compressed-tensors"),
        Grid("w4a16-32", 4, 32, "compressed-tensors"),
        Grid("w3a16", 3, 128, "compressed-tensors"),
        Grid("w8a16", 8, 0, "compressed-tensors"),
        Grid("w8a8", 8, 0, "compressed-tensors"),
    )
}
