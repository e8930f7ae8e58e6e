"""Tiny models with zeros, for whoever packs, loads or tunes them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sparsellm.model import open_chain
from sparsellm.patterns import Pattern
from tests.shares import Share


def prune_tiny(
    model: PreTrainedModel, pattern: Pattern | None = None
) -> PreTrainedModel:
    """Zeros in every linear of the blocks, the smallest weights first; 70 % if no pattern is given. In place."""
    pattern = pattern or Share(0.7)
    chain = open_chain(model, device=torch.device("cpu"))
    for index in range(len(chain)):
        for linear in chain.linears(index):
            weight = linear.weight()
            linear.assign(weight * pattern.mask(weight.abs()))
    return model
