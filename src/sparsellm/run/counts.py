"""Counts of zeros over every matrix of the blocks, pruned or not, and warnings where they are too few."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, computed_field

from sparsellm.errors import some
from sparsellm.files.reader import CheckpointReader
from sparsellm.method.blocks.task import UNREACHED
from sparsellm.model import Chain
from sparsellm.model.matrices import (
    DENSE_LIMIT,
    BlockMatrix,
    all_matrices,
    block_matrices,
    is_excluded,
    kind_of,
)
from sparsellm.patterns import count_zeros, most_kept, strictest
from sparsellm.recipe import Recipe
from sparsellm.records import DenseMatrix, ExpertsOfBlock, LinearResult, Matrix, Totals

Reason = Literal[
    "excluded",
    "allowed dense",
    "shared with the embedding or the head",
    "gate",
    "small",
    "not a linear",
]
"""Why a matrix stays dense. A gate is one whose outputs choose or scale other modules; small ones are not linears."""
_SHOWN = 6  # kinds of matrices that a warning names
RARE = 0.1  # share of the mean tokens of an expert below which little is known of it


class MatrixZeros(Matrix):
    """Zeros of one matrix in block ``block`` of a checkpoint."""

    block: int
    # see patterns.most_kept; counted in linears only
    kept: tuple[int, int] = Field((4, 8), exclude=True)
    # whether it is the weight of one; other matrices are not pruned
    linear: bool = Field(True, exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def pattern(self) -> str | None:
        return strictest([self.kept])


def inspect_block(chain: Chain, index: int) -> Iterator[MatrixZeros]:
    """The zeros of every matrix of the loaded block ``index``."""
    for matrix in block_matrices(chain, index):
        linear = matrix.linear
        kept = (4, 8)
        if linear is None:
            weight = chain.parameter(matrix.name)
        else:
            weight = linear.weight()
            kept = most_kept(weight)
        yield MatrixZeros(
            name=matrix.label,
            block=index,
            shape=tuple(weight.shape),
            zeros=count_zeros(weight),
            kept=kept,
            linear=linear is not None,
        )


def pruned_share(chain: Chain, start: CheckpointReader | None = None) -> float:
    """The largest share of zeros in linears of the first, middle and last block, or ``start``'s; 0 if below a fifth."""
    shares = [0.0]
    for index in {0, len(chain) // 2, len(chain) - 1}:
        with chain.block(index, start):
            weights = [linear.parameter for linear in chain.linears(index)]
            shares.append(
                sum(map(count_zeros, weights))
                / max(1, sum(weight.numel() for weight in weights))
            )
    largest = max(shares)
    if largest < 0.2:
        return 0.0
    return largest


def left_dense(
    chain: Chain,
    recipe: Recipe,
    pruned: Iterable[LinearResult],
    shards: Sequence[Path] = (),
) -> list[DenseMatrix]:
    """Every matrix of the blocks of a pruned model that is not among the pruned linears, with its zeros. ``shards`` are
    the files of the written blocks; empty for a model in memory."""
    done = {result.name for result in pruned}
    everything = all_matrices(chain)
    kept = [
        matrix
        for matrix in everything
        if matrix.linear is None or matrix.linear.name not in done
    ]
    weights = Counter[int]()  # by block
    for matrix in everything:
        weights[matrix.block] += matrix.weights
    written = {matrix.block: shards[matrix.block] for matrix in kept if shards}
    readers = {
        block: CheckpointReader(shard.parent, [shard])
        for block, shard in written.items()
    }
    return [
        DenseMatrix(
            name=matrix.label,
            block=matrix.block,
            shape=matrix.shape,
            zeros=count_zeros(chain.parameter(matrix.name, readers.get(matrix.block))),
            reason=_reason(matrix, recipe, chain.gates, weights[matrix.block]),
            kind=kind_of(chain, matrix.label, matrix.block),
        )
        for matrix in kept
    ]


def _reason(
    matrix: BlockMatrix, recipe: Recipe, gates: set[str], block_weights: int
) -> Reason:
    """The reason why a matrix stays dense, in a block with ``block_weights`` weights."""
    if is_excluded(matrix.name, recipe.exclude, recipe.only):
        return "excluded"
    if matrix.linear is None and is_excluded(matrix.name, recipe.allow_dense):
        return "allowed dense"
    if matrix.shared:
        return "shared with the embedding or the head"
    if matrix.name in gates:
        return "gate"
    if matrix.weights <= DENSE_LIMIT * block_weights:
        return "small"
    return "not a linear"


def unreached(linears: Sequence[LinearResult]) -> list[str]:
    """A warning that names the linears that no calibration token reached; empty if there are none."""
    names = [linear.name for linear in linears if UNREACHED in linear.notes]
    if not names:
        return []
    said = (
        f"no calibration token reached {len(names)} of {len(linears)} linears, or their inputs were all 0; these were "
        f"pruned by magnitude: {some(names, _SHOWN)}; more calibration samples may reach experts, but not linears "
        "of a shared block that only its other places use"
    )
    return [said]


def few_tokens(linears: Sequence[LinearResult], least: int) -> list[str]:
    """A warning that names the experts that fewer than ``least`` tokens were routed to, with their counts; or none."""
    tokens = {
        linear.name.rpartition(".")[0]: linear.tokens
        for linear in linears
        if linear.tokens is not None
    }
    few = sorted((count, name) for name, count in tokens.items() if count < least)
    if not few:
        return []
    said = some([f"{name} ({count})" for count, name in few], _SHOWN)
    return [
        f"fewer than {least} calibration tokens were routed to {len(few)} of {len(tokens)} experts, which were pruned "
        f"mostly by the statistics of all tokens: {said}; more calibration samples may reach them"
    ]


def rarely_chosen(experts: Sequence[ExpertsOfBlock]) -> list[str]:
    """A warning that names removed experts to which few of the calibration tokens were routed; empty if there are none.

    An expert for a kind of text that calibration lacks looks useless."""
    few = [
        f"block {mixture.block} expert {number} ({tokens})"
        for mixture in experts
        for number, tokens in enumerate(mixture.tokens)
        if number not in mixture.kept
        and tokens < RARE * sum(mixture.tokens) / len(mixture.tokens)
    ]
    if not few:
        return []
    said = (
        f"{len(few)} removed experts got less than {RARE:.0%} of their share of the calibration tokens: "
        f"{some(few, _SHOWN)}; if the text lacks a kind that the model will read, add it to the calibration"
    )
    return [said]


def shortfall(
    linears: Sequence[LinearResult], dense: Sequence[DenseMatrix], asked: float
) -> list[str]:
    """A warning if the sparsity over every matrix of the blocks is below the requested one; else empty.

    Rounding may leave each matrix one zero short. The warning names the matrices that stayed dense, largest first, each
    kind once, and the linears with too few zeros."""
    total = Totals.of([*linears, *dense])
    if asked * total.weights - total.zeros <= len(linears) + len(dense):
        return []
    kinds: dict[tuple[str, str], list[DenseMatrix]] = {}
    for matrix in dense:
        kinds.setdefault((matrix.kind, matrix.reason), []).append(matrix)
    ordered = sorted(
        kinds.items(), key=lambda item: -sum(matrix.weights for matrix in item[1])
    )
    causes = []
    for (kind, reason), part in ordered:
        where = f"{len(part)} of {kind}"
        if len(part) == 1:
            where = part[0].name
        causes.append(
            f"{where} ({sum(m.weights for m in part) / total.weights:.2%} of the weights, {reason})"
        )
    causes += [
        f"{linear.name} (zeros {linear.sparsity:.2%} of {linear.asked:.2%})"
        for linear in linears
        if linear.asked * math.prod(linear.shape) - linear.zeros > 1
    ]
    why = "the steps of the pattern are that coarse"
    if causes:
        why = f"left dense: {some(causes, _SHOWN, '; ')}"
    return [
        f"sparsity {total.sparsity:.2%} was reached over all matrices of the blocks, {asked:.2%} was requested; {why}"
    ]
