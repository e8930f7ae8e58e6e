"""2:4 sparsity on the tensor cores of a GPU that has them, through torch."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from sparsellm.errors import KernelError
from sparsellm.patterns import NM


def to_semi_structured(weight: Tensor) -> Tensor:
    """A 2:4 weight in torch's semi-structured form if its device supports that, else the same dense weight.

    ``torch.nn.functional.linear`` takes either. The dense fallback has the same results at the speed and size of a
    dense weight; each reason for it is shown once, as a warning.

    Args:
        weight: ``(out, in)`` with at most two non-zeros in every four consecutive inputs.

    Raises:
        KernelError: the weight is not 2:4.
    """
    if weight.dim() != 2 or not _is_two_of_four(weight):
        raise KernelError(f"a weight of shape {tuple(weight.shape)} that is not 2:4 has no semi-structured form")
    obstacle = _obstacle(weight)
    if obstacle is not None:
        _tell(obstacle)
        return weight
    return torch.sparse.to_sparse_semi_structured(weight)


def _is_two_of_four(weight: Tensor) -> bool:
    pattern = NM(2, 4)
    if weight.shape[1] % pattern.m:
        return False
    kept = (weight != 0).view(len(weight), -1, pattern.m).sum(-1)
    return bool((kept <= pattern.n).all())


def _obstacle(weight: Tensor) -> str | None:
    """The reason why torch has no 2:4 product for this weight, or None. Sizes as documented for bf16 and fp16."""
    if weight.device.type != "cuda":
        return f"2:4 tensor cores need an NVIDIA GPU, not {weight.device.type}"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "2:4 tensor cores need compute capability 8.0 or later"
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return f"torch multiplies 2:4 weights in bf16 and fp16, not {weight.dtype}"
    if weight.shape[0] % 32 or weight.shape[1] % 64:
        return "2:4 weights need a multiple of 32 rows and of 64 columns"
    return None


@cache
def _tell(obstacle: str) -> None:
    warnings.warn(f"{obstacle}; a dense product is used", stacklevel=3)
