"""A loss on the logits, and its gradient at the output of the last block, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat

import torch
from torch import Tensor
from torch.nn import functional

from sparsellm.model import Chain

HEAD_TOKENS = 256  # tokens of a chunk, over all windows: several tensors (tokens, vocabulary) are in memory at once
# logits that a loss takes at a time: the allocator uses 16 MiB again, and maps more anew
ROWS_ELEMENTS = 1 << 22

HeadLoss = Callable[[Tensor, slice, Tensor | None], float]
"""``loss(logits (batch, span, vocabulary) fp32, span, slope)`` returns the loss of these positions, and writes its
gradient at the logits to ``slope``, of their shape, unless that is None. It does not change the logits."""
# Gradients are written out: autograd takes twice as many passes over (tokens, vocabulary).


def through_head(
    chain: Chain, hidden: Tensor, ids: Tensor, loss: HeadLoss, *, gradient: bool
) -> tuple[float, Tensor]:
    """A loss that is a sum over positions, and its gradient at ``hidden (batch, seq, hidden)``, in the dtype of that:
    the output of the last block for token ids ``(batch, seq)``. Without ``gradient`` the second result is ``hidden``.

    The outer weights of the chain must be loaded. The logits of a few positions are in memory at a time."""
    total = 0.0
    slopes = torch.empty(0)
    parts: list[Tensor] = []
    step = max(1, HEAD_TOKENS // len(ids))
    for first in range(0, ids.shape[1], step):
        span = slice(first, min(first + step, ids.shape[1]))
        part = hidden[:, span].detach()
        with torch.set_grad_enabled(gradient):
            part = part.requires_grad_(gradient)
            logits = chain.logits(part.to(chain.dtype), ids[:, span]).float()
        if not gradient:
            total += loss(logits, span, None)
            continue
        if not parts:  # used again for every chunk: the first is the largest
            slopes = torch.empty_like(logits).flatten()
        slope = slopes[: logits.numel()].view_as(logits)
        total += loss(logits.detach(), span, slope)
        parts.append(torch.autograd.grad(logits, part, slope)[0])
        del logits  # before the next are computed
    if gradient:
        hidden = torch.cat(parts, dim=1)
    return total, hidden


def next_token_loss(targets: Tensor) -> HeadLoss:
    """The cross-entropy in nats, summed over positions; ``targets`` are the ids ``(batch, seq)`` of the next tokens."""

    def cross_entropy(logits: Tensor, span: slice, slope: Tensor | None) -> float:
        total = 0.0
        for rows, target, part in _rows(logits, targets[:, span, None], slope):
            logarithm = functional.log_softmax(rows, -1)
            total -= float(logarithm.gather(-1, target).double().sum())
            if part is not None:  # softmax − 1 at the target
                torch.exp(logarithm, out=part)
                minus_one = -torch.ones_like(target, dtype=part.dtype)
                part.scatter_add_(-1, target, minus_one)
        return total

    return cross_entropy


def divergence_from(chain: Chain, dense: Tensor, ids: Tensor) -> HeadLoss:
    """The loss ``KL(dense ‖ pruned)`` in nats, summed over positions, from the output of the dense model's last block
    ``(batch, seq, hidden)`` and its token ids."""

    def divergence(logits: Tensor, span: slice, slope: Tensor | None) -> float:
        total = 0.0
        goals = chain.finish(dense[:, span], ids[:, span])
        for rows, goal, part in _rows(logits, goals, slope):
            target = functional.log_softmax(goal.float(), -1)
            logarithm = functional.log_softmax(rows, -1)
            difference = target - logarithm
            divergences = difference.mul_(target.exp_()).sum(-1)  # by position
            total += float(divergences.double().sum())
            if part is not None:
                torch.sub(logarithm.exp_(), target, out=part)
        return total

    return divergence


def _rows(
    logits: Tensor, goals: Tensor, slope: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Some positions at a time, ``(positions, ...)``, of tensors ``(batch, span, ...)``."""
    count = max(1, ROWS_ELEMENTS // logits.shape[-1])
    parts: Iterable[Tensor | None] = repeat(None)
    if slope is not None:
        parts = slope.flatten(0, 1).split(count)
    yield from zip(  # noqa: B905 - parts may be endless
        logits.flatten(0, 1).split(count), goals.flatten(0, 1).split(count), parts
    )
