"""Gram matrices of the inputs of linears while a block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsellm.errors import NumericalError
from sparsellm.method.gram import Gram, GramAccumulator
from sparsellm.model import LinearView
from sparsellm.model.capture import Group, InputGroups


class Statistics:
    """The Gram matrices of what linears read; linears with the same input share one."""

    def __init__(self, linears: list[LinearView], device: torch.device) -> None:
        self.linears = linears
        self.device = device
        self.grouping = InputGroups()
        self.accumulators: dict[str, GramAccumulator] = {}

    def see(
        self, linear: LinearView, inputs: Tensor, token_weights: Tensor | None = None
    ) -> None:
        """Adds the inputs of one call ``(..., in)``. Weights of tokens ``(...)`` count where the linear gets every
        token; otherwise all weights are 1, since it is not known which it gets."""
        # An expert that is called without tokens has none: all empty tensors are at one address.
        if not inputs.numel() or not self.grouping.add(linear, inputs):
            return
        every = (
            token_weights is not None
            and token_weights.numel() == inputs.shape[:-1].numel()
        )
        accumulator = self._accumulator(linear)
        accumulator.update(inputs, token_weights if every else None)

    def _accumulator(self, linear: LinearView) -> GramAccumulator:
        if linear.name not in self.accumulators:
            self.accumulators[linear.name] = GramAccumulator(
                linear.in_features, self.device
            )
        return self.accumulators[linear.name]

    def reduce(self) -> list[Group]:
        """Adds up the sums of all processes; returns the groups of linears with one input."""
        groups = self.grouping.agreed(self.linears)
        for head, *_ in groups:
            self._accumulator(head).reduce()
        return groups

    def finish(self, groups: list[Group]) -> list[tuple[Group, Gram]]:
        """The groups, each with its Gram matrix. A NumericalError names the linear whose inputs have none."""
        grams = []
        for group in groups:
            with naming(group[0].name):
                grams.append((group, self.accumulators.pop(group[0].name).finish()))
        return grams


@contextlib.contextmanager
def naming(linear: str) -> Iterator[None]:
    """Puts the name of a linear before the message of a NumericalError."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{linear}: {error}") from error
