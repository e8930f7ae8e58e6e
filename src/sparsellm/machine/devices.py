"""The devices of this machine."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from sparsellm.errors import RecipeError, shown


def available_devices() -> list[str]:
    """The names of the devices of this machine that torch can use, ``cpu`` first."""
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        names += [f"xpu:{index}" for index in range(torch.xpu.device_count())]
    return names


def machine_name(device: torch.device) -> str:
    """The model of a GPU; or that of the processor, and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """The model of the processor where the system tells it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def resolve_device(name: str) -> torch.device:
    """The device that a recipe or a command names.

    Raises:
        RecipeError: the machine has no such device, or it cannot hold a tensor.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = available_devices()
    if name.removesuffix(":0") not in {*here, *(known.partition(":")[0] for known in here)}:
        raise RecipeError(f"device {shown(name)} does not exist here; here: {', '.join(here)}, or 'auto'")
    device = torch.device(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecipeError(f"device {name!r} cannot be used here ({reason[:160]}); try 'cpu' or 'auto'") from None
    return device
