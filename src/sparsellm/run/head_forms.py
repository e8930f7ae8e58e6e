"""The types of embedding and output head in a file of llama.cpp, which compete with the linears for bytes.

For each matrix the dense model is run with this one matrix rounded to its worst type. The divergence of the other types
is estimated from their squared errors. What both matrices leave of the size is for the linears, whose divergence at a
few sizes is known. Divergences of small errors add up, so the pair of types is taken whose sum is least.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from sparsellm.method.allocation import HeadForm
from sparsellm.method.allocation.forms import Form, form_bytes, hull, some_rows
from sparsellm.method.solvers.rounding import to_nearest
from sparsellm.method.sweep.head import HEAD_TOKENS, divergence_from, through_head
from sparsellm.model import Chain, Feed, Stream
from sparsellm.model.heads import OuterMatrix, outer_matrices
from sparsellm.progress import Progress
from sparsepack.grids import GRIDS, grid_for

# Every output of a head reads the same few dimensions, and an error there changes all logits.
LEAST_BITS_OF_HEAD: Final = 4.0
ROWS = 8192  # rounded at a time
DIGITS = 4  # that a run keeps of each square
ROWS_OF_ERRORS = 1024  # on which types of a head are compared
POINTS = 3  # sizes at which the divergence of linears is measured
ROOMS = 1000  # sizes of a file that are told apart


def types_of(matrix: OuterMatrix) -> list[str]:
    """The types of llama.cpp that a matrix may get, each once: some stand for others where 256 does not divide a
    row."""
    columns = matrix.shape[1]
    names: list[str] = []
    for grid in GRIDS.values():
        if grid.form != "gguf":
            continue
        there = grid_for(grid.name, columns)
        fits = columns % (there.columns or columns) == 0
        few = matrix.is_head and there.bits_per_weight(columns) < LEAST_BITS_OF_HEAD
        # iq4_nl loses less than q4_0 at its bytes
        if fits and not few and there.name not in ("q4_0", *names):
            names.append(there.name)
    return names


def least_bytes(chain: Chain) -> int:
    """The bytes of embedding and head in their smallest types."""
    return sum(min(_sizes_of(matrix)) for matrix in outer_matrices(chain))


def most_bytes(chain: Chain) -> int:
    """The bytes of embedding and head in their largest types."""
    return sum(max(_sizes_of(matrix)) for matrix in outer_matrices(chain))


def _sizes_of(matrix: OuterMatrix) -> list[int]:
    """The bytes of a matrix in each of its types."""
    return [form_bytes(Form(name), matrix.shape) for name in types_of(matrix)]


@dataclass(frozen=True)
class HeadTable:
    """A matrix in its types, those on the hull of bytes and divergence alone."""

    keys: tuple[str, ...]
    squares: tuple[float, ...]  # mean square of each column's inputs
    values: list[str]
    bytes: list[int]
    divergences: list[float]
    in_q4_k_m: float  # the divergence with its type in llama.cpp's mixture Q4_K_M


@torch.no_grad()
def measure_heads(judges: Feed) -> list[HeadTable]:
    """The divergence of the dense model, in nats a token, with embedding or head in each of its types. The model is
    not changed by a bit.

    The type with the largest error is run; the divergence of the others is estimated in proportion to their squared
    errors. That is rough: in one comparison with running each type (a 1.5B in bf16, one window), less the floor of
    rounding in bf16, the estimates were 0.7 to 1.35 times what was measured, and 0.4 for ``q4_k`` of the embedding."""
    chain = judges.chain
    matrices = outer_matrices(chain)
    errors_of_embedding: dict[str, float] = {}
    with contextlib.ExitStack() as held:
        dense = judges.stream()
        held.callback(dense.close)
        streams = [dense]
        for matrix in matrices:
            if not matrix.is_head:
                errors_of_embedding, stream = _with_embedding(judges, matrix)
                held.callback(stream.close)
                streams.append(stream)
        for index in range(len(chain)):
            said = f"block {index + 1}/{len(chain)} measuring the embedding"
            judges.progress(Progress("allocation", index, len(chain), said))
            with chain.block(index, judges.blocks):
                for stream in streams:
                    stream.advance(index)
        tables = []
        with chain.outer():
            for matrix in matrices:
                if matrix.is_head:
                    squares = _squares_before(matrix.module, judges, dense)
                    errors, lost = _with_head(judges, matrix, dense, squares)
                else:
                    errors = errors_of_embedding
                    squares = torch.ones(matrix.shape[1])
                    lost = _divergence(judges, dense, streams[-1])
                tables.append(_table(matrix, squares, _in_proportion(errors, lost)))
        return tables


def _with_embedding(
    judges: Feed, matrix: OuterMatrix
) -> tuple[dict[str, float], Stream]:
    """The error of each type of the embedding, and a stream with the worst. Only rows that the windows read count."""
    chain = judges.chain
    rows = judges.windows.unique().to(chain.device)
    ones = torch.ones(matrix.shape[1], device=chain.device)
    dtype = chain.stored_dtype(_name_of(chain, matrix))
    with (
        chain.outer(head=False),
        chain.block(0, judges.blocks),
        _replaced(matrix.module, rows) as weight,
    ):
        errors = _errors(matrix, weight[rows], ones, dtype)
        worst = max(errors, key=errors.__getitem__)
        weight[rows] = rounded_rows(weight[rows], worst, ones, dtype).to(weight)
        return errors, Stream(judges, pieces=0)


def _with_head(
    judges: Feed, matrix: OuterMatrix, dense: Stream, squares: Tensor
) -> tuple[dict[str, float], float]:
    """The error of each type of the head, whose outer weights are loaded, and the divergence with the worst."""
    chain = judges.chain
    dtype = chain.stored_dtype(_name_of(chain, matrix))
    # before the head changes
    goals = [chain.finish(hidden, ids) for ids, hidden in _parts(judges, dense)]
    every = torch.arange(matrix.shape[0], device=chain.device)
    total = 0.0
    with _replaced(matrix.module, every) as weight:
        some = some_rows(weight, ROWS_OF_ERRORS)
        errors = _errors(matrix, some, squares, dtype)
        worst = max(errors, key=errors.__getitem__)
        weight.copy_(rounded_rows(weight, worst, squares, dtype))
        for goal, (ids, hidden) in zip(goals, _parts(judges, dense), strict=True):
            target = goal.float().log_softmax(-1)
            logits = chain.finish(hidden, ids).float().log_softmax(-1)
            total += float((target.exp() * (target - logits)).sum())
    return errors, total / judges.windows.numel()


def _errors(
    matrix: OuterMatrix, rows: Tensor, squares: Tensor, dtype: torch.dtype
) -> dict[str, float]:
    """The squared error of rows of a matrix in each of its types, where one in column j costs ``squares_j``."""
    errors = {}
    for name in types_of(matrix):
        off = rounded_rows(rows, name, squares, dtype).float() - rows.float()
        errors[name] = float((off.square() @ squares.to(off.device)).double().sum())
    return errors


def _in_proportion(
    errors: Mapping[str, float], divergence_of_worst: float
) -> dict[str, float]:
    """The divergence of each type in proportion to its error, from that of the type with the largest error."""
    largest = max(errors.values())
    if largest == 0:
        return dict.fromkeys(errors, 0.0)
    return {
        name: divergence_of_worst * error / largest for name, error in errors.items()
    }


def _name_of(chain: Chain, matrix: OuterMatrix) -> str:
    """The name of a matrix in the model."""
    names: dict[str, str] = {key: name for name, key in chain.key_of.items()}
    return names[matrix.keys[0]]


def _batches(judges: Feed, stream: Stream) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and hidden states behind the last block, batch by batch."""
    start = 0
    for hidden in stream.hidden:
        ids = judges.windows[start : start + len(hidden)]
        start += len(hidden)
        yield ids.to(judges.chain.device), hidden


def _parts(judges: Feed, stream: Stream) -> Iterator[tuple[Tensor, Tensor]]:
    """The same, a few positions at a time, whose logits fit in memory."""
    for ids, hidden in _batches(judges, stream):
        step = max(1, HEAD_TOKENS // len(ids))
        yield from zip(ids.split(step, dim=1), hidden.split(step, dim=1), strict=True)


def _divergence(judges: Feed, dense: Stream, stream: Stream) -> float:
    """The divergence of a stream behind the last block from the dense one, in nats a token."""
    total = 0.0
    pairs = zip(_batches(judges, dense), stream.hidden, strict=True)
    for (ids, goal), hidden in pairs:
        loss = divergence_from(judges.chain, goal, ids)
        lost, _ = through_head(judges.chain, hidden, ids, loss, gradient=False)
        total += lost
    return total / judges.windows.numel()


def _squares_before(head: nn.Module, judges: Feed, dense: Stream) -> Tensor:
    """The mean squares of what the head reads, ``(width,)``, with few digits, as a run keeps them."""
    seen: list[Tensor] = []

    def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach().float().square().flatten(0, -2).sum(0))

    handle = head.register_forward_pre_hook(see)
    try:
        for ids, hidden in _parts(judges, dense):
            judges.chain.finish(hidden, ids)
    finally:
        handle.remove()
    squares = torch.stack(seen).sum(0) / judges.windows.numel()
    kept = [float(f"{value:.{DIGITS}g}") for value in squares.tolist()]
    return torch.tensor(kept, device=squares.device)


@contextlib.contextmanager
def _replaced(module: nn.Module, rows: Tensor) -> Iterator[Tensor]:
    """The weight of a module, whose ``rows`` are put back when the context ends."""
    parameter = module.weight
    assert isinstance(parameter, Tensor)
    weight = parameter.data
    before = weight[rows].clone()
    try:
        yield weight
    finally:
        weight[rows] = before


def _table(
    matrix: OuterMatrix, squares: Tensor, lost: Mapping[str, float]
) -> HeadTable:
    """The types of a matrix that are on the hull."""
    names = list(lost)
    sizes = [form_bytes(Form(name), matrix.shape) for name in names]
    divergences = list(lost.values())
    corners = hull(sizes, divergences)
    usual = grid_for("q6_k" if matrix.is_head else "q4_k", matrix.shape[1]).name
    return HeadTable(
        keys=matrix.keys,
        squares=tuple(squares.tolist()),
        values=[names[place] for place in corners],
        bytes=[sizes[place] for place in corners],
        divergences=[divergences[place] for place in corners],
        in_q4_k_m=lost[usual],
    )


@dataclass(frozen=True)
class Heads:
    """The types that were chosen for embedding and head.

    Attributes:
        forms: the form of each tensor.
        room: the bytes that are left for linears.
        divergence: what these types add to the divergence of the linears, in nats a token.
        total: both together.
    """

    forms: dict[str, HeadForm]
    room: int
    divergence: float
    total: float


def best_heads(
    tables: Sequence[HeadTable], room: int, divergence_of: Callable[[int], float]
) -> Heads:
    """The types with the least divergence in ``room`` bytes for all, if that of linears in the bytes that are left is
    ``divergence_of``; it is infinite where no forms are that small."""
    best: tuple[float, float, int, tuple[int, ...]] | None = None
    for places in itertools.product(*[range(len(table.values)) for table in tables]):
        pairs = list(zip(tables, places, strict=True))
        left = room - sum(table.bytes[place] for table, place in pairs)
        of_heads = math.fsum(table.divergences[place] for table, place in pairs)
        total = of_heads + divergence_of(left)
        if best is None or total < best[0]:
            best = (total, of_heads, left, places)
    assert best is not None
    total, of_heads, left, taken = best
    forms: dict[str, HeadForm] = {}
    for table, place in zip(tables, taken, strict=True):
        form = HeadForm(table.values[place], list(table.squares))
        forms |= dict.fromkeys(table.keys, form)
    return Heads(forms, left, of_heads, total)


def smallest_heads(
    tables: Sequence[HeadTable],
    goal: float,
    least: int,
    most: int,
    divergence_of: Callable[[int], float],
) -> Heads:
    """The types in the smallest file that diverges by at most ``goal``. Linears take ``least`` to ``most`` bytes."""
    low = least + sum(min(table.bytes) for table in tables)
    high = most + sum(max(table.bytes) for table in tables)
    precise = (high - low) // ROOMS + 1
    while high - low > precise:
        middle = (low + high) // 2
        if best_heads(tables, middle, divergence_of).total <= goal:
            high = middle
        else:
            low = middle
    return best_heads(tables, high, divergence_of)


def with_rest(
    forms: Mapping[str, HeadForm], tables: Sequence[HeadTable], rest: int
) -> dict[str, HeadForm]:
    """The forms with larger ones where ``rest`` bytes that the linears left have room for them."""
    larger = dict(forms)
    for table in tables:
        now = table.values.index(forms[table.keys[0]].values)
        for place in range(len(table.values) - 1, now, -1):
            more = table.bytes[place] - table.bytes[now]
            if more <= rest:
                form = HeadForm(table.values[place], list(table.squares))
                larger |= dict.fromkeys(table.keys, form)
                rest -= more
                break
    return larger


def between_sizes(
    sizes: Sequence[float], divergences: Sequence[float], least: int
) -> Callable[[int], float]:
    """The divergence of linears at any bytes: its logarithm is interpolated between ``sizes``, which ascend."""
    logarithms = np.log(np.maximum(divergences, 1e-9))

    def divergence_of(size: int) -> float:
        if size < least:
            return math.inf
        return float(np.exp(np.interp(size, sizes, logarithms)))

    return divergence_of


def some_sizes(tables: Collection[HeadTable], room: int, least: int) -> list[float]:
    """Bytes of linears at which their divergence is measured, ascending: from those beside the largest types of
    embedding and head to those beside the smallest."""
    most = float(room - sum(min(table.bytes) for table in tables))
    low = max(least, room - sum(max(table.bytes) for table in tables))
    if low >= most:
        return [most]
    return [*np.linspace(low, most, POINTS)]


def rounded_rows(
    weight: Tensor, values: str, squares: Tensor, dtype: torch.dtype
) -> Tensor:
    """A matrix ``(rows, columns)`` rounded to nearest in a type of llama.cpp, in ``dtype``, with scales that have the
    least error where one in column j costs ``squares_j``."""
    rounded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    costs = squares.to(weight.device)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        rounded[rows] = to_nearest(weight[rows].float(), costs, values, dtype)
    return rounded


def as_written(weight: Tensor, form: HeadForm) -> Tensor:
    """A tensor of embedding or head in the form that was chosen, in its own dtype."""
    squares = torch.tensor(form.squares)
    return rounded_rows(weight, form.values, squares, weight.dtype)
