"""Some tokens of a mixture, on which sets of experts are compared and the router is fitted.

The error of a twin's mixture is ``‖Y − Σ_e r'_e E_e(x)‖²`` over ``‖Y‖²``, for the output ``Y`` of the model's. Output i
counts with the square root of ``E[g_i²]``, as in the solver. Outputs are projected at random to ``PROJECTED``
numbers, which changes norms by about a tenth, so that a set of experts costs one run of the router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.method.experts.fewer import FewerExperts
from sparsellm.model import Chain, Stream
from sparsellm.model.capture import hooked
from sparsellm.model.experts import DOWN, Mixture, Routed

SAMPLE = 8192  # tokens of all windows, on which the router is fitted
COMPARED = 4  # one of them in four is enough to compare sets of experts
PROJECTED = 128  # outputs of an expert after the projection
STEPS = 100  # Adam's, for a router
RATE = 0.01  # Adam's at first, relative to the root mean square of a parameter; it falls to 0
HELD = 4  # one token in four is held out of the fit of a router


@dataclass(frozen=True, eq=False)
class Sample:
    """Some tokens of this process, evenly spaced over all windows."""

    fewer: FewerExperts
    index: int
    inputs: Tensor  # what the module around the mixture gets, (1, tokens, width)
    projection: Tensor  # (width, projected), its rows scaled by the costs of outputs
    goal: Tensor  # projected outputs of the mixture (tokens, projected)

    @classmethod
    def of(
        cls,
        fewer: FewerExperts,
        index: int,
        inputs: Tensor,
        costs: Mapping[str, Tensor],
        seed: int,
    ) -> Self:
        """The sample ``inputs`` of the mixture in the model's block; ``costs`` as in a removal."""
        chain = fewer.dense
        (mixture,) = chain.mixtures(index)
        known = [costs[name] for name in last_linears(chain, index) if name in costs]
        # may be narrower than the inputs
        made = output_of(mixture, _route(chain, index, inputs), inputs.shape[1])
        projection = _projection(made.shape[-1], known, seed).to(chain.device)
        return cls(fewer, index, inputs, projection, made @ projection)

    @cached_property
    def experts(self) -> Tensor | None:
        """The outputs of the experts of the model's block, see ``_projected``."""
        return self._projected(self.fewer.dense)

    @cached_property
    def first(self) -> int:
        """The number of the first token among those of all processes."""
        return sum(parallel.gather(len(self.goal))[: parallel.rank()])

    def error_of(self, kept: Sequence[int]) -> float:
        """The relative error of the mixture's output with these experts alone, before a refit."""
        self.fewer.fill(self.index, kept)
        lost, energy = (
            float(terms.sum())
            for terms in (self._errors(self.experts, kept), self.goal.double().square())
        )
        lost = parallel.total(lost)
        energy = parallel.total(energy)
        if not energy:
            return 0.0
        return lost / energy

    def fit_router(self) -> None:
        """Fits the router of the twin's block to the error on some of the tokens by Adam, and keeps the values with the
        least one on the others. What only chooses experts, as a correction bias, has no gradient and stays."""
        chain = self.fewer.chain
        index = self.index
        (small,) = chain.mixtures(index)
        experts = self._projected(chain)
        numbers = range(len(small))
        held = (
            self.first + torch.arange(len(self.goal), device=self.goal.device)
        ) % HELD == HELD // 2
        # With the others, such as shared experts, every step would copy and differentiate what it does not change.
        values = [
            p.requires_grad_()
            for p in _around(chain, index).parameters()
            if p.shape[:1] == (len(small),)
        ]
        exact = [value.detach().float().clone() for value in values]
        adam = torch.optim.Adam(
            [
                {"params": [p], "lr": RATE * (float(p.square().mean().sqrt()) or 1.0)}
                for p in exact
            ]
        )
        falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, STEPS)
        least = float("inf")
        best = [value.detach().clone() for value in values]
        for _ in range(STEPS):
            with torch.enable_grad():
                errors = self._errors(experts, numbers)
                gradients = torch.autograd.grad(
                    errors[~held].sum(), values, allow_unused=True
                )
            error = parallel.total(float(errors.detach()[held].sum()))
            if error < least:
                least = error
                best = [value.detach().clone() for value in values]
            for parameter, gradient in zip(exact, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = parallel.all_sum_(gradient.float())
            adam.step()
            falling.step()
            for value, parameter in zip(values, exact, strict=True):
                value.copy_(parameter)
        for value, saved in zip(values, best, strict=True):
            value.requires_grad_(False).copy_(saved)

    def _projected(self, chain: Chain) -> Tensor | None:
        """The projected outputs ``(experts, tokens, projected)`` of all experts; None if the router weights inputs."""
        (mixture,) = chain.mixtures(self.index)
        if not mixture.weighs_outputs:
            return None
        inputs = _route(chain, self.index, self.inputs).inputs
        return torch.stack(
            [
                mixture.expert(number)(inputs).float() @ self.projection
                for number in range(len(mixture))
            ]
        )

    def _errors(self, experts: Tensor | None, kept: Sequence[int]) -> Tensor:
        """The squared error of each token with the twin's mixture, whose experts have the outputs ``experts[kept]``."""
        chain = self.fewer.chain
        index = self.index
        route = _route(chain, index, self.inputs)
        if experts is None:
            (small,) = chain.mixtures(index)
            made = output_of(small, route, len(self.goal)) @ self.projection
        else:
            numbers = route.experts
            beyond = route.experts >= len(kept)
            rows = torch.tensor(kept, device=numbers.device)[
                numbers.clamp(max=len(kept) - 1)
            ]
            every = torch.arange(len(numbers), device=numbers.device)[:, None]
            made = (
                experts[rows, every]
                * route.weights.float().masked_fill(beyond, 0.0)[..., None]
            ).sum(1)
        return (self.goal - made).double().square().sum(1)


@contextmanager
def sampled(stream: Stream, index: int) -> Iterator[list[Tensor]]:
    """Until the context ends, takes what the module around the mixture of a block gets for about ``SAMPLE`` tokens
    of all windows: for each batch that runs ``(1, tokens, width)``."""
    places = parallel.spread(
        [hidden.shape[:2].numel() for hidden in stream.hidden], SAMPLE
    )
    seen: list[Tensor] = []

    def see(
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        hidden = next(iter((*args, *kwargs.values())))
        assert isinstance(hidden, Tensor)
        seen.append(
            hidden.reshape(1, -1, hidden.shape[-1])[:, places[len(seen)]].clone()
        )

    with hooked({_around(stream.chain, index): see}):
        yield seen


def output_of(
    mixture: Mixture,
    routed: Routed,
    tokens: int,
    see: Callable[[int, Tensor], None] = lambda number, part: None,
) -> Tensor:
    """The outputs ``(tokens, width)`` of a mixture in fp32; ``see`` gets each expert's number and weighted outputs."""
    total = torch.zeros(tokens, routed.inputs.shape[1], device=routed.inputs.device)
    for number in routed.experts.unique().tolist():
        if number < len(mixture):
            rows, slots = torch.where(routed.experts == number)
            part = (
                mixture.expert(number)(routed.inputs[rows]).float()
                * routed.weights[rows, slots, None].float()
            )
            see(number, part)
            total.index_add_(0, routed.places[rows], part)
    return total


def last_linears(chain: Chain, index: int) -> list[str]:
    """The names of the last linears of all experts in a block."""
    return [
        f"{chain.block_names[index]}.{mixture.name}.{number}.{DOWN}"
        for mixture in chain.mixtures(index)
        for number in range(len(mixture))
    ]


def _around(chain: Chain, index: int) -> nn.Module:
    """The module of a block that has its mixture and the router, and computes each token by itself."""
    (mixture,) = chain.mixtures(index)
    return chain.blocks[index].get_submodule(mixture.name.rpartition(".")[0])


def _route(chain: Chain, index: int, inputs: Tensor) -> Routed:
    """The tokens that reach the mixture of a block in a call of the module around it."""
    (mixture,) = chain.mixtures(index)
    seen: list[Routed] = []
    with mixture.observed(seen.append):
        _around(chain, index)(inputs)
    return seen[0]


def _projection(width: int, costs: Sequence[Tensor], seed: int) -> Tensor:
    """A matrix ``(width, projected)`` after which norms are about those in the metric of the costs ``E[g_i²]``, which
    every expert has of its own: output i counts with the square root of their sum, as in the solver."""
    size = min(width, PROJECTED)
    projection = torch.eye(width)
    if size < width:
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(width, size, generator=generator) / size**0.5
    if not costs:
        return projection
    metric = torch.stack(list(costs)).double().sum(0).sqrt()
    return projection * (metric / metric.mean()).sqrt().float()[:, None]
