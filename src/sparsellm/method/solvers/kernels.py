"""Which device prunes and rounds by kernels."""

from __future__ import annotations

from types import ModuleType

import torch

from sparsepack.module import kernel_name


def kernels_for(device: torch.device) -> ModuleType | None:
    """The module ``sparsellm.method.solvers.panels`` on a GPU; None on a CPU, or where Triton does not run."""
    if device.type == "cuda" and kernel_name("cuda") == "triton":
        from sparsellm.method.solvers import panels

        return panels
    return None
