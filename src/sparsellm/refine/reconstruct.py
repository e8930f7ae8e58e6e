"""Reconstruction of a pruned block: its kept weights, biases and norms follow the dense outputs (arXiv 2510.14444)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.chain.chain import hidden_of

if TYPE_CHECKING:
    from sparsellm.methods.base import BlockTask


def reconstruct(
    task: BlockTask,
    targets: list[Tensor],
    weights: list[Tensor] | None,
    *,
    steps: int,
    learning_rate: float,
    warmup: float = 0.1,
) -> None:
    """Adam on everything in the block that may change; zeros of the pruned linears stay exactly zero.

    The learning rate is relative to the root mean square of each parameter, rises linearly over the first
    ``warmup`` of the steps and falls to zero along a cosine.

    Args:
        task: the pruned block, with the hidden states that enter it.
        targets: what should leave it, batches ``(batch, seq, hidden)``.
        weights: of each token, batches ``(batch, seq)``, or None.
        steps: of Adam, each on one window.
        learning_rate: relative, see above.
        warmup: share of the steps.
    """
    stream, index = task.stream, task.index
    block = stream.chain.blocks[index]
    masks = {id(linear.parameter): linear.parameter != 0 for linear in task.linears}
    generator = torch.Generator().manual_seed(index)
    windows = [(batch, row) for batch, hidden in enumerate(stream.hidden) for row in range(len(hidden))]
    everywhere = [(process, own) for process, count in enumerate(parallel.gather(len(windows))) for own in range(count)]
    calls = stream.calls(index)
    with _trainable(block) as parameters, torch.enable_grad():
        groups = [
            {"params": [p], "scale": float(p.detach().float().square().mean().sqrt().clamp(min=1e-8))}
            for p in parameters
        ]
        optimiser = torch.optim.Adam(groups, lr=learning_rate, betas=(0.9, 0.95))
        order: list[int] = []
        for step in range(steps):
            if not order:
                order = torch.randperm(len(everywhere), generator=generator).tolist()
            process, own = everywhere[order.pop()]
            rate = learning_rate * _schedule(step, steps, warmup)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["scale"]
            optimiser.zero_grad(set_to_none=True)
            if process == parallel.rank():  # the window is in one process; all take the step
                batch, row = windows[own]
                token_weights = weights[batch][row : row + 1] if weights is not None else None
                output = hidden_of(calls[batch].on(block, stream.hidden[batch][row : row + 1]), block)
                _loss(
                    output, stream.hidden[batch][row : row + 1], targets[batch][row : row + 1], token_weights
                ).backward()
            _share_gradients(parameters, process)
            for parameter in parameters:
                if parameter.grad is not None and id(parameter) in masks:
                    parameter.grad.mul_(masks[id(parameter)])
            optimiser.step()
    for linear in task.linears:  # what is in memory is what will be written
        linear.assign(linear.weight())


def _loss(output: Tensor, hidden: Tensor, wanted: Tensor, token_weights: Tensor | None) -> Tensor:
    """The squared error of what a block adds to its hidden states, relative to what it should add."""
    error = (output - wanted).float().square().sum(-1)  # (1, seq)
    size = (wanted - hidden).float().square().sum(-1)
    if token_weights is not None:
        error, size = error * token_weights, size * token_weights
    return error.sum() / size.sum()


def _share_gradients(parameters: list[nn.Parameter], source: int) -> None:
    """Gives every process the gradients of one; a parameter without one there has none anywhere."""
    if parallel.size() == 1:
        return
    reached = parallel.broadcast([parameter.grad is not None for parameter in parameters], source)
    for parameter, has_gradient in zip(parameters, reached, strict=True):
        if has_gradient:
            own = parameter.grad if parameter.grad is not None else torch.empty_like(parameter)
            parameter.grad = parallel.broadcast_(own.contiguous(), source)


def _schedule(step: int, steps: int, warmup: float) -> float:
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress))))


@contextmanager
def _trainable(block: nn.Module) -> Iterator[list[nn.Parameter]]:
    parameters = [p for p in block.parameters() if p.is_floating_point()]
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield parameters
    finally:
        for p, flag in zip(parameters, before, strict=True):
            p.requires_grad_(flag)
            p.grad = None
