"""Scales of a row's groups, or scales and minima, solved for together by least squares, with the numbers held."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparsepack.grid import Groups

RIDGE = 1e-3  # added to the diagonal of the systems of scales, as a share of it: rows hardly tell some groups apart
# bounds of the change of a scale in a turn, for systems that are nearly singular
FACTORS = (0.5, 2.0)
SYSTEMS = 1 << 22  # elements of the systems that are solved at once: 16 MiB


def best_factors(
    weight: Tensor, slope: Tensor, matrix: Tensor, groups: Groups
) -> Tensor:
    """Least-squares scale factor of each group of a weight ``(out, in)``: ``(out, groups)``.

    With the groups of a row as vectors ``v_a``, the factors ``1 + t`` solve ``A t = −s`` with ``A_ab = v_aᵀ G v_b`` and
    ``s_a`` the ``slope`` along ``v_a``: half the gradient of the error, ``(Ŵ − W) G``, for G the ``matrix``. A small
    ridge keeps them near 1 where the rows hardly tell groups apart."""
    count = len(groups.collect(weight[:1]))  # groups of a row
    rows = max(1, SYSTEMS // max(count**2, weight.shape[1]))
    changes = []
    for top in range(0, len(weight), rows):
        # columns of a transposed one would be far apart
        part = weight[top : top + rows].contiguous()
        system = part.new_zeros(len(part), count, count)
        for number in range(count):
            first = number * groups.size
            inside = slice(first, first + groups.size)
            # The system is symmetric: products with the columns of earlier groups are known.
            products = (part[:, inside] @ matrix[inside, first:]).mul_(part[:, first:])
            later = replace(groups, columns=products.shape[1])
            sums = later.collect(products).sum(dim=1)
            system[:, number:, number] = sums.view(len(part), -1)
        along = groups.collect(slope[top : top + rows] * part).sum(dim=1)
        changes.append(_solved(system, along.view(len(part), count)))
    return (1 - torch.cat(changes)).clamp_(*FACTORS)


def best_lines(
    above: Tensor, slope: Tensor, matrix: Tensor, groups: Groups, minima: Tensor
) -> tuple[Tensor, Tensor]:
    """Least-squares factors of scales, and minima, both ``(groups, 1)``, of a weight that is ``above (out, in)`` plus
    its ``minima``.

    The system is that of ``best_factors``, with a second vector for each group, which is 1 in its columns. Minima of 0
    stay."""
    size = groups.size
    count = above.shape[1] // size  # groups of a row
    of_rows = minima.view(len(above), count)
    sums = matrix.view(len(matrix), count, size).sum(dim=2)  # (in, groups)
    ones = sums.view(count, size, count).sum(dim=1)  # (groups, groups)
    rows = max(1, SYSTEMS // max(4 * count**2, above.shape[1]))
    changes = []
    for top in range(0, len(above), rows):
        part = above[top : top + rows].contiguous()
        few = len(part)
        free = (of_rows[top : top + rows] != 0).to(part.dtype)
        system = part.new_zeros(few, 2 * count, 2 * count)
        for number in range(count):
            inside = slice(number * size, (number + 1) * size)
            products = (part[:, inside] @ matrix[inside]).mul_(part)
            system[:, number, :count] = products.view(few, count, size).sum(dim=2)
            system[:, count:, number] = (part[:, inside] @ sums[inside]).mul_(free)
        system[:, count:, count:] = ones * free[:, :, None] * free[:, None, :]
        slopes = slope[top : top + rows]
        along = (slopes * part).reshape(few, count, size).sum(dim=2)
        across = slopes.reshape(few, count, size).sum(dim=2).mul_(free)
        changes.append(_solved(system, torch.cat((along, across), dim=1)))
    of_scales, of_minima = torch.cat(changes).chunk(2, dim=1)
    factors = (1 - of_scales).clamp_(*FACTORS)
    return factors.view(-1, 1), minima - of_minima.reshape(-1, 1)


def _solved(system: Tensor, along: Tensor) -> Tensor:
    """The solutions ``(rows, n)`` of symmetric systems ``(rows, n, n)``, of which the lower halves are read and the
    diagonals raised; 0 where a system has no finite solution."""
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.mul_(1 + RIDGE).masked_fill_(diagonal <= 0, 1.0)
    lower, failed = torch.linalg.cholesky_ex(system)
    solution = torch.cholesky_solve(along.unsqueeze(2), lower).squeeze(2)
    solved = (failed == 0) & solution.isfinite().all(dim=1)
    return torch.where(solved.unsqueeze(1), solution, 0.0)
