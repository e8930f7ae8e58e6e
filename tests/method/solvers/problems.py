"""Small pruning problems, and their true answers by brute force, in double precision."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from sparsellm.method.gram import Gram
from sparsellm.patterns import NM, Pattern
from tests.shares import violations, zeros_of


def weight_of(out: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))


def gram_of(inputs: int, tokens: int | None = None, seed: int = 0) -> Gram:
    """The Gram matrix of correlated inputs: a decaying spectrum, and one input in eight much larger than the rest."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tokens = 4 * inputs + 8 if tokens is None else tokens
    mixing = torch.randn(inputs, inputs, generator=generator)
    x = (
        torch.randn(tokens, inputs, generator=generator)
        * torch.arange(1, inputs + 1).float().pow(-0.7)
    ) @ mixing
    x[:, ::8] *= 5
    return Gram((x.T @ x / tokens), tokens)


def losses(weight: Tensor, original: Tensor, gram: Gram) -> Tensor:
    """The loss of each row, fp64."""
    difference = (weight - original).double()
    return (difference @ gram.matrix.double() * difference).sum(dim=1)


def loss(weight: Tensor, original: Tensor, gram: Gram) -> float:
    return float(losses(weight, original, gram).sum())


def relative(weight: Tensor, original: Tensor, gram: Gram) -> float:
    return loss(weight, original, gram) / loss(
        torch.zeros_like(original), original, gram
    )


def best_on(mask: Tensor, original: Tensor, gram: Gram) -> Tensor:
    """The best weight (out, in) on a mask: each row solves the normal equation of its kept inputs."""
    matrix, best = gram.matrix.double(), torch.zeros_like(original, dtype=torch.float64)
    for row, kept in enumerate(mask):
        best[row, kept] = torch.linalg.lstsq(
            matrix[kept][:, kept], matrix[kept] @ original[row].double()
        ).solution
    return best


def true_best(original: Tensor, gram: Gram, pattern: Pattern) -> float:
    """The relative error of the best weight over all masks of a pattern, each with its best values."""
    outputs, inputs = original.shape
    by_zeros = []  # for each row: the lowest loss for each number of zeros
    for row in original:
        lowest = dict.fromkeys(range(inputs + 1), math.inf)
        for kept in itertools.product([False, True], repeat=inputs):
            mask = torch.tensor([kept])
            if not isinstance(pattern, NM) or violations(pattern, mask.float()) == 0:
                zeros = inputs - sum(kept)
                lowest[zeros] = min(
                    lowest[zeros], loss(best_on(mask, row[None], gram), row[None], gram)
                )
        by_zeros.append(lowest)
    total = zeros_of(pattern, original.shape)
    # the lowest loss of the rows so far for each number of zeros in them
    over_rows = {0: 0.0}
    for lowest in by_zeros:
        if isinstance(pattern, NM):
            lowest = {total // outputs: lowest[total // outputs]}
        together: dict[int, float] = {}
        for (before, one), (zeros, other) in itertools.product(
            over_rows.items(), lowest.items()
        ):
            together[before + zeros] = min(
                together.get(before + zeros, math.inf), one + other
            )
        over_rows = together
    return over_rows[total] / loss(torch.zeros_like(original), original, gram)


def column_by_column(
    weight: Tensor, gram: Gram, pattern: Pattern, step: int, damping: float = 0.01
) -> Tensor:
    """Each column is pruned and all later ones updated, by a new inverse; ``step`` columns get their mask at a time."""
    outputs, inputs = weight.shape
    work = weight.double().clone()
    damped = (
        gram.matrix.double()
        + damping * gram.matrix.double().diagonal().mean() * torch.eye(inputs)
    )
    kept = torch.ones(weight.shape, dtype=torch.bool)
    for j in range(inputs):
        if j % step == 0:
            stop = min(j + step, inputs)
            # U_kk² is the first diagonal entry of the inverse of the part of the matrix from k on
            pivots = torch.stack(
                [torch.linalg.inv(damped[k:, k:])[0, 0] for k in range(j, stop)]
            )
            scores = work[:, j:stop].square() / pivots
            if isinstance(pattern, NM):
                kept[:, j:stop] = kept[:, j:stop].scatter(
                    1, scores.argsort(dim=1)[:, : pattern.m - pattern.n], False
                )
            else:
                zeros = zeros_of(pattern, weight.shape)
                # by columns: ties aside, the order does not matter
                flat = scores.flatten()
                chosen = torch.ones(len(flat), dtype=torch.bool)
                chosen[
                    flat.argsort()[: zeros * stop // inputs - zeros * j // inputs]
                ] = False
                kept[:, j:stop] = chosen.reshape(scores.shape)
        inverse = torch.linalg.inv(damped[j:, j:])
        for row in range(outputs):
            if not kept[row, j]:
                work[row, j:] -= work[row, j] / inverse[0, 0] * inverse[0]
                work[row, j] = 0
    return work
