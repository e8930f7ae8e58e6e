"""Products with a packed weight on a GPU: one to sixteen tokens at a time, in Triton, on the same bitmask format.

A program computes a few rows for all tokens. A thread takes a byte of the mask at a time, that is eight columns, whose
activations it loads at once. The position of a column's value is the number of set bits before it: a running sum over
bytes plus the count within the byte, which one multiplication computes for all eight. So only mask, values, row offsets
and scales are read, each once. A scale of int4 covers whole bytes of the mask and multiplies the sum of eight products.
Sums are in fp32.

With ``TRITON_INTERPRET=1`` the same kernel runs on the CPU, for tests.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsellm.errors import KernelError
from sparsellm.packed.layout import PackedWeight

MAX_TOKENS = 16
_KINDS = {"bf16": 0, "fp16": 0, "fp32": 0, "int8": 1, "int4": 2}
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def available() -> str | None:
    """``triton``, or None if there is neither a GPU nor the interpreter to run on."""
    return "triton" if _INTERPRETED or torch.cuda.is_available() else None


def launch_of(tokens: int) -> dict[str, int]:
    """The rows of a program, the bytes of a row's mask that it takes at once, and its warps.

    ``benchmarks/gpu.py`` times others. More tokens need more registers, hence fewer bytes.
    """
    return {"ROWS": 4, "BYTES": 64 if tokens <= 4 else 32, "num_warps": 4}


@triton.jit  # type: ignore[untyped-decorator]
def _counts(byte):  # type: ignore[no-untyped-def]
    """Eight nibbles in a uint32: nibble ``j`` is the number of set bits of the byte up to and including bit ``j``."""
    bits = (byte | (byte << 12)) & 0x000F000F
    bits = (bits | (bits << 6)) & 0x03030303
    bits = (bits | (bits << 3)) & 0x11111111
    return bits * 0x11111111


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel
    mask_pointer,  # uint8 (out, row_bytes)
    values_pointer,
    offsets_pointer,  # int64 (out + 1,)
    scales_pointer,
    x_pointer,  # (tokens, columns)
    y_pointer,  # (tokens, out)
    out,
    columns,
    row_bytes,
    mask_step,  # bytes from a row's mask to the next one's: 0 where all rows share one
    group,  # int4: bytes of the mask that share a scale
    tokens,
    KIND: tl.constexpr,  # 0: values are floats, 1: int8, 2: int4
    TOKENS: tl.constexpr,  # tokens, raised to a power of two
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = tl.load(offsets_pointer + row, mask=row < out, other=0)
    values = values_pointer + (begin // 2 if KIND == 2 else begin)  # rows of int4 begin on a byte
    token = tl.arange(0, TOKENS)
    lane = tl.arange(0, 8)
    done = tl.zeros([ROWS], dtype=tl.int32)
    sums = tl.zeros([TOKENS, ROWS, BYTES], dtype=tl.float32)
    for first in range(0, row_bytes, BYTES):
        index = first + tl.arange(0, BYTES)
        inside = (row < out)[:, None] & (index < row_bytes)[None, :]
        byte = tl.load(mask_pointer + row[:, None] * mask_step + index[None, :], mask=inside, other=0).to(tl.uint32)
        counts = _counts(byte)
        count = (counts >> 28).to(tl.int32)
        before = done[:, None] + tl.cumsum(count, 1) - count
        done += tl.sum(count, 1)
        kept = ((byte[:, :, None] >> lane[None, None, :].to(tl.uint32)) & 1) != 0
        below = ((counts << 4)[:, :, None] >> (4 * lane)[None, None, :].to(tl.uint32)) & 15
        place = before[:, :, None] + below.to(tl.int32)
        if KIND == 2:
            pair = tl.load(values[:, None, None] + place // 2, mask=kept, other=0).to(tl.int32)
            code = ((pair >> ((place % 2) * 4)) & 15) - 8
            weight = tl.where(kept, code.to(tl.float32), 0.0)
        else:
            weight = tl.load(values[:, None, None] + place, mask=kept, other=0).to(tl.float32)
        column = index[:, None] * 8 + lane[None, :]
        given = (token < tokens)[:, None, None] & (column < columns)[None, :, :]
        x = tl.load(x_pointer + token.to(tl.int64)[:, None, None] * columns + column[None, :, :], mask=given, other=0)
        products = tl.sum(weight[None, :, :, :] * x.to(tl.float32)[:, None, :, :], axis=3)
        if KIND == 2:
            of_rows = scales_pointer + row[:, None] * tl.cdiv(columns, 8 * group)
            scaled = inside & (index * 8 < columns)[None, :]
            scale = tl.load(of_rows + (index // group)[None, :], mask=scaled, other=0).to(tl.float32)
            products *= scale[None, :, :]
        sums += products
    y = tl.sum(sums, axis=2)
    if KIND == 1:
        y *= tl.load(scales_pointer + row, mask=row < out, other=0)[None, :]
    stored = (token < tokens)[:, None] & (row < out)[None, :]
    tl.store(
        y_pointer + token.to(tl.int64)[:, None] * out + row[None, :], y.to(y_pointer.dtype.element_ty), mask=stored
    )


def multiply(packed: PackedWeight, x: Tensor, launch: dict[str, int] | None = None) -> Tensor:
    """``x Wᵀ`` for a packed ``W``, summed in fp32.

    Args:
        packed: ``W (out, in)`` in the layout ``bitmask`` or ``dense`` that passed
            ``sparsellm.packed.validation.validate``, on the device of ``x``.
        x: ``(tokens, in)`` of fp32, bf16 or fp16, 1 to :data:`MAX_TOKENS` tokens.
        launch: other numbers than those of :func:`launch_of`; ``ROWS`` and ``BYTES`` are powers of two.

    Returns:
        ``(tokens, out)`` in the type of ``x``.

    Raises:
        KernelError: there is no GPU to run on, or layout, shapes, types or devices do not fit.
    """
    out, columns = packed.shape
    if available() is None or (x.device.type != "cuda" and not _INTERPRETED):
        raise KernelError(f"activations on {x.device}: the Triton kernels need a GPU (or TRITON_INTERPRET=1)")
    if packed.layout == "nm" or packed.value_type not in _KINDS or packed.mask.device != x.device:
        raise KernelError(
            f"layout {packed.layout!r}, values {packed.value_type!r} on {packed.mask.device}, activations on "
            f"{x.device}: the Triton kernels take a bitmask, {', '.join(_KINDS)} on the device of the activations"
        )
    floating = (torch.float32, torch.bfloat16, torch.float16)
    if x.dim() != 2 or x.shape[1] != columns or not 1 <= len(x) <= MAX_TOKENS or x.dtype not in floating:
        raise KernelError(
            f"activations {x.dtype} {tuple(x.shape)}: the Triton kernels take fp32, bf16 or fp16 "
            f"of (1 to {MAX_TOKENS}, {columns})"
        )
    launch = launch or launch_of(len(x))
    unused = packed.offsets
    y = torch.empty(len(x), out, dtype=x.dtype, device=x.device)
    _multiply[(triton.cdiv(out, launch["ROWS"]),)](
        packed.mask,
        packed.values if packed.values.numel() else unused,
        packed.offsets,
        unused if packed.scales is None else packed.scales,
        x.contiguous(),
        y,
        out,
        columns,
        packed.mask.shape[1],
        0 if packed.layout == "dense" else packed.mask.shape[1],
        (packed.group or 8) // 8,
        len(x),
        KIND=_KINDS[packed.value_type],
        TOKENS=triton.next_power_of_2(len(x)),
        **launch,
    )
    return y
