"""Locates the blocks of a decoder by structure, without a list of families or names of attributes."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import PreTrainedModel

from sparsellm.chain.linears import iterate_linears, weight_of
from sparsellm.chain.names import tower_names
from sparsellm.errors import ModelError


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks, with its name in the model: the ``ModuleList`` with most of the weights of linears.

    A list nested in another (such as the experts of a block) holds no more than its parent. If two hold equally many,
    the outer one is returned. The vision and audio towers of a multimodal model are left out.

    Raises:
        ModelError: no ``ModuleList`` holds linears.
    """
    towers = tuple(f"{tower}." for tower in tower_names(model)) if isinstance(model, PreTrainedModel) else ()
    sizes = {
        name: sum(weight_of(linear).numel() for _, linear in iterate_linears(module, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not name.startswith(towers)
    }
    name = max(sizes, key=lambda name: sizes[name], default="")
    if not sizes.get(name):
        raise ModelError(f"{type(model).__name__} has no list of blocks with linear layers; it cannot be pruned")
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    return name, blocks


def cache_keyword(model: nn.Module) -> str:
    """The name of the key-value cache in a model's forward and its output, which later releases rename."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
