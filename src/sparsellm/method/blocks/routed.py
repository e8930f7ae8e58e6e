"""The experts of a mixture, pruned one by one, each from the tokens routed to it and, if these are few, from all.

The output of a mixture is the sum of the outputs of its experts times the router's weights. So an error of an expert on
a token counts with the square of that weight: ``G = Σ r² x xᵀ / Σ r²`` over the n tokens that are routed to it. With
few tokens this is a poor estimate. It is shrunk towards the matrix of all tokens that reach the mixture,
``(1 − α) G + α G_all`` with ``α = n₀ / (n₀ + n)`` and ``n₀`` a fraction of the inputs. An expert that no token reaches
has ``α = 1``. The last linear of an expert has inputs for routed tokens only; for ``G_all``, tokens taken evenly from
all are run through the expert.

The inputs of the mixture are stored once. Then each process prunes one expert at a time, with its statistics in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.files.scratch import TensorStore
from sparsellm.method.blocks.statistics import naming
from sparsellm.method.blocks.task import BlockTask
from sparsellm.method.gram import (
    CrossAccumulator,
    Fit,
    Gram,
    GramAccumulator,
    least_squares,
)
from sparsellm.model import LinearView, Stream
from sparsellm.model.experts import DOWN, Expert, ExpertLinear, Mixture, Routed

PRIOR = 0.5  # n₀ as a fraction of the inputs: 27 % less divergence than without shrinkage, from two windows
SAMPLE = 4  # tokens run through an expert for the statistics of all, per input of its last linear
NOT_ROUTED = "no calibration token was routed to it: pruned by the statistics of all tokens"  # note of such a linear

Solve = Callable[[LinearView, Gram, Fit | None], None]
"""Prunes a linear, or its refitted weight if there is one, and assigns the result."""

Rows = Iterator[tuple[Tensor, Tensor]]
"""Inputs ``(tokens, width)`` and their weights ``(tokens,)``."""


def prune_experts(
    task: BlockTask,
    solve: Solve,
    token_weights: list[Tensor] | None = None,
    refit: float | None = None,
) -> None:
    """Prunes the experts of the block's mixtures, with ``token_weights`` ``(batch, seq)`` for each batch, or None.

    Without ``refit`` all statistics of an expert are taken before any of its linears is pruned. Otherwise the last one
    is pruned after the others, on their outputs, first refitted with this damping to the output the expert had."""
    views = {
        id(linear.module): linear
        for linear in task.linears
        if isinstance(linear.module, ExpertLinear)
    }
    for mixture in task.stream.chain.mixtures(task.index) if views else []:
        with task.stream.store() as store:
            with task.clock.phase("prune/statistics"):
                tokens = _record(task.stream, task.index, mixture, store, token_weights)
                rows = zip(store, tokens.weights, strict=True)
                every = _moments(rows, store[0].shape[-1], task.stream.chain.device)
            experts = []
            for number in range(len(mixture)):
                expert = mixture.expert(number)
                linears = {
                    role: views[id(child)]
                    for role, child in expert.named_children()
                    if id(child) in views
                }
                if not linears:
                    continue
                count = tokens.count(number)
                for linear in linears.values():
                    task.routed[linear.name] = count
                    if not count:
                        task.note(linear, NOT_ROUTED)
                down = []
                if DOWN in linears:
                    down.append(linears.pop(DOWN))
                experts.append(
                    ExpertTokens(tokens, expert, number, [*linears.values()], down)
                )
            order = [
                linear.name for entry in experts for linear in entry.first + entry.down
            ]
            begin = len(task.results)
            for place in range(0, len(experts), parallel.size()):
                task.report(f"expert {place + 1}/{len(experts)}")
                _prune(
                    task, experts[place : place + parallel.size()], every, solve, refit
                )
            task.results[begin:] = sorted(
                task.results[begin:], key=lambda result: order.index(result.name)
            )


def _prune(
    task: BlockTask,
    experts: list[ExpertTokens],
    every: _Moments,
    solve: Solve,
    refit: float | None,
) -> None:
    """Prunes the linears of the experts, one expert in each process, on the tokens of all processes. Only the process
    that prunes an expert keeps its moments. ``every`` has the moments of the inputs of all tokens of the mixture."""
    dense = [entry.unpruned() if refit is not None else None for entry in experts]
    device = every.matrix.device
    shared = dict[int, _Moments]()
    last = dict[int, _Moments]()

    def prune_first(place: int) -> None:
        moments = shared.pop(place)
        gram = Gram(moments.matrix, moments.tokens)
        for linear in experts[place].first:
            solve(linear, gram, None)

    def prune_down(place: int) -> None:
        (down,) = experts[place].down
        moments = last.pop(place)
        fit = None
        gram = Gram(moments.matrix, moments.tokens)
        if moments.cross is not None and refit is not None:
            with task.clock.phase("prune/solve"), naming(down.name):
                fit = least_squares(gram, moments.cross, refit, prior=down.weight())
        del moments
        solve(down, gram, fit)

    def take(pruned: bool) -> None:
        """Takes the moments before, or after, the other linears of an expert are pruned."""
        for place, entry in enumerate(experts):
            if entry.first and not pruned:
                with naming(entry.first[0].name):
                    moments = _moments(entry.routed(), len(every.matrix), device)
                    moments = moments.shrunk_to(every)
                if place == parallel.rank():
                    shared[place] = moments
            if entry.down and (dense[place] is not None) == pruned:
                with naming(entry.down[0].name):
                    width = entry.down[0].in_features
                    of_down = partial(
                        _moments,
                        features=width,
                        device=device,
                        expert=entry.expert,
                        dense=dense[place],
                    )
                    moments = of_down(entry.routed())
                    sample = entry.tokens.sample(SAMPLE * width)
                    moments = moments.shrunk_to(of_down(sample))
                if place == parallel.rank():
                    last[place] = moments

    with task.clock.phase("prune/statistics"):
        take(pruned=False)
    task.share_out([entry.first for entry in experts], range(len(experts)), prune_first)
    with task.clock.phase("prune/statistics"):
        take(pruned=True)
    task.share_out([entry.down for entry in experts], range(len(experts)), prune_down)


@dataclass(frozen=True, eq=False)
class _Moments:
    """Weighted means over ``tokens`` tokens of all processes."""

    matrix: Tensor  # Σ w x xᵀ / Σ w
    tokens: int
    # Σ w t xᵀ / Σ w, (out, features), for targets t; None without targets
    cross: Tensor | None = None

    def shrunk_to(self, prior: _Moments) -> _Moments:
        """``(1 − α)`` of these and ``α`` of the prior, with ``α = n₀ / (n₀ + n)``."""
        weight = PRIOR * len(self.matrix)  # n₀
        alpha = weight / (weight + self.tokens)
        cross = None
        if self.cross is not None and prior.cross is not None:
            cross = torch.lerp(self.cross, prior.cross, alpha)
        return _Moments(
            torch.lerp(self.matrix, prior.matrix, alpha), self.tokens, cross
        )


@torch.no_grad()
def _moments(
    rows: Rows,
    features: int,
    device: torch.device,
    expert: Expert | None = None,
    dense: Expert | None = None,
) -> _Moments:
    """The moments of the rows of all processes, or of the inputs of the last linear of ``expert`` for these rows.

    ``dense`` is the expert before it was pruned, whose outputs, without bias, are targets; None for no targets."""
    grams = GramAccumulator(features, device)
    crosses = None
    if dense is not None:
        down = dense.get_parameter(f"{DOWN}.weight")
        crosses = CrossAccumulator(len(down), features, device)
    total = 0.0
    for x, weights in rows:
        inputs = x
        if expert is not None:
            inputs = expert.inner(x)
        grams.update(inputs, weights)
        if crosses is not None and dense is not None:
            targets = torch.nn.functional.linear(dense.inner(x), down)
            crosses.update(targets, inputs, weights)
        total += float(weights.double().sum())
    grams.reduce()
    if crosses is not None:
        crosses.reduce()
    total = parallel.total(total)
    cross = None
    if total <= 0:
        if crosses is not None:
            cross = crosses.total.float()
        return _Moments(torch.zeros(features, features, device=device), 0, cross)
    scale = grams.tokens / total
    if crosses is not None:
        cross = crosses.finish() * scale
    return _Moments(grams.finish().matrix * scale, grams.tokens, cross)


@dataclass(frozen=True)
class MixtureTokens:
    """The tokens of this process that reached a mixture, batch by batch."""

    store: TensorStore  # their inputs (tokens, width)
    experts: list[Tensor]  # the experts of each token, (tokens, k)
    # the squares of the router's weights, times the weight of the token, (tokens, k)
    factors: list[Tensor]
    weights: list[Tensor]  # weights of the tokens, (tokens,)

    def count(self, number: int) -> int:
        """The number of tokens that are routed to an expert, in all processes."""
        return int(
            parallel.total(
                sum(int((experts == number).sum()) for experts in self.experts)
            )
        )

    def sample(self, about: int) -> Rows:
        """About that many tokens of all processes, taken evenly."""
        places = parallel.spread([len(weights) for weights in self.weights], about)
        for batch, (weights, chosen) in enumerate(
            zip(self.weights, places, strict=True)
        ):
            if len(weights[chosen]):
                yield self.store[batch][chosen], weights[chosen]


@dataclass(frozen=True)
class ExpertTokens:
    """The tokens that were routed to one expert, and its linears that are pruned."""

    tokens: MixtureTokens
    expert: Expert
    number: int
    first: list[LinearView]  # those whose inputs are the expert's
    # the last linear, if it is pruned
    down: list[LinearView] = field(default_factory=list)

    def unpruned(self) -> Expert | None:
        """A copy of the expert, whose outputs are the target of its last linear; None if only one half is pruned."""
        if self.first and self.down:
            return self.expert.frozen()
        return None

    def routed(self) -> Rows:
        """The inputs of the expert, with the weights of its outputs."""
        for batch, experts in enumerate(self.tokens.experts):
            rows, places = torch.where(experts == self.number)
            if len(rows):
                yield (
                    self.tokens.store[batch][rows],
                    self.tokens.factors[batch][rows, places],
                )


def _record(
    stream: Stream,
    index: int,
    mixture: Mixture,
    store: TensorStore,
    token_weights: list[Tensor] | None,
) -> MixtureTokens:
    """Runs the block on every batch, with zeros as the outputs of a mixture, and stores the tokens that reach it."""
    tokens = MixtureTokens(store, [], [], [])

    def see(routed: Routed) -> None:
        device = routed.inputs.device
        weights = torch.ones(len(routed.inputs), device=device)
        if token_weights is not None:
            of_batch = token_weights[position].flatten().to(device)
            if int(routed.places.max()) < len(of_batch):
                weights = of_batch[routed.places]
        store.append(routed.inputs.detach())
        tokens.experts.append(routed.experts)
        tokens.factors.append(
            routed.weights.detach().float().square() * weights[:, None]
        )
        tokens.weights.append(weights)

    with mixture.observed(see):
        for position in range(len(stream)):
            stream.run_batch(index, position)
    return tokens
