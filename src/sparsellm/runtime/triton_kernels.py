"""Products with a packed weight on a GPU: one to sixteen tokens at a time, in Triton, on the same bitmask format.

A program computes one row for all tokens. It reads 32 mask bits at a time. The position of a column's value is the
number of set bits before it: a running sum over words plus a population count within the word. So only mask, values and
row offsets are stored. Sums are in fp32.

With ``TRITON_INTERPRET=1`` the same kernel runs on the CPU, for tests.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsellm.errors import KernelError
from sparsellm.packed.codes import powers_of
from sparsellm.packed.layout import PackedWeight

MAX_TOKENS = 16
_WORDS = 32  # mask words of 32 columns that a program takes at once
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def available() -> str | None:
    """``triton``, or None if there is neither a GPU nor the interpreter to run on."""
    return "triton" if _INTERPRETED or torch.cuda.is_available() else None


@triton.jit  # type: ignore[untyped-decorator]
def _population_count(word):  # type: ignore[no-untyped-def]
    """The number of set bits of each uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel
    mask_pointer,  # uint32 (out, row_words)
    values_pointer,
    offsets_pointer,  # int64 (out + 1,)
    scales_pointer,
    x_pointer,  # (tokens, columns)
    y_pointer,  # (tokens, out)
    out,
    columns,
    row_words,
    mask_step,  # words from a row's mask to the next one's: 0 where all rows share one
    group,  # int4: columns that share a scale
    tokens,
    KIND: tl.constexpr,  # 0: values are floats, 1: int8, 2: int4
    TOKENS: tl.constexpr,  # tokens, raised to a power of two
    WORDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_pointer + row)
    token = tl.arange(0, TOKENS)
    lane = tl.arange(0, 32)
    below = ((1 << lane.to(tl.int64)) - 1).to(tl.uint32)  # the bits of a word below that of each lane
    sums = tl.zeros([TOKENS], dtype=tl.float32)
    for first in range(0, row_words, WORDS):
        index = first + tl.arange(0, WORDS)
        word = tl.load(mask_pointer + row * mask_step + index, mask=index < row_words, other=0).to(
            tl.uint32, bitcast=True
        )
        count = _population_count(word)
        before = begin + tl.cumsum(count, 0) - count
        begin += tl.sum(count, 0)
        kept = ((word[:, None] >> lane[None, :].to(tl.uint32)) & 1) != 0
        place = before[:, None] + _population_count(word[:, None] & below[None, :])
        if KIND == 2:
            pair = tl.load(values_pointer + place // 2, mask=kept, other=0).to(tl.int32)
            code = ((pair >> ((place % 2) * 4).to(tl.int32)) & 15) - 8
            of_row = scales_pointer + row * tl.cdiv(columns, group)
            scale = tl.load(of_row + (index[:, None] * 32 + lane[None, :]) // group, mask=kept, other=0).to(tl.float32)
            weight = tl.where(kept, code.to(tl.float32) * scale, 0.0)
        else:
            weight = tl.load(values_pointer + place, mask=kept, other=0).to(tl.float32)
        column = index[:, None] * 32 + lane[None, :]
        inside = (token[:, None, None] < tokens) & (column[None, :, :] < columns)
        x = tl.load(x_pointer + token[:, None, None].to(tl.int64) * columns + column[None, :, :], mask=inside, other=0)
        sums += tl.sum(tl.sum(weight[None, :, :] * x.to(tl.float32), axis=2), axis=1)
    if KIND == 1:
        sums *= tl.load(scales_pointer + row)
    tl.store(y_pointer + token.to(tl.int64) * out + row, sums.to(y_pointer.dtype.element_ty), mask=token < tokens)


def multiply(packed: PackedWeight, x: Tensor) -> Tensor:
    """``x Wᵀ`` for a packed ``W``, summed in fp32.

    Args:
        packed: ``W (out, in)`` in the layout ``bitmask`` or ``dense`` that passed
            ``sparsellm.packed.validation.validate``, on the device of ``x``.
        x: ``(tokens, in)`` of fp32, bf16 or fp16, 1 to :data:`MAX_TOKENS` tokens.

    Returns:
        ``(tokens, out)`` in the type of ``x``.

    Raises:
        KernelError: there is no GPU to run on, or layout, shapes, types or devices do not fit.
    """
    out, columns = packed.shape
    if available() is None or (x.device.type != "cuda" and not _INTERPRETED):
        raise KernelError(f"activations on {x.device}: the Triton kernels need a GPU (or TRITON_INTERPRET=1)")
    if packed.layout == "nm" or packed.mask.device != x.device:
        raise KernelError(
            f"layout {packed.layout!r} on {packed.mask.device}, activations on {x.device}: the Triton kernels take a "
            "bitmask on the device of the activations"
        )
    floating = (torch.float32, torch.bfloat16, torch.float16)
    if x.dim() != 2 or x.shape[1] != columns or not 1 <= len(x) <= MAX_TOKENS or x.dtype not in floating:
        raise KernelError(
            f"activations {x.dtype} {tuple(x.shape)}: the Triton kernels take fp32, bf16 or fp16 "
            f"of (1 to {MAX_TOKENS}, {columns})"
        )
    kind = {"int8": 1, "int4": 2}.get(packed.value_type, 0)
    entering = x if packed.exponents is None else x.float() * powers_of(packed.exponents)
    words = packed.mask.view(torch.int32)
    y = torch.empty(len(x), out, dtype=x.dtype, device=x.device)
    unused = packed.offsets
    _multiply[(out,)](
        words,
        packed.values if packed.values.numel() else unused,
        packed.offsets,
        unused if packed.scales is None else packed.scales,
        entering.contiguous(),
        y,
        out,
        columns,
        words.shape[1],
        0 if packed.layout == "dense" else words.shape[1],
        packed.group or 1,
        len(x),
        KIND=kind,
        TOKENS=triton.next_power_of_2(len(x)),
        WORDS=_WORDS,
    )
    return y
