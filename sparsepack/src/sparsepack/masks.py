"""Positions of the kept values: a bitmask, or for N:M one code for each group of ``m`` consecutive columns.

A bitmask has one bit for each column, least significant first, and rows of whole 64-bit words.

A code says which ``n`` of ``m`` columns are kept. The C(m, n) possibilities are numbered in lexicographic order of the
kept positions (2:4: 01 02 03 12 13 23 are 0 … 5); a number takes ⌈log2 C(m, n)⌉ bits: 3 for 2:4, 2 for 1:4, 7 for 4:8.
The codes of a row are concatenated as bits, least significant first, and every row begins on a byte.
"""

from __future__ import annotations

import itertools
import math
from functools import cache, partial

import numpy
import torch
from torch import Tensor

NM = tuple[int, int]
"""``(n, m)`` means that ``n`` of every ``m`` consecutive columns are kept."""

# those that have codes, the strictest first
PATTERNS: tuple[NM, ...] = (
    (1, 4),
    (2, 4),
    (4, 8),
)
_SAMPLE = 16  # rows that nearly always rule out N:M for an unstructured weight

# Between bytes and their bits, the least significant first, along the last axis of an array of uint8
bytes_of_bits = partial(numpy.packbits, axis=-1, bitorder="little")
bits_of_bytes = partial(numpy.unpackbits, axis=-1, bitorder="little")

_SET_BITS = bits_of_bytes(numpy.arange(256, dtype=numpy.uint8)[:, None]).sum(
    axis=1, dtype=numpy.uint8
)


def mask_stride(columns: int) -> int:
    """Bytes of one row of a bitmask: whole 64-bit words."""
    return 8 * ((columns + 63) // 64)


def to_bits(kept: Tensor) -> Tensor:
    """Bool ``(out, in)`` as a bitmask ``(out, stride)``."""
    out, columns = kept.shape
    padded = numpy.zeros((out, 8 * mask_stride(columns)), dtype=bool)
    padded[:, :columns] = kept.cpu().numpy()
    return torch.from_numpy(bytes_of_bits(padded))


def from_bits(mask: Tensor, columns: int) -> Tensor:
    """A bitmask ``(rows, stride)`` as bool ``(rows, columns)``, on its device."""
    if mask.device.type == "cpu":
        unpacked = bits_of_bytes(mask.numpy(), count=columns)
        return torch.from_numpy(unpacked).view(torch.bool)
    bits = (
        mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)
    ) & 1
    return bits.view(len(mask), -1)[:, :columns].bool()


def set_bits(mask: Tensor) -> Tensor:
    """The number of set bits in each row of a bitmask, int64 ``(rows,)``."""
    return torch.from_numpy(
        _SET_BITS[mask.cpu().numpy()].sum(axis=1, dtype=numpy.int64)
    )


def detect(kept: Tensor) -> NM | None:
    """The strictest of ``PATTERNS`` that bool ``(out, in)`` satisfies, if any."""
    few = kept[:_SAMPLE]
    for pattern in PATTERNS:
        if _satisfies(few, pattern) and _satisfies(kept, pattern):
            return pattern
    return None


def _satisfies(kept: Tensor, pattern: NM) -> bool:
    n, m = pattern
    if kept.shape[1] % m != 0:
        return False
    return bool((kept.reshape(-1, m).sum(dim=1) <= n).all())


def implies(pattern: NM, other: NM) -> bool:
    """Whether each weight that satisfies a pattern must satisfy the other."""
    n, m = pattern
    most, size = other
    if m % size == 0:  # all kept ones may be in one of the other's groups
        return min(n, size) <= most
    if size % m == 0:
        return n * size // m <= most
    return size <= most


def filled(kept: Tensor, pattern: NM) -> Tensor:
    """Bool ``(out, in)`` with exactly ``n`` of every ``m``: the kept ones, then the first of the others."""
    n, m = pattern
    groups = kept.view(len(kept), -1, m)
    return (
        groups | ((~groups).cumsum(dim=2) <= n - groups.sum(dim=2, keepdim=True))
    ).view_as(kept)


def code_bits(pattern: NM) -> int:
    """Bits of one group's code."""
    n, m = pattern
    return (math.comb(m, n) - 1).bit_length()


def row_bytes(pattern: NM, columns: int) -> int:
    """Bytes of one row of codes."""
    return (columns // pattern[1] * code_bits(pattern) + 7) // 8


def encode_groups(kept: Tensor, pattern: NM) -> Tensor:
    """Bool ``(out, in)`` with exactly ``n`` of every ``m`` set, as codes: uint8 ``(out, row_bytes)``."""
    groups = kept.cpu().numpy().reshape(len(kept), -1, pattern[1])
    # (out, groups), m ≤ 8 bits
    as_number = bytes_of_bits(groups)[:, :, 0]
    code = numpy.zeros(256, dtype=numpy.uint8)
    code[_members(pattern)] = numpy.arange(len(_members(pattern)))
    bits = bits_of_bytes(code[as_number][..., None], count=code_bits(pattern))
    return torch.from_numpy(bytes_of_bits(bits.reshape(len(kept), -1)))


def decode_groups(codes: Tensor, pattern: NM, columns: int) -> Tensor:
    """The inverse of ``encode_groups``: bool ``(out, columns)``, on the CPU.

    Raises:
        ValueError: a code is not below C(m, n), or a bit after a row's last code is set.
    """
    out = len(codes)
    width = code_bits(pattern)
    groups = columns // pattern[1]
    bits = bits_of_bytes(codes.cpu().numpy())
    if bits[:, groups * width :].any():
        raise ValueError("a padding bit is set")
    places = bits[:, : groups * width].reshape(out, groups, width)
    code = bytes_of_bits(places)[:, :, 0]
    members = _members(pattern)
    highest = int(numpy.max(code))
    if highest >= len(members):
        raise ValueError(f"code {highest} is not below {len(members)}")
    kept = bits_of_bytes(members[code][..., None], count=pattern[1])
    return torch.from_numpy(kept.reshape(out, columns)).view(torch.bool)


@cache
def _members(pattern: NM) -> numpy.ndarray:
    """The bits of each code, as a number: uint8 ``(C(m, n),)``."""
    chosen = itertools.combinations(range(pattern[1]), pattern[0])
    return numpy.array(
        [sum(1 << place for place in places) for places in chosen], dtype=numpy.uint8
    )
