"""Training of kept weights: a block that runs on fp32 parameters, Adam for weights with zeros, held-out steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.model import Chain
from sparsellm.text.windows import spread_evenly

BETAS = (0.9, 0.95)
EPSILON = 1e-8
FACTOR_RATE = 5.0  # steps of factors of groups, as a multiple of the rate
FACTOR_LIMIT = 1e-3  # the most that they are
RISING = 10  # steps: with 1, a sweep of 14 steps ends where it began, as Adam's first steps follow noise
LEAST_STEPS = 4  # with fewer, nothing is held out
# steps: enough to compare states; further steps are worth more as training data
MOST_HELD_OUT = 8

T = TypeVar("T")


@contextmanager
def running_on(
    chain: Chain, index: int, parameters: Mapping[str, nn.Parameter]
) -> Iterator[None]:
    """Replaces the parameters of block ``index`` by these until the context ends, then restores its own."""
    before = chain.block_parameters(index)
    for name, parameter in parameters.items():
        chain.set_parameter(name, parameter)
    try:
        yield
    finally:
        for name in parameters:
            chain.set_parameter(name, before[name])


def add_to(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    """Adds ``part`` to the sum with this name, in place; the first part becomes the sum."""
    if name in sums:
        sums[name].add_(part)
    else:
        sums[name] = part


def joined(tensors: Mapping[str, Tensor]) -> Tensor:
    """The elements of all tensors in order, ``(elements,)`` fp32."""
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors.values()])


def split(elements: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Views ``(..., *shape)`` of ``(..., elements)``, in which tensors of these shapes follow each other."""
    parts = elements.split([shape.numel() for shape in shapes.values()], -1)
    return {
        name: part.view(elements.shape[:-1] + shapes[name])
        for name, part in zip(shapes, parts, strict=True)
    }


@torch.no_grad()
def adam_step(
    parameters: Mapping[str, nn.Parameter],
    state: Tensor,
    rate: float,
    number: int,
    *,
    pruned: Collection[str] = (),
    factors: Collection[str] = (),
    sizes: Mapping[str, float] | None = None,
) -> None:
    """Takes step ``number`` of Adam, from 1, on fp32 parameters from their gradients, which are cleared.

    Args:
        state: the two moments, ``(2, elements)`` fp32, zeros at first; changed in place.
        rate: the learning rate, relative to the root mean square of each parameter.
        pruned: names of the parameters whose zeros stay exactly zero.
        factors: names of the parameters that multiply groups of values. Their gradients are sums over a group and have
            less noise, so they take longer steps.
        sizes: the root mean square of each parameter, where only some of its rows are here.
    """
    groups = []
    states: dict[Tensor, dict[str, Tensor]] = {}
    moments = split(
        state, {name: parameter.shape for name, parameter in parameters.items()}
    )
    for name, parameter in parameters.items():
        if parameter.grad is None or not parameter.numel():
            continue
        if name in pruned:
            # Zero where the parameter is, also where it is infinite. Bits are cleared by whole numbers, all ones where
            # kept: torch fills by a bool mask eight times as slowly.
            bits = torch.ne(
                parameter, 0, out=torch.empty_like(parameter, dtype=torch.int32)
            ).neg_()
            parameter.grad.view(torch.int32).bitwise_and_(bits)
        if sizes:
            size = sizes[name]
        else:
            size = float(parameter.norm()) / parameter.numel() ** 0.5
        step = rate
        if name in factors:
            step = min(FACTOR_RATE * rate, FACTOR_LIMIT)
        groups.append({"params": [parameter], "lr": step * max(size, EPSILON)})
        before = torch.tensor(number - 1.0, device=parameter.device)
        first, second = moments[name]
        states[parameter] = {"step": before, "exp_avg": first, "exp_avg_sq": second}
    if not groups:
        return
    # Made anew for each step: the moments are stored elsewhere in between, and the fused step has no other state.
    optimiser = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)
    optimiser.state.update(states)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def schedule(step: float, steps: int, number: int) -> float:
    """The factor of the learning rate at ``step``, from 0: a linear rise over a tenth of all or ``RISING`` steps
    (the larger, at most half), then a cosine to zero. It rises again after a reset of Adam, ``number`` steps ago."""
    rising = max(1, min(max(RISING, round(0.1 * steps)), steps // 2))
    falling = max(0, step - rising) / max(1, steps - rising)
    return min(1.0, number / rising) * 0.5 * (1 + math.cos(math.pi * falling))


def held_out_of(
    steps: Sequence[T], kinds: Sequence[str] = ()
) -> tuple[list[T], list[T]]:
    """The steps to train on, and those held out to judge by: an eighth, spread evenly, at most ``MOST_HELD_OUT``,
    plus one of any kind that has none. Fewer than ``LEAST_STEPS`` steps are all trained on and all judged by. If
    every step is held out, every step is trained on as well."""
    if len(steps) < LEAST_STEPS:
        return list(steps), list(steps)
    count = min(MOST_HELD_OUT, max(1, round(len(steps) / 8)))
    kinds = kinds or [""] * len(steps)
    order = sorted(range(len(steps)), key=lambda i: kinds[i])
    held = {order[at] for at in spread_evenly(count, len(steps))}
    for kind in set(kinds) - {kinds[i] for i in held}:
        held.add(next(i for i in order if kinds[i] == kind))
    train = [step for i, step in enumerate(steps) if i not in held]
    judges = [step for i, step in enumerate(steps) if i in held]
    return train or list(steps), judges


def send_gradients(parameters: Iterable[nn.Parameter], source: int) -> None:
    """Copies the gradients of process ``source``, which has the windows, to every process."""
    if parallel.size() == 1:
        return
    trained = list(parameters)
    reached = parallel.broadcast(
        [parameter.grad is not None for parameter in trained], source
    )
    for parameter, has_gradient in zip(trained, reached, strict=True):
        if has_gradient:
            gradient = parameter.grad
            if gradient is None:
                gradient = torch.empty_like(parameter)
            parameter.grad = parallel.broadcast_(gradient.detach().contiguous(), source)
