"""Products with a packed weight on a GPU: one to sixteen tokens at a time, in Triton, on the same bitmask format.

A program computes one row for all tokens. A thread takes a byte of the mask at a time, that is eight columns, whose
activations it loads at once; the next byte is on its way meanwhile. The position of a column's value is the number of
set bits before it: a running sum over bytes plus the count within the byte, which one multiplication computes for all
eight. So only mask, values, row offsets and scales are read, each once. A scale of columns covers whole bytes of
the mask and multiplies the sum of eight products. Sums are in fp32.

With ``TRITON_INTERPRET=1`` the same kernel runs on the CPU, for tests.
"""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsepack.codes import CODES, powers_of
from sparsepack.errors import KernelError, Note
from sparsepack.layout import PackedWeight

MAX_TOKENS = 16
_KINDS = {"bf16": 0, "fp16": 0, "fp32": 0, "int8": 1, "int4": 2}
_INT8_IN_GROUPS = 3
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def available() -> str | None:
    """``triton``, or None if there is neither a GPU nor the interpreter to run on, or a first product fails there:
    Triton needs the driver and a C compiler, and reports a lack of them when a kernel is launched. A warning says so.
    """
    if _INTERPRETED:
        return "triton"
    if not torch.cuda.is_available():
        return None
    try:
        one = torch.ones(1, 1, device="cuda")
        packed = PackedWeight(
            (1, 1),
            "bitmask",
            mask=one.to(torch.uint8),
            values=one.view(-1),
            offsets=torch.tensor([0, 1], device="cuda"),
            scales=None,
            value_type="fp32",
        )
        if _product(packed, one).item() != 1:
            raise RuntimeError("a product is wrong")
    except Exception as error:  # from Triton, its compiler, or the driver
        why = " ".join(str(error).split())[:160] or type(error).__name__
        said = f"Triton does not run here ({why}), so torch does the work of its kernels, slowly"
        warnings.warn(said, Note, stacklevel=2)
        return None
    return "triton"


# The bytes of a row's mask that a program takes at once, and its warps: a thread has a byte, and no warp waits for
# another.
LAUNCH = {"BYTES": 32, "num_warps": 1}


@triton.jit  # type: ignore[untyped-decorator]
def _counts(byte):  # type: ignore[no-untyped-def]
    """Eight nibbles in a uint32: nibble ``j`` is the number of set bits of the byte up to and including bit ``j``."""
    bits = (byte | (byte << 12)) & 0x000F000F
    bits = (bits | (bits << 6)) & 0x03030303
    bits = (bits | (bits << 3)) & 0x11111111
    return bits * 0x11111111


@triton.jit  # type: ignore[untyped-decorator]
def _column(values, levels, before, byte, counts, KIND: tl.constexpr, J: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weights of column ``J`` of every byte of the mask, without scales; 0 where none is kept."""
    kept = ((byte >> J) & 1) != 0
    place = before + (((counts << 4) >> (4 * J)) & 15).to(tl.int32)
    if KIND == 2:
        pair = tl.load(values + place // 2, mask=kept, other=0).to(tl.int32)
        weight = tl.load(
            levels + ((pair >> ((place % 2) * 4)) & 15), mask=kept, other=0
        ).to(tl.float32)
    else:
        weight = tl.load(values + place, mask=kept, other=0).to(tl.float32)
    return weight[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel
    mask_pointer,  # uint8 (out, row_bytes)
    values_pointer,
    offsets_pointer,  # int64 (out + 1,)
    scales_pointer,
    levels_pointer,  # int4: int8 (16,)
    x_pointer,  # (tokens, columns)
    y_pointer,  # (tokens, out)
    out,
    columns,
    row_bytes,
    mask_step,  # bytes from a row's mask to the next one's: 0 where all rows share one
    group,  # int4, int8 in groups: bytes of the mask that share a scale
    tokens,
    KIND: tl.constexpr,  # 0: values are floats, 1: int8, 2: int4, 3: int8 in groups
    TOKENS: tl.constexpr,  # tokens, raised to a power of two
    BYTES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_pointer + row)
    # rows of int4 begin on a byte
    values = values_pointer + (begin // 2 if KIND == 2 else begin)
    mask = mask_pointer + row * mask_step
    token = tl.arange(0, TOKENS)
    place = tl.arange(0, BYTES)
    done = 0
    sums = tl.zeros([TOKENS, BYTES], dtype=tl.float32)
    following = tl.load(mask + place, mask=place < row_bytes, other=0)
    for first in range(0, row_bytes, BYTES):
        index = first + place
        byte = following.to(tl.uint32)
        # while this step waits
        following = tl.load(
            mask + index + BYTES, mask=index + BYTES < row_bytes, other=0
        )
        counts = _counts(byte)
        count = (counts >> 28).to(tl.int32)
        before = done + tl.cumsum(count, 0) - count
        done += tl.sum(count, 0)
        column = index[:, None] * 8 + tl.arange(0, 8)[None, :]
        given = (token < tokens)[:, None, None] & (column < columns)[None, :, :]
        x = tl.load(
            x_pointer
            + token.to(tl.int64)[:, None, None] * columns
            + column[None, :, :],
            mask=given,
            other=0,
        )
        even, odd = tl.split(tl.reshape(x.to(tl.float32), [TOKENS, BYTES, 2, 2, 2]))
        x04, x26 = tl.split(even)
        x15, x37 = tl.split(odd)
        x0, x4 = tl.split(x04)
        x1, x5 = tl.split(x15)
        x2, x6 = tl.split(x26)
        x3, x7 = tl.split(x37)
        products = _column(values, levels_pointer, before, byte, counts, KIND, 0) * x0
        products += _column(values, levels_pointer, before, byte, counts, KIND, 1) * x1
        products += _column(values, levels_pointer, before, byte, counts, KIND, 2) * x2
        products += _column(values, levels_pointer, before, byte, counts, KIND, 3) * x3
        products += _column(values, levels_pointer, before, byte, counts, KIND, 4) * x4
        products += _column(values, levels_pointer, before, byte, counts, KIND, 5) * x5
        products += _column(values, levels_pointer, before, byte, counts, KIND, 6) * x6
        products += _column(values, levels_pointer, before, byte, counts, KIND, 7) * x7
        if KIND >= 2:
            scales = scales_pointer + row * tl.cdiv(columns, 8 * group)
            scale = tl.load(
                scales + index // group, mask=index * 8 < columns, other=0
            ).to(tl.float32)
            products *= scale[None, :]
        sums += products
    y = tl.sum(sums, axis=1)
    if KIND == 1:
        y *= tl.load(scales_pointer + row)
    tl.store(
        y_pointer + token.to(tl.int64) * out + row,
        y.to(y_pointer.dtype.element_ty),
        mask=token < tokens,
    )


@cache
def _plain_levels(device: torch.device) -> Tensor:
    return torch.arange(CODES, dtype=torch.int8, device=device) - CODES // 2


def multiply(packed: PackedWeight, x: Tensor) -> Tensor:
    """``x Wᵀ``, summed in fp32: ``(tokens, out)`` in the type of ``x``.

    Args:
        packed: ``W (out, in)``, a bitmask or dense, that passed validation, on the device of ``x``.
        x: ``(tokens, in)`` of fp32, bf16 or fp16, 1 to ``MAX_TOKENS`` tokens.

    Raises:
        KernelError: there is no GPU to run on, or layout, shapes, types or devices do not fit.
    """
    columns = packed.shape[1]
    if available() is None or (x.device.type != "cuda" and not _INTERPRETED):
        raise KernelError(
            f"activations on {x.device}: the Triton kernels need a GPU (or TRITON_INTERPRET=1)"
        )
    if (
        packed.layout == "nm"
        or packed.value_type not in _KINDS
        or packed.mask.device != x.device
    ):
        raise KernelError(
            f"layout {packed.layout!r}, values {packed.value_type!r} on {packed.mask.device}, activations on "
            f"{x.device}: the Triton kernels take a bitmask, {', '.join(_KINDS)} on the device of the activations"
        )
    floating = (torch.float32, torch.bfloat16, torch.float16)
    if (
        x.dim() != 2
        or x.shape[1] != columns
        or not 1 <= len(x) <= MAX_TOKENS
        or x.dtype not in floating
    ):
        raise KernelError(
            f"activations {x.dtype} {tuple(x.shape)}: the Triton kernels take fp32, bf16 or fp16 "
            f"of (1 to {MAX_TOKENS}, {columns})"
        )
    return _product(packed, x)


def _product(packed: PackedWeight, x: Tensor) -> Tensor:
    out, columns = packed.shape
    scaled = x
    if packed.exponents is not None:
        scaled = x.float() * powers_of(packed.exponents)
    unused = packed.offsets  # any tensor: the kernel does not read it
    levels = packed.levels
    if levels is None:
        levels = _plain_levels(x.device)
    kind = _KINDS[packed.value_type]
    if packed.value_type == "int8" and packed.group is not None:
        kind = _INT8_IN_GROUPS
    y = torch.empty(len(x), out, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        _multiply[(out,)](
            packed.mask,
            packed.values if packed.values.numel() else unused,
            packed.offsets,
            unused if packed.scales is None else packed.scales,
            levels if packed.value_type == "int4" else unused,
            scaled.contiguous(),
            y,
            out,
            columns,
            packed.mask.shape[1],
            0 if packed.layout == "dense" else packed.mask.shape[1],
            (packed.group or 8) // 8,
            len(x),
            KIND=kind,
            TOKENS=triton.next_power_of_2(len(x)),
            **LAUNCH,
        )
    return y
