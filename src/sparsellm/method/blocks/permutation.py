"""N:M by symmetry: channels between linears are ordered so that the largest weights do not share a group.

N:M keeps n weights of every m consecutive inputs of an output, whatever their size. With channels in another order,
other weights meet in a group. The order maximises the sum of kept scores ``|w_ij| √E[x_j²]`` (arXiv 2310.15929): in
turn, one member is taken out of every group, and a linear assignment puts the members back where they are worth most.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.errors import NumericalError
from sparsellm.method.blocks.channels import Channels
from sparsellm.method.blocks.task import BlockTask
from sparsellm.method.solvers.scaling import safe_factor
from sparsellm.model import LinearView
from sparsellm.model.capture import watch
from sparsellm.patterns import NM

ROUNDS = 3  # each takes every member out of its group once; later rounds change nothing
GROUPS = 256  # that exchange members with each other: the time of a round rises with their number
PIECE = 1 << 18  # scores compared at a time, which fit into a processor's cache


@torch.no_grad()
def permute_block(
    task: BlockTask, proved: list[Channels], weights: list[Tensor] | None
) -> None:
    """Permutes channels of the block. The first process chooses the permutations, from its first batch and ``weights``
    of its tokens, batches ``(batch, seq)`` or None."""
    orders = parallel.from_main(partial(_orders, task, proved, weights))
    for channels, order in zip(proved, orders, strict=True):
        channels.permute(order)


def _orders(
    task: BlockTask, proved: list[Channels], weights: list[Tensor] | None
) -> list[Tensor]:
    """The best order of the channels of each, from the first batch of this process."""
    squares: dict[str, Tensor] = {}

    def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
        rows = x.flatten(0, -2).float().square()
        if weights is not None:
            rows = rows * weights[0].reshape(-1, 1)
        squares[linear.name] = rows.mean(0)

    with watch([channels.reader for channels in proved], see):
        task.stream.run_batch(task.index, 0)
    return [best_order(channels, squares[channels.reader.name]) for channels in proved]


def best_order(channels: Channels, mean_squares: Tensor) -> Tensor:
    """The order ``(heads, width)``, on the CPU, that ``spread`` chooses by the inputs' mean squares ``(in,)``."""
    reader = channels.reader
    if not bool(torch.isfinite(mean_squares).all()):
        raise NumericalError(
            f"{reader.name}: the squares of its inputs are too large for fp32"
        )
    weight = reader.weight().abs_()
    scores = weight.mul_(safe_factor(weight)).mul_(mean_squares.sqrt())
    heads = [
        torch.cat([scores[:, copy] for copy in head])
        for head in channels.inputs.transpose(0, 1)
    ]
    return torch.stack([spread(head, channels.pattern) for head in heads]).cpu()


def spread(scores: Tensor, pattern: NM) -> Tensor:
    """The natural order of the inputs, ``(inputs,)``, or one in which N:M keeps a larger sum of scores ``(out, in)``:
    inputs are dealt by mean score; then at most ``GROUPS`` groups at a time, spread evenly, exchange members."""
    groups = scores.shape[1] // pattern.m
    order = scores.mean(0).argsort(descending=True, stable=True)
    dealt = order.view(pattern.m, groups).T  # (groups, m)
    parts = -(-groups // GROUPS)
    ordered = [_exchanged(scores, dealt[part::parts], pattern) for part in range(parts)]
    natural = order.sort().values.view(groups, pattern.m)

    def kept(members: Tensor) -> float:
        pieces = (
            part[:, members].topk(pattern.n, dim=-1).values for part in scores.split(64)
        )
        return sum(float(piece.double().sum()) for piece in pieces)

    return max(natural, torch.cat(ordered), key=kept).reshape(-1)


def _exchanged(scores: Tensor, members: Tensor, pattern: NM) -> Tensor:
    """The members ``(groups, m)`` after rounds of exchanges between these groups."""
    from scipy.optimize import linear_sum_assignment

    rows = max(1, PIECE // len(members) ** 2)
    for _ in range(ROUNDS):
        before = members
        for place in range(pattern.m):
            rest = members[:, [other for other in range(pattern.m) if other != place]]
            # (groups, members that are put back)
            worth = scores.new_zeros(len(members), len(members))
            for part in scores.split(rows):
                # a group keeps the larger of the two
                least = part[:, rest].topk(pattern.n, dim=-1).values[..., -1]
                worth += torch.maximum(
                    least[:, :, None], part[:, None, members[:, place]]
                ).sum(0)
            _, chosen = linear_sum_assignment(worth.cpu().numpy(), maximize=True)
            members = members.clone()
            members[:, place] = members[
                torch.from_numpy(chosen).to(members.device), place
            ]
        if torch.equal(members, before):
            break
    return members
