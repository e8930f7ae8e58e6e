"""The machine that a run is on: its devices, and the memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource
import sys
from pathlib import Path

import psutil
import torch

from sparsellm.errors import RecipeError, shown


def available_devices() -> list[str]:
    """The names of the devices of this machine that torch can use, ``cpu`` first."""
    counts = {"cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count()}
    named = [f"{kind}:{index}" for kind, count in counts.items() for index in range(count)]
    return ["cpu", *named, *["mps"] * torch.backends.mps.is_available()]


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
    """The device that a recipe or a command names. Raises RecipeError if the machine has no such device, or it cannot
    hold a tensor."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = available_devices()
    if name.removesuffix(":0") not in {*here, *(known.partition(":")[0] for known in here)}:
        raise RecipeError(f"device {shown(name)} does not exist here; here: {', '.join(here)}, or 'auto'")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecipeError(f"device {name!r} cannot be used here ({reason[:160]}); try 'cpu' or 'auto'") from None
    return torch.device(name)


def peak_rss() -> int:
    """The peak memory of this process so far, in bytes; getrusage would also count what its parent held at the fork."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident() -> int:
    """The memory this process holds now, in bytes."""
    held: int = psutil.Process().memory_info().rss
    return held


def free_memory() -> int:
    """Bytes that this process can still allocate: the machine's free memory, or the limit of its control group."""
    return min([psutil.virtual_memory().available, *_control_group_rooms()])


def trim() -> None:
    """Returns the free part of the C heap to the system, where glibc is the C library: tokenising a text leaves a
    hundred times its size in holes that no tensor fits into."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _control_group_rooms() -> list[int]:
    """The bytes that each memory limit of the container (cgroup version 2 or 1) still leaves; empty without a limit."""
    rooms = []
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            most, used = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in (limit, usage))
            rooms.append(max(0, most - used))
    return rooms
