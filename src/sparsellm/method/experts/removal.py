"""Removes experts from the mixture of one block, and fits what stays to the output that it had.

The output of a mixture is ``Y = Σ_e r_e E_e(x)`` over the experts that its router chose for a token. Without some of
them the router chooses others, with other weights. The last linear of each expert that stays is fitted, one after the
other, to what the others leave of ``Y``: least squares over the tokens that are now routed to it. Then the router is
fitted on a sample of the tokens, and the experts once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.files.scratch import TensorStore
from sparsellm.method.experts.fewer import FewerExperts
from sparsellm.method.experts.sample import COMPARED, Sample, output_of, sampled
from sparsellm.method.experts.scores import MixtureView
from sparsellm.method.gram import CrossAccumulator, GramAccumulator, least_squares
from sparsellm.model import Stream
from sparsellm.model.capture import replacing
from sparsellm.model.experts import DOWN, Mixture, Routed
from sparsellm.records import ExpertsOfBlock

# ridge of the refit towards the expert's weight, as in the refit of sublayers
DAMPING = 0.1


@dataclass(frozen=True)
class Removal:
    """What is decided once for a model."""

    fewer: FewerExperts
    score: Callable[..., Tensor]
    # E[g_i²] of the outputs of the experts' last linears, by name; empty for equal ones
    costs: Mapping[str, Tensor]
    refit: bool
    seed: int


@torch.no_grad()
def remove_experts(
    removal: Removal, stream: Stream, index: int
) -> ExpertsOfBlock | None:
    """Gives block ``index`` of the twin the weights of the model's loaded block without some experts, refitted, in the
    dtypes in which they are written; ``stream`` has the inputs of the block. None for a block without a mixture."""
    fewer = removal.fewer
    mixtures = stream.chain.mixtures(index)
    if not mixtures:
        fewer.fill(index, [])
        return None
    (mixture,) = mixtures
    with stream.store() as outputs:
        with sampled(stream, index) as inputs:
            tokens, strength = _measure(stream, index, mixture, outputs)
        sample = Sample.of(
            fewer, index, torch.cat(inputs, dim=1), removal.costs, removal.seed
        )
        some = slice((COMPARED // 2 - sample.first) % COMPARED, None, COMPARED)
        compared = replace(
            sample, inputs=sample.inputs[:, some], goal=sample.goal[some]
        )
        view = MixtureView(
            index,
            fewer.keep,
            fewer.routing.groups,
            tokens,
            strength,
            removal.seed,
            compared.error_of,
        )
        scores = removal.score(view)
        kept = view.best(scores)
        fewer.fill(index, kept)
        error, refitted = _repair(sample, stream, outputs, refit=removal.refit)
    fewer.chain.settle_block(index)
    counts = tokens.tolist()
    said = [float(score) for score in scores]
    return ExpertsOfBlock(
        block=index,
        kept=kept,
        tokens=counts,
        scores=said,
        error=error,
        refitted=refitted,
    )


def running(
    stream: Stream, index: int, fewer: FewerExperts
) -> AbstractContextManager[None]:
    """Until the context ends, block ``index`` of the stream's chain runs as that of the twin."""
    return replacing({stream.chain.blocks[index]: fewer.chain.blocks[index].forward})


def _routed(
    stream: Stream, index: int, mixture: Mixture
) -> Iterator[tuple[int, Routed]]:
    """The tokens that reach a mixture, batch by batch; its block runs, with zeros as the outputs of the mixture."""
    seen: list[Routed] = []
    with mixture.observed(seen.append):
        for position in range(len(stream)):
            stream.run_batch(index, position)
            yield position, seen.pop()


def _measure(
    stream: Stream, index: int, mixture: Mixture, outputs: TensorStore
) -> tuple[Tensor, Tensor]:
    """Tokens and strength of every expert, see ``MixtureView``; appends the outputs of the mixture."""
    counts = torch.zeros(len(mixture), dtype=torch.int64)
    strength = torch.zeros(len(mixture), dtype=torch.float64)

    def tally(number: int, part: Tensor) -> None:
        counts[number] += len(part)
        strength[number] += part.double().norm(dim=1).sum().cpu()

    for position, routed in _routed(stream, index, mixture):
        outputs.append(
            output_of(mixture, routed, stream.hidden[position].shape[:2].numel(), tally)
        )
    return parallel.all_sum_(counts), parallel.all_sum_(strength)


@dataclass(frozen=True, eq=False)
class _Rest:
    """What the experts that stay leave of the outputs that a mixture had, batch by batch."""

    mixture: Mixture
    routes: list[Routed]  # without inputs
    inputs: TensorStore
    rest: TensorStore  # (tokens, width)

    @classmethod
    @contextmanager
    def of(
        cls, stream: Stream, index: int, mixture: Mixture, outputs: TensorStore
    ) -> Iterator[_Rest]:
        """Subtracts from ``outputs`` those of the mixture of the twin's block, which runs in place of the model's."""
        with stream.store() as inputs:
            rest = cls(mixture, [], inputs, outputs)
            for _, routed in _routed(stream, index, mixture):
                inputs.append(routed.inputs)
                rest.routes.append(replace(routed, inputs=routed.inputs[:0]))
            rest.add(-1)
            yield rest

    def add(self, sign: int) -> None:
        """Adds the outputs of the experts that stay, times ``sign``."""
        for position, routed in enumerate(self.routes):
            values = self.rest[position]
            read = replace(routed, inputs=self.inputs[position])
            self.rest[position] = values + sign * output_of(
                self.mixture, read, len(values)
            )

    def refit_all(self) -> None:
        """Refits the experts in turn."""
        for number in range(len(self.mixture)):
            expert = self.mixture.expert(number)
            down = expert.get_submodule(DOWN)
            # else its outputs are not linear in the weight
            if not expert.normed and isinstance(down, nn.Linear):
                self.refit(number, down)

    def rows(self, number: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each batch its number, the places of the tokens that are routed to an expert, and the inputs of its last
        linear times the router's weights, ``(tokens, inner)``."""
        expert = self.mixture.expert(number)
        for position, routed in enumerate(self.routes):
            rows, slots = torch.where(routed.experts == number)
            if len(rows):
                inner = (
                    expert.inner(self.inputs[position][rows]).float()
                    * routed.weights[rows, slots, None].float()
                )
                yield position, routed.places[rows], inner

    def refit(self, number: int, down: nn.Linear) -> None:
        """Fits the last linear of an expert to what is left plus its own outputs."""
        dense = down.weight.detach().float()
        device = down.weight.device
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
        fit = partial(least_squares, gram.finish(), cross.finish(), damping, dense)
        # one process computes it, with all threads, and all have its bits
        fitted = parallel.from_main(lambda: fit().weight.cpu()).to(device)
        for position, places, inner in self.rows(number):
            self.rest[position] = self.rest[position].index_add_(
                0, places, inner @ (dense - fitted).T
            )
        down.weight = nn.Parameter(fitted.to(down.weight.dtype), requires_grad=False)


def _energy(outputs: TensorStore) -> float:
    return parallel.total(
        sum(float(output.double().square().sum()) for output in outputs)
    )


def _repair(
    sample: Sample, stream: Stream, outputs: TensorStore, *, refit: bool
) -> tuple[float, float]:
    """Refits the experts of the twin's block to the ``outputs`` that the mixture had, fits its router, and refits them
    again, since each changes what is left for the others. Returns the errors before and after, relative to the energy
    of the outputs; without a ``refit`` the first of them twice."""
    index = sample.index
    fewer = sample.fewer
    (mixture,) = fewer.chain.mixtures(index)
    energy = _energy(outputs) or 1.0  # if all are 0
    with running(stream, index, fewer):
        with _Rest.of(stream, index, mixture, outputs) as rest:
            before = _energy(outputs) / energy
            if not refit:
                return before, before
            rest.refit_all()
            rest.add(1)
        sample.fit_router()
        with _Rest.of(stream, index, mixture, outputs) as rest:
            rest.refit_all()
            return before, _energy(outputs) / energy
