"""Removes experts from the mixture of one block, and refits those that stay to the output that it had.

The output of a mixture is ``Y = Σ_e r_e E_e(x)`` over the experts that its router chose for a token. Without some of
them the router chooses others, with other weights ``r'``. The error is ``‖Y − Σ_e r'_e E_e(x)‖²`` over ``‖Y‖²``, where
output i counts with the square root of ``E[g_i²]``, as in the solver. It is measured on a sample of tokens, in a random
projection of the outputs, so that any set of experts costs one pass of the router.

Then the last linear of each expert that stays is fitted, one after the other, to what the others leave of ``Y``: least
squares over the tokens that are now routed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.chain import Chain, Stream
from sparsellm.chain.capture import hooked
from sparsellm.chain.experts import DOWN, Mixture, Routed
from sparsellm.mixtures.fewer import FewerExperts
from sparsellm.mixtures.scores import MixtureView
from sparsellm.records import ExpertsOfBlock
from sparsellm.statistics import CrossAccumulator, GramAccumulator, least_squares
from sparsellm.storage.scratch import TensorStore

SAMPLE = 2048  # tokens on which sets of experts are compared
PROJECTED = 128  # outputs of an expert after a random projection, which keeps norms to about a tenth
DAMPING = 0.1  # ridge of the refit towards the expert's weight, as in the refit of sublayers
ROUNDS = 2  # refits of every expert, since each changes what is left for the others


@dataclass(frozen=True)
class Removal:
    """What is decided once for a model."""

    fewer: FewerExperts
    groups: int
    score: Callable[..., Tensor]
    costs: Mapping[str, Tensor]  # E[g_i²] of the outputs of the experts' last linears, by name; empty for equal ones
    refit: bool
    seed: int


@torch.no_grad()
def remove_experts(removal: Removal, stream: Stream, index: int) -> ExpertsOfBlock | None:
    """Gives block ``index`` of the twin the weights of the model's loaded block without some experts, refitted, in the
    dtypes in which they are written; ``stream`` has the inputs of the block. None for a block without a mixture."""
    fewer, mixtures = removal.fewer, stream.chain.mixtures(index)
    if not mixtures:
        fewer.fill(index, [])
        return None
    (mixture,), (small,) = mixtures, fewer.chain.mixtures(index)
    with stream.store() as outputs:
        with _sampled(stream, index, mixture) as inputs:
            tokens, strength = _measure(stream, index, mixture, outputs)
        sample = _Sample.of(stream.chain, index, torch.cat(inputs, dim=1), removal)
        view = MixtureView(index, fewer.keep, removal.groups, tokens, strength, removal.seed, sample.error_of)
        scores = removal.score(view)
        kept = view.best(scores)
        error = sample.error_of(kept)
        fewer.fill(index, kept)
        refitted = _refit(removal, stream, index, small, outputs) if removal.refit else error
    fewer.settle(index)
    counts, said = tokens.tolist(), [float(score) for score in scores]
    return ExpertsOfBlock(block=index, kept=kept, tokens=counts, scores=said, error=error, refitted=refitted)


@contextmanager
def running(stream: Stream, index: int, fewer: FewerExperts) -> Iterator[None]:
    """Until the context ends, block ``index`` of the stream's chain is that of the twin."""
    blocks, dense = stream.chain.blocks, stream.chain.blocks[index]
    blocks[index] = fewer.chain.blocks[index]
    try:
        yield
    finally:
        blocks[index] = dense


def _routed(stream: Stream, index: int, mixture: Mixture) -> Iterator[tuple[int, Routed]]:
    """The tokens that reach a mixture, batch by batch; its block runs up to there."""
    seen: list[Routed] = []
    with mixture.observed(seen.append):
        for position in range(len(stream)):
            stream.run_batch(index, position)
            yield position, seen.pop()


def _output(
    mixture: Mixture, routed: Routed, tokens: int, see: Callable[[int, Tensor], None] = lambda number, part: None
) -> Tensor:
    """The outputs ``(tokens, width)`` of a mixture in fp32; ``see`` gets the number and the weighted outputs of each
    expert that has tokens."""
    total = torch.zeros(tokens, routed.inputs.shape[1], device=routed.inputs.device)
    for number in routed.experts.unique().tolist():
        if number < len(mixture):
            rows, slots = torch.where(routed.experts == number)
            part = mixture.expert(number)(routed.inputs[rows]).float() * routed.weights[rows, slots, None].float()
            see(number, part)
            total.index_add_(0, routed.places[rows], part)
    return total


def _measure(stream: Stream, index: int, mixture: Mixture, outputs: TensorStore) -> tuple[Tensor, Tensor]:
    """Tokens and strength of every expert, see :class:`MixtureView`; appends the outputs of the mixture."""
    counts = torch.zeros(len(mixture), dtype=torch.int64)
    strength = torch.zeros(len(mixture), dtype=torch.float64)

    def tally(number: int, part: Tensor) -> None:
        counts[number] += len(part)
        strength[number] += part.double().norm(dim=1).sum().cpu()

    for position, routed in _routed(stream, index, mixture):
        outputs.append(_output(mixture, routed, stream.hidden[position].shape[:2].numel(), tally))
    return parallel.all_sum_(counts), parallel.all_sum_(strength)


@dataclass(frozen=True, eq=False)
class _Sample:
    """Some tokens of this process, evenly spaced over all windows, on which sets of experts are compared."""

    fewer: FewerExperts
    index: int
    inputs: Tensor  # what the module around the mixture gets, (1, tokens, width)
    projection: Tensor  # (width, projected), its rows scaled by the costs of outputs
    experts: Tensor | None  # projected outputs (experts, tokens, projected); None where inputs are weighted instead
    goal: Tensor  # projected outputs of the mixture (tokens, projected)

    @classmethod
    def of(cls, chain: Chain, index: int, inputs: Tensor, removal: Removal) -> _Sample:
        (mixture,) = chain.mixtures(index)
        route = _route(_around(chain.blocks[index], mixture), mixture, inputs)
        known = [removal.costs[name] for name in last_linears(chain, index) if name in removal.costs]
        projection = _projection(inputs.shape[-1], known, removal.seed).to(chain.device)
        experts = None
        if mixture.weighs_outputs:
            outputs = (mixture.expert(number)(route.inputs).float() for number in range(len(mixture)))
            experts = torch.stack([output @ projection for output in outputs])
        goal = _output(mixture, route, inputs.shape[1]) @ projection
        return cls(removal.fewer, index, inputs, projection, experts, goal)

    def error_of(self, kept: Sequence[int]) -> float:
        """The relative error of the mixture's output with these experts alone, before a refit."""
        self.fewer.fill(self.index, kept)
        (small,) = self.fewer.chain.mixtures(self.index)
        route = _route(_around(self.fewer.chain.blocks[self.index], small), small, self.inputs)
        if self.experts is None:
            made = _output(small, route, self.inputs.shape[1]) @ self.projection
        else:
            numbers, beyond = route.experts, route.experts >= len(kept)
            originals = torch.tensor(kept, device=numbers.device)[numbers.clamp(max=len(kept) - 1)]
            every = torch.arange(len(numbers), device=numbers.device)[:, None]
            weights = route.weights.float().masked_fill(beyond, 0.0)
            made = (self.experts[originals, every] * weights[..., None]).sum(1)
        lost, whole = (parallel.total(float(each.double().square().sum())) for each in (self.goal - made, self.goal))
        return lost / whole if whole else 0.0


def _around(block: nn.Module, mixture: Mixture) -> nn.Module:
    """The module that has the mixture and its router, and computes each token by itself."""
    return block.get_submodule(mixture.name.rpartition(".")[0])


@contextmanager
def _sampled(stream: Stream, index: int, mixture: Mixture) -> Iterator[list[Tensor]]:
    """Until the context ends, takes what the module around a mixture gets for about :data:`SAMPLE` tokens of all
    windows: for each batch that runs ``(1, tokens, width)``."""
    around = _around(stream.chain.blocks[index], mixture)
    step = max(1, sum(stream.hidden[position].shape[:2].numel() for position in range(len(stream))) // SAMPLE)
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        hidden = next(iter((*args, *kwargs.values())))
        assert isinstance(hidden, Tensor)
        seen.append(hidden.reshape(1, -1, hidden.shape[-1])[:, ::step].clone())

    with hooked({around: see}):
        yield seen


def last_linears(chain: Chain, index: int) -> list[str]:
    """The names of the last linears of all experts in a block."""
    return [
        f"{chain.block_names[index]}.{mixture.name}.{number}.{DOWN}"
        for mixture in chain.mixtures(index)
        for number in range(len(mixture))
    ]


def _route(around: nn.Module, mixture: Mixture, inputs: Tensor) -> Routed:
    """The tokens that reach a mixture in a call of the module around it."""
    seen: list[Routed] = []
    with mixture.observed(seen.append):
        around(inputs)
    return seen[0]


def _projection(width: int, costs: Sequence[Tensor], seed: int) -> Tensor:
    """A matrix ``(width, projected)`` after which norms are about those in the metric of the costs ``E[g_i²]``, which
    every expert has of its own: output i counts with the square root of their sum, as in the solver."""
    size = min(width, PROJECTED)
    generator = torch.Generator().manual_seed(seed)
    projection = torch.eye(width) if size == width else torch.randn(width, size, generator=generator) / size**0.5
    if not costs:
        return projection
    metric = torch.stack(list(costs)).double().sum(0).sqrt()
    return projection * (metric / metric.mean()).sqrt().float()[:, None]


@dataclass(frozen=True, eq=False)
class _Rest:
    """What the experts that stay leave of the outputs that a mixture had, batch by batch."""

    mixture: Mixture
    routes: list[Routed]  # without inputs
    inputs: TensorStore
    rest: TensorStore  # (tokens, width)

    def energy(self) -> float:
        return parallel.total(sum(float(each.double().square().sum()) for each in self.rest))

    def rows(self, number: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each batch its number, the places of the tokens that are routed to an expert, and the inputs of its last
        linear times the router's weights, ``(tokens, inner)``."""
        expert = self.mixture.expert(number)
        for position, routed in enumerate(self.routes):
            rows, slots = torch.where(routed.experts == number)
            if len(rows):
                inner = expert.inner(self.inputs[position][rows]).float() * routed.weights[rows, slots, None].float()
                yield position, routed.places[rows], inner

    def refit(self, number: int, down: nn.Linear) -> None:
        """Fits the last linear of an expert to what is left plus its own outputs."""
        dense, device = down.weight.detach().float(), down.weight.device
        gram = GramAccumulator(down.in_features, device)
        cross = CrossAccumulator(down.out_features, down.in_features, device)
        for position, places, inner in self.rows(number):
            gram.update(inner)
            cross.update(self.rest[position][places] + inner @ dense.T, inner)
        gram.reduce()
        cross.reduce()
        if gram.silent:
            return
        # With few tokens the fit would follow their noise.
        damping = DAMPING * (1 + down.in_features / gram.tokens)
        fitted = least_squares(gram.finish(), cross.finish(), damping, prior=dense).weight
        for position, places, inner in self.rows(number):
            self.rest[position] = self.rest[position].index_add_(0, places, inner @ (dense - fitted).T)
        down.weight = nn.Parameter(fitted.to(down.weight.dtype), requires_grad=False)


def _refit(removal: Removal, stream: Stream, index: int, small: Mixture, outputs: TensorStore) -> float:
    """Refits each expert of the twin's block in turn to the ``outputs`` that the mixture had, which then hold what is
    left. Returns the error relative to their energy."""
    with running(stream, index, removal.fewer), stream.store() as inputs:
        rest = _Rest(small, [], inputs, outputs)
        energy = rest.energy()
        for position, routed in _routed(stream, index, small):
            inputs.append(routed.inputs)
            rest.routes.append(replace(routed, inputs=routed.inputs[:0]))
            outputs[position] = outputs[position] - _output(small, routed, len(outputs[position]))
        for number in [*range(len(small))] * ROUNDS:
            expert = small.expert(number)
            down = expert.get_submodule(DOWN)
            if not expert.normed and isinstance(down, nn.Linear):  # else its outputs are not linear in the weight
                rest.refit(number, down)
        return rest.energy() / energy if energy else 0.0
