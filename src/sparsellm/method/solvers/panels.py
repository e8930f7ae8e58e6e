"""Pruning or rounding a panel of inputs on a GPU in one launch: the loops of
``sparsellm.method.solvers.sparsegpt`` and ``sparsellm.method.solvers.rounding`` in Triton.

Outputs are independent, so a program takes some of them through all inputs of the panel. What earlier inputs changed is
subtracted from the later ones at once, in registers, where the CPU sums it up when an input's turn comes: the sums have
another order. Launched one by one, the operations of a panel would take five hundred times as long as their arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsellm.method.solvers.widths import PRUNED_TOGETHER, ROUNDED_TOGETHER
from sparsellm.patterns import NM
from sparsepack.codes import Levels, nearest_levels

BLOCK = 32  # outputs of a program
# dtypes of a checkpoint as the kernel knows them; 0 is fp32
HALVES = {torch.bfloat16: 1, torch.float16: 2}


@triton.jit  # type: ignore[untyped-decorator]
def _nearest(units, table, LOWEST, HIGHEST, EVEN: tl.constexpr, ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers of the grid, as ``Levels.nearest`` has them."""
    # 1.5 · 2²³: half to even
    rounded = tl.minimum(tl.maximum(units, LOWEST), HIGHEST) + 12582912.0 - 12582912.0
    sign = (units > 0).to(tl.float32) - (units < 0).to(tl.float32)
    if EVEN:
        return rounded if ZERO else tl.where(rounded == 0, sign, rounded)
    number = tl.load(table + (rounded - LOWEST).to(tl.int32))
    return number if ZERO else number * tl.abs(sign)


@triton.jit  # type: ignore[untyped-decorator]
def _stored(values, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values as a checkpoint has them, in the dtype of ``HALVES``. -0.0 becomes 0.0."""
    if HALF == 1:
        bits = values.to(tl.uint32, bitcast=True)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(
            tl.float32, bitcast=True
        )
    if HALF == 2:
        values = values.to(tl.float16).to(tl.float32)
    return values + 0.0


@triton.jit  # type: ignore[untyped-decorator]
def _panel(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel
    state_pointer,  # (n, out): slopes, or goals where FIRST
    columns_pointer,  # (n, out): the rounded values, changed
    scales_pointer,  # (n, out)
    free_pointer,  # (n, out): 1 where a value may move
    inner_pointer,  # (n, n): the matrix, or the factor where FIRST
    moves_pointer,  # (n, out): how far values moved, or their errors where FIRST
    gains_pointer,  # (out,): how far the error fell
    table,
    n,
    out,
    LOWEST,
    HIGHEST,
    EVEN: tl.constexpr,
    ZERO: tl.constexpr,
    HALF: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,  # that a program holds of the state
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    real = place < out
    inside = (row < n)[:, None] & real[None, :]
    state = tl.load(
        state_pointer + row[:, None].to(tl.int64) * out + place[None, :],
        mask=inside,
        other=0,
    )
    gained = tl.zeros([BLOCK], dtype=tl.float32)
    for number in range(n):
        at = tl.cast(number, tl.int64) * out + place
        current = tl.sum(tl.where((row == number)[:, None], state, 0.0), axis=0)
        old = tl.load(columns_pointer + at, mask=real, other=0)
        scale = tl.load(scales_pointer + at, mask=real, other=0)
        free = tl.load(free_pointer + at, mask=real, other=0)
        pivot = tl.load(inner_pointer + number * n + number)
        goal = current if FIRST else old - current / pivot
        units = tl.where(scale == 0, 0.0, goal / tl.where(scale == 0, 1.0, scale))
        value = _stored(
            _nearest(units, table, LOWEST, HIGHEST, EVEN, ZERO) * scale, HALF
        )
        if FIRST:
            new = old + value * free  # anchors and zeros are what they are
            move = (current - new) / pivot
            change = -move
        else:
            move = (value - old) * free
            gain = (2 * current + pivot * move) * move  # negative where the error falls
            better = gain < 0
            new = tl.where(better, value, old)
            move = tl.where(better, move, 0.0)
            gained -= tl.where(better, gain, 0.0)
            change = move
        tl.store(columns_pointer + at, new, mask=real)
        tl.store(moves_pointer + at, move, mask=real)
        factor = tl.load(inner_pointer + number * n + row, mask=row < n, other=0)
        state += factor[:, None] * change[None, :]
    tl.store(gains_pointer + place, gained, mask=real)


def round_panel(
    parts: tuple[Tensor, ...],
    levels: Levels,
    dtype: torch.dtype,
    *,
    zero: bool,
    first: bool,
) -> tuple[Tensor, Tensor]:
    """Does on a GPU what ``sparsepack.native.round_panel`` does on a CPU."""
    columns = parts[1]
    moves = torch.empty_like(columns)
    gains = columns.new_empty(columns.shape[1])
    table = gains if levels.even else nearest_levels(levels.numbers, columns.device)
    ends = float(levels.lowest), float(levels.numbers[-1])
    tensors = (*parts, moves, gains, table)
    sizes = columns.shape
    mode = {"ZERO": zero, "HALF": HALVES.get(dtype, 0), "FIRST": first}
    with torch.cuda.device_of(columns):
        programs = (triton.cdiv(sizes[1], BLOCK),)
        _panel[programs](
            *tensors,
            *sizes,
            *ends,
            EVEN=levels.even,
            **mode,
            ROWS=ROUNDED_TOGETHER,
            BLOCK=BLOCK,
        )
    return moves, gains


@triton.jit  # type: ignore[untyped-decorator]
def _eliminate(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel
    columns_pointer,  # (n, out): the weight, changed
    kept_pointer,  # (n, out): 1 where a weight stays; written where N
    errors_pointer,  # (n, out)
    upper_pointer,  # (n, n): the factor
    n,
    out,
    N: tl.constexpr,  # weights that stay of every M; 0 where the mask is given
    M: tl.constexpr,
    ROWS: tl.constexpr,  # that a program holds of the state
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    real = place < out
    inside = (row < n)[:, None] & real[None, :]
    state = tl.load(
        columns_pointer + row[:, None].to(tl.int64) * out + place[None, :],
        mask=inside,
        other=0,
    )
    pivots = tl.load(upper_pointer + row * (n + 1), mask=row < n, other=1)
    for group in range(0, n, M):
        scores = state / pivots[:, None]
        # those of other groups lose every comparison
        scores = tl.where(
            ((row >= group) & (row < group + M))[:, None], scores * scores, -1.0
        )
        for number in range(group, tl.minimum(group + M, n)):
            at = tl.cast(number, tl.int64) * out + place
            here = (row == number)[:, None]
            current = tl.sum(tl.where(here, state, 0.0), axis=0)
            if N:
                score = tl.sum(tl.where(here, scores, 0.0), axis=0)[None, :]
                beaten = (scores > score) | (
                    (scores == score) & (row < number)[:, None]
                )
                kept = (tl.sum(beaten.to(tl.int32), axis=0) < N).to(tl.uint8)
                tl.store(kept_pointer + at, kept, mask=real)
            else:
                kept = tl.load(kept_pointer + at, mask=real, other=1)
            error = tl.where(
                kept != 0, 0.0, current / tl.load(upper_pointer + number * (n + 1))
            )
            tl.store(columns_pointer + at, current, mask=real)
            tl.store(errors_pointer + at, error, mask=real)
            factor = tl.load(upper_pointer + number * n + row, mask=row < n, other=0)
            state -= factor[:, None] * error[None, :]


def prune_panel(
    columns: Tensor, kept: Tensor, errors: Tensor, upper: Tensor, pattern: NM | None
) -> None:
    """Prunes at most ``PRUNED_TOGETHER`` columns ``(n, out)`` one after another in place, and writes their errors.

    The mask ``kept`` is given, or chosen for a pattern whose groups fit. All tensors are contiguous."""
    n = 0
    m = PRUNED_TOGETHER
    if pattern is not None:
        n = pattern.n
        m = pattern.m
    with torch.cuda.device_of(columns):
        programs = (triton.cdiv(columns.shape[1], BLOCK),)
        tensors = (columns, kept.view(torch.uint8), errors, upper)
        _eliminate[programs](
            *tensors, *columns.shape, N=n, M=m, ROWS=PRUNED_TOGETHER, BLOCK=BLOCK
        )
