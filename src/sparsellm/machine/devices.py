"""Where things are computed."""

from __future__ import annotations

import torch

from sparsellm.errors import RecipeError


def resolve_device(name: str) -> torch.device:
    """The device that a recipe or a command names.

    Raises:
        RecipeError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"device {name!r} cannot be used here ({reason[:160]}); try 'cpu' or 'auto'") from None
    if device.type == "meta":
        raise RecipeError("device 'meta' holds no numbers; try 'cpu' or 'auto'")
    return device
