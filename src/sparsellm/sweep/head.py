"""A loss on the logits, and its gradient at the output of the last block, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sparsellm.chain import Chain

HEAD_TOKENS = 256  # in a chunk, over all windows: several tensors of (tokens, vocabulary) are in memory at once

HeadLoss = Callable[[Tensor, slice], Tensor]
"""``loss(logits (batch, span, vocabulary) fp32, span)`` returns a scalar: the loss of these positions."""


def through_head(chain: Chain, hidden: Tensor, ids: Tensor, loss: HeadLoss, *, gradient: bool) -> tuple[float, Tensor]:
    """A loss that is a sum over positions, and its gradient; the logits of a few positions are in memory at a time.

    Args:
        chain: with its outer weights loaded.
        hidden: the output of the last block, ``(batch, seq, hidden)``.
        ids: the token ids that belong to it, ``(batch, seq)``.
        loss: of the logits of a span of positions.
        gradient: whether to compute the gradient; if not, ``hidden`` itself is returned in its place.

    Returns:
        The loss, and its gradient ``(batch, seq, hidden)`` in the dtype of ``hidden``.
    """
    total, parts = 0.0, []
    step = max(1, HEAD_TOKENS // len(ids))
    for first in range(0, ids.shape[1], step):
        span = slice(first, min(first + step, ids.shape[1]))
        part = hidden[:, span].detach()
        with torch.set_grad_enabled(gradient):
            part = part.requires_grad_(gradient)
            value = loss(chain.logits(part.to(chain.dtype), ids[:, span]).float(), span)
            if gradient:
                parts.append(torch.autograd.grad(value, part)[0])
        total += float(value.detach())
    return total, torch.cat(parts, dim=1) if gradient else hidden


def divergence_from(chain: Chain, dense: Tensor, ids: Tensor) -> HeadLoss:
    """The loss ``KL(dense ‖ pruned)`` in nats, summed over positions.

    Args:
        chain: with its outer weights loaded.
        dense: the output of the dense model's last block, ``(batch, seq, hidden)``.
        ids: the token ids that belong to it, ``(batch, seq)``.
    """

    def divergence(logits: Tensor, span: slice) -> Tensor:
        target = functional.log_softmax(chain.finish(dense[:, span], ids[:, span]).float(), -1)
        return functional.kl_div(functional.log_softmax(logits, -1), target, log_target=True, reduction="sum")

    return divergence
