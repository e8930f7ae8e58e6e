"""Positions of the kept values: a bitmask, or for N:M one code for each group of ``m`` consecutive inputs.

A bitmask has one bit for each input, least significant first, and rows of whole 64-bit words.

A code encodes which ``n`` of ``m`` inputs are kept, in fewer than ``m`` bits. There are C(m, n) possibilities. They are
numbered in lexicographic order of the kept positions (2:4: 01 02 03 12 13 23 are 0 … 5), and the number takes
⌈log2 C(m, n)⌉ bits: 3 for 2:4, 2 for 1:4, 7 for 4:8. The codes of a row are concatenated as bits, least significant
first, and every row begins on a byte.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy
import torch
from torch import Tensor

from sparsellm.patterns import NM

PATTERNS = (NM(1, 4), NM(2, 4), NM(4, 8))  # the packed format has codes for these


def mask_stride(columns: int) -> int:
    """Bytes of one row of a bitmask: whole 64-bit words."""
    return 8 * ((columns + 63) // 64)


def to_bits(kept: Tensor) -> Tensor:
    """Bool ``(out, in)`` as a bitmask ``(out, stride)``."""
    out, columns = kept.shape
    padded = numpy.zeros((out, 8 * mask_stride(columns)), dtype=bool)
    padded[:, :columns] = kept.cpu().numpy()
    return torch.from_numpy(numpy.packbits(padded, axis=1, bitorder="little"))


def from_bits(mask: Tensor, columns: int) -> Tensor:
    """A bitmask ``(rows, stride)`` as bool ``(rows, columns)``, on its device."""
    if mask.device.type == "cpu":
        return torch.from_numpy(numpy.unpackbits(mask.numpy(), axis=1, count=columns, bitorder="little")).view(
            torch.bool
        )
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.view(len(mask), -1)[:, :columns].bool()


def popcount(mask: Tensor) -> Tensor:
    """The number of set bits in each row of a bitmask, int64 ``(rows,)``; adds 64 bits at a time."""
    words = numpy.ascontiguousarray(mask.cpu().numpy()).view(numpy.uint64)
    words = words - ((words >> numpy.uint64(1)) & numpy.uint64(0x5555555555555555))
    quads = numpy.uint64(0x3333333333333333)
    words = (words & quads) + ((words >> numpy.uint64(2)) & quads)
    words = (words + (words >> numpy.uint64(4))) & numpy.uint64(0x0F0F0F0F0F0F0F0F)
    return torch.from_numpy(words.view(numpy.uint8).sum(axis=1, dtype=numpy.int64))


def code_bits(pattern: NM) -> int:
    """Bits of one group's code."""
    return (math.comb(pattern.m, pattern.n) - 1).bit_length()


def row_bytes(pattern: NM, columns: int) -> int:
    """Bytes of one row of codes."""
    return (columns // pattern.m * code_bits(pattern) + 7) // 8


def encode_groups(kept: Tensor, pattern: NM) -> Tensor:
    """Bool ``(out, in)`` with exactly ``n`` of every ``m`` set, as codes: uint8 ``(out, row_bytes)``."""
    out, columns = kept.shape
    groups = kept.cpu().numpy().reshape(out, columns // pattern.m, pattern.m)
    as_number = numpy.packbits(groups, axis=2, bitorder="little")[:, :, 0]  # (out, groups), m ≤ 8 bits
    code = numpy.zeros(256, dtype=numpy.uint8)
    code[_members(pattern)] = numpy.arange(len(_members(pattern)))
    bits = numpy.unpackbits(code[as_number][..., None], axis=2, count=code_bits(pattern), bitorder="little")
    return torch.from_numpy(numpy.packbits(bits.reshape(out, -1), axis=1, bitorder="little"))


def decode_groups(codes: Tensor, pattern: NM, columns: int) -> Tensor:
    """The inverse of :func:`encode_groups`: bool ``(out, columns)``, on the CPU.

    Raises:
        ValueError: a code is not below C(m, n), or a bit after a row's last code is set.
    """
    out, width, groups = len(codes), code_bits(pattern), columns // pattern.m
    bits = numpy.unpackbits(codes.cpu().numpy(), axis=1, bitorder="little")
    if bits[:, groups * width :].any():
        raise ValueError("a padding bit is set")
    code = numpy.packbits(bits[:, : groups * width].reshape(out, groups, width), axis=2, bitorder="little")[:, :, 0]
    members = _members(pattern)
    highest = int(numpy.max(code))
    if highest >= len(members):
        raise ValueError(f"code {highest} is none of the {len(members)} of {pattern}")
    number = members[code]  # (out, groups)
    kept = numpy.unpackbits(number[..., None], axis=2, count=pattern.m, bitorder="little")
    return torch.from_numpy(kept.reshape(out, columns)).view(torch.bool)


@cache
def _members(pattern: NM) -> numpy.ndarray:
    """The bits of each code, as a number: uint8 ``(C(m, n),)``."""
    chosen = itertools.combinations(range(pattern.m), pattern.n)
    return numpy.array([sum(1 << place for place in places) for places in chosen], dtype=numpy.uint8)
