"""The survey of the dense model that an allocation gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from sparsellm.errors import RecipeError
from sparsellm.method.sweep.gradients import LossGradients
from sparsellm.model import Chain, Feed


@dataclass(frozen=True)
class LinearSize:
    """A linear to prune."""

    name: str
    block: int  # its number
    shape: tuple[int, int]  # (out, in)
    # its zeros if sparsity_of sets them; an allocation does not get such a linear
    fixed: int | None = None

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
            raise RecipeError(
                "the allocation uses survey.gradients without gradient_tokens; add needs=... to it"
            )
        return self.loss_gradients

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(linear.name for linear in self.linears)

    @cached_property
    def shared(self) -> frozenset[str]:
        """The names of linears whose weight is used in several places of the model."""
        return frozenset(
            name for name in self.names if self.chain.is_shared(f"{name}.weight")
        )
