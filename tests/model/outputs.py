"""What modules return while a whole model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def hooked(
    model: PreTrainedModel, modules: list[nn.Module], ids: torch.Tensor
) -> list[Any]:
    """What each module returns in one forward of the whole model: an independent view of the same values."""
    seen: list[Any] = []
    handles = [
        module.register_forward_hook(lambda m, args, output: seen.append(output))
        for module in modules
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [output[0] if isinstance(output, tuple) else output for output in seen]
