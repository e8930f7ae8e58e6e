"""Finding the parts of a decoder by structure: no list of families, no names of attributes."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import PreTrainedModel

from sparsellm.chain.linears import iterate_linears, weight_of
from sparsellm.chain.names import tower_names
from sparsellm.errors import ModelError


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks: the ``ModuleList`` that holds most of the weights of linears.

    A list nested in another (the experts of a block, say) holds no more than its parent does, so the outermost of
    equals is taken. The vision and audio towers of a multimodal model are left aside.

    Returns:
        The list's name in the model, and the list.

    Raises:
        ModelError: no ``ModuleList`` holds linears.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    towers = tuple(f"{tower}." for tower in tower_names(model)) if isinstance(model, PreTrainedModel) else ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0 and not name.startswith(towers):
            size = sum(weight_of(linear).numel() for _, linear in iterate_linears(module, name))
            if size and (best is None or size > best[0]):
                best = (size, name, module)
    if best is None:
        raise ModelError(f"{type(model).__name__} has no list of blocks with linear layers; it cannot be pruned")
    return best[1], best[2]


def cache_keyword(model: nn.Module) -> str:
    """How a model's forward, and its output, call the cache of keys and values: transformers 5 renames it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
