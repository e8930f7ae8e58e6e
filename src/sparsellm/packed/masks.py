"""The code of N:M: which ``n`` of ``m`` consecutive inputs are kept, in fewer bits than one for each input.

There are C(m, n) possibilities. They are numbered in lexicographic order of the kept positions (2:4: 01 02 03 12 13 23
are 0 … 5), and the number takes ⌈log2 C(m, n)⌉ bits: 3 for 2:4, 2 for 1:4, 7 for 4:8. The codes of a row follow one
another as bits, least significant first, and every row begins on a byte.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy
import torch
from torch import Tensor

from sparsellm.patterns import NM


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
    """The inverse: bool ``(out, columns)``, on the CPU.

    Raises:
        ValueError: a code is not below C(m, n), or a bit behind a row's last code is set.
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
    """The bits that each code stands for, as a number: uint8 ``(C(m, n),)``."""
    chosen = itertools.combinations(range(pattern.m), pattern.n)
    return numpy.array([sum(1 << place for place in places) for places in chosen], dtype=numpy.uint8)
