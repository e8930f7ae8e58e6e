"""The survey of the dense model that an allocation gets: sizes at once, statistics on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from sparsellm import parallel
from sparsellm.chain import Chain, Feed, LinearView
from sparsellm.chain.capture import watch
from sparsellm.errors import RecipeError
from sparsellm.progress import Progress
from sparsellm.sweep.gradients import LossGradients


@dataclass(frozen=True)
class LinearSize:
    """A linear to prune."""

    name: str
    block: int  # its number
    shape: tuple[int, int]  # (out, in)
    fixed: int | None = None  # its zeros if sparsity_of sets them; an allocation does not get such a linear

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, eq=False)
class Survey:
    """Sizes and statistics of the dense model, which is read block by block, and not changed by a bit."""

    feed: Feed  # the dense model and the calibration windows
    linears: Sequence[LinearSize]  # those to prune, in the order of the chain
    sparsity: float  # fraction of zeros over all of them
    zeros: int  # their number
    loss_gradients: LossGradients | None = None

    @property
    def chain(self) -> Chain:
        return self.feed.chain

    @property
    def gradients(self) -> LossGradients:
        """The gradients of the dense model's loss, with saliencies, for an allocation with ``gradient_tokens``."""
        if self.loss_gradients is None:
            raise RecipeError("the allocation uses survey.gradients without gradient_tokens; add needs=... to it")
        return self.loss_gradients

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(linear.name for linear in self.linears)

    @cached_property
    def shared(self) -> frozenset[str]:
        """The names of linears whose weight is used in several places of the model."""
        views = (linear for index in self.blocks for linear in self._views(index))
        return frozenset(linear.name for linear in views if self.chain.is_shared(linear.weight_name))

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that have a linear to prune, in order."""
        return tuple(dict.fromkeys(linear.block for linear in self.linears))

    @cached_property
    def mean_squares(self) -> dict[str, Tensor]:
        """Mean square of every input over the tokens that reach a linear, ``(in,)`` fp32; without unreached linears.
        Each process runs some of the windows, and all have the same sums."""
        sums: dict[str, Tensor] = {}
        tokens: dict[str, int] = {}
        feed, places = self.feed.own()

        def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
            rows = x.detach().flatten(0, -2).float()
            squares = rows.square().sum(0)
            sums[linear.name] = sums[linear.name] + squares if linear.name in sums else squares
            tokens[linear.name] = tokens.get(linear.name, 0) + len(rows)

        stream, blocks = feed.stream(), len(self.chain)
        for index in range(blocks):
            self.feed.progress(Progress("survey", index, blocks, f"block {index + 1}/{blocks} inputs"))
            seen = self._views(index) if places.start < places.stop else []
            with self.chain.block(index, self.feed.blocks), watch(seen, see):
                stream.advance(index)
        stream.close()
        self.feed.progress(Progress("survey", blocks, blocks))
        every = [linear for index in range(blocks) for linear in self._views(index)]
        parallel.all_sums_(sums, {linear.name: (linear.in_features,) for linear in every}, self.chain.device)
        counts = parallel.gather(tokens)
        total = {name: sum(some.get(name, 0) for some in counts) for name in sums}
        return {name: sums[name] / count for name, count in total.items() if count}

    def wanda_metrics(self) -> Iterator[tuple[int, list[Tensor]]]:
        """For each block, ``|w_ij| · √E[x_j²]`` of its linears that a token reached, ``(out, in)`` fp32. The papers
        (2306.11695) take the norm over the tokens, which differs by a common factor."""
        mean_squares = self.mean_squares
        for index in self.blocks:
            with self.chain.block(index, self.feed.blocks):
                metrics = [
                    linear.weight().abs_().mul_(mean_squares[linear.name].sqrt())
                    for linear in self._views(index)
                    if linear.name in mean_squares
                ]
            yield index, metrics

    def _views(self, index: int) -> list[LinearView]:
        return [linear for linear in self.chain.linears(index) if linear.name in self.names]
